"""The machine must find each of these bugs, which are patched into the code one at a time.

The books of pool and store are not verified here (`check = False`): a bug has to show in what a
client sees, in the runner's own assertions or in what is left over at the end. It is the machine
of `test_scheduler_machine`, so that test is worth what this one shows.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sim_engine
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from serving_machine import ServingMachine
from sim_engine import make_config

from baton.core import keys, lease, next_step, prompt_order
from baton.core.attempts import AttemptMemory
from baton.core.block_pool import BlockPool
from baton.core.exports import ExportState, ExportTable
from baton.core.imports import ImportTable
from baton.core.in_flight import InFlight
from baton.core.next_step import NextStep
from baton.core.outcome import publish
from baton.core.plan import Chunk
from baton.core.scheduler import Scheduler
from baton.core.sequence import Sequence

Patch = pytest.MonkeyPatch
SETTINGS = settings(
    max_examples=1000,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


class BlindMachine(ServingMachine):
    check = False


class Uncached(BlindMachine):
    """Freed blocks are taken again at once."""

    prefill_config = make_config(
        num_blocks=9, num_frames=9, max_num_batched_tokens=8, prefix_cache=False
    )
    decode_config = make_config(
        num_blocks=9, num_frames=1, max_num_batched_tokens=8, prefix_cache=False
    )


class Roomy(BlindMachine):
    """Many handoffs at a time."""

    prefill_config = make_config(num_blocks=40, num_frames=40, max_num_batched_tokens=40)


class SmallBudget(BlindMachine):
    """Prompts take many steps."""

    prefill_config = make_config(num_blocks=24, num_frames=24, max_num_batched_tokens=3)


class Deep(BlindMachine):
    """A step is planned while another one runs."""

    depth = 2


def stale_hash(patch: Patch) -> None:
    """An evicted block's key stays findable."""

    def evict(self: BlockPool, count: int) -> list[int]:
        blocks = [self._cached.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._key_of[block] = None
        return blocks

    patch.setattr(BlockPool, "_evict", evict)


def unchained_hash(patch: Patch) -> None:
    """A block's key covers its own tokens and not what came before."""
    original = keys.block_key
    patch.setattr(keys, "block_key", lambda parent, tokens: original(b"", tokens))


def freed_while_shared(patch: Patch) -> None:
    """Whoever releases a block first frees it, although others still use it."""

    def release(self: BlockPool, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self._refs[block] = max(0, self._refs[block] - 1)
            if block in self._cached or block in self._empty:
                continue
            if self._key_of[block] is None:
                self._empty.append(block)
            else:
                self._cached[block] = None

    def acquire(self: BlockPool, blocks: list[int]) -> None:
        for block in blocks:
            self._cached.pop(block, None)
            self._refs[block] += 1

    patch.setattr(BlockPool, "release", release)
    patch.setattr(BlockPool, "acquire", acquire)


def no_reset(patch: Patch) -> None:
    """A preempted sequence keeps its block table."""
    patch.setattr(Sequence, "reset", lambda self: None)


def no_recompute(patch: Patch) -> None:
    """A preempted sequence comes back with new blocks and its old `num_computed`."""
    original = NextStep._admit

    def reset(self: Sequence) -> None:
        self.blocks = []

    def admit(self: NextStep, seq: Sequence, *rest: object) -> bool:
        computed = seq.num_computed
        admitted = original(self, seq, *rest)  # type: ignore[arg-type]
        if admitted:
            seq.num_computed = seq.num_scheduled = max(seq.num_computed, computed)
        return admitted

    patch.setattr(Sequence, "reset", reset)
    patch.setattr(NextStep, "_admit", admit)


def zero_token_chunk(patch: Patch) -> None:
    """Chunks are cut to whole blocks, although less than one may be left of the budget."""
    original = NextStep._give

    def give(self: NextStep, seq: Sequence) -> None:
        original(self, seq)
        chunk = self.chunks[seq.id]
        if not chunk.samples:
            excess = chunk.end % seq.block_size
            self.chunks[seq.id] = Chunk(seq, chunk.start, chunk.num_tokens - excess, False)
            self.budget += excess
            seq.num_scheduled -= excess

    patch.setattr(NextStep, "_give", give)


def cached_block_counted_twice(patch: Patch) -> None:
    """A hit on a cached block counts as spared, and still as free to be taken."""
    patch.setattr(BlockPool, "num_unreferenced", lambda self, blocks: 0)


def free_blocks_counted_twice(patch: Patch) -> None:
    """The pool believes that cached blocks are free once more."""
    free = property(lambda self: len(self._empty) + 2 * len(self._cached))
    patch.setattr(BlockPool, "num_free", free)


def published_before_computed(patch: Patch) -> None:
    """Blocks can be found from admission on, while they are still being written."""
    original = NextStep._admit

    def admit(self: NextStep, seq: Sequence, *rest: object) -> bool:
        admitted = original(self, seq, *rest)  # type: ignore[arg-type]
        if admitted and seq.id in self._books.running:
            computed, seq.num_computed = seq.num_computed, seq.num_tokens
            publish(self._books, seq)
            seq.num_computed = computed
        return admitted

    patch.setattr(NextStep, "_admit", admit)


def digest_not_checked(patch: Patch) -> None:
    """The reader takes what it copied, whatever its digest."""
    patch.setattr(sim_engine, "digests_match", lambda frame, digest: True)


def handoff_keys_not_checked(patch: Patch) -> None:
    """A handoff is imported without comparing its keys with the request's tokens."""
    original = ImportTable._usable_handoff

    def usable(self: ImportTable, seq: Sequence) -> object:
        handoff = seq.request.handoff
        if handoff is None or seq.num_preemptions:
            return None
        return handoff if handoff.num_tokens == seq.num_tokens - 1 else original(self, seq)

    patch.setattr(ImportTable, "_usable_handoff", usable)


def all_of_a_broken_fetch_used(patch: Patch) -> None:
    """Blocks that did not verify count as computed."""
    original = ImportTable.finish
    patch.setattr(
        ImportTable,
        "finish",
        lambda self, number, results: original(self, number, ("ok",) * len(results)),
    )


def import_block_freed_at_abort(patch: Patch) -> None:
    """A fetch does not hold the blocks that it writes into."""
    original = ImportTable.order

    def ordered(self: ImportTable, *args: object) -> object:
        orders = original(self, *args)  # type: ignore[arg-type]
        for order in orders:
            self._pool.release([want.block for want in order.wanted])
        return orders

    finish = ImportTable.finish

    def finished(self: ImportTable, number: int, results: tuple[str, ...]) -> object:
        for want in self._orders[number].wanted:
            self._pool._refs[want.block] += 1
        return finish(self, number, results)

    patch.setattr(ImportTable, "order", ordered)
    patch.setattr(ImportTable, "finish", finished)


def commit_before_last_seal(patch: Patch) -> None:
    """The commit record leaves while a block is still being copied."""
    original = ExportTable.commit

    def commit(self: ExportTable, seq_id: object, now: float) -> object:
        export = self._exports[seq_id]  # type: ignore[index]
        if export.state is ExportState.SEALING:
            export.num_unsealed = 0
        return original(self, seq_id, now)  # type: ignore[arg-type]

    patch.setattr(ExportTable, "commit", commit)


def export_block_freed_before_copied(patch: Patch) -> None:
    """A copy does not hold the block that it reads."""

    class NoRelease:
        def release(self, blocks: list[int]) -> None: ...

    begin, sealed = ExportTable._begin, ExportTable.sealed

    def patched_begin(self: ExportTable, *args: object) -> object:
        order = begin(self, *args)  # type: ignore[arg-type]
        if order is not None:
            self._pool.release([order.block])
        return order

    def patched_sealed(self: ExportTable, key: bytes, digest: bytes | None) -> object:
        pool, self._pool = self._pool, NoRelease()  # type: ignore[assignment]
        try:
            return sealed(self, key, digest)
        finally:
            self._pool = pool

    patch.setattr(ExportTable, "_begin", patched_begin)
    patch.setattr(ExportTable, "sealed", patched_sealed)


def attempt_ignored(patch: Patch) -> None:
    """A repeat, or a late older attempt, takes the place of the one that runs."""
    original = Scheduler.add

    def add(self: Scheduler, request: sim_engine.Request, now: float) -> None:
        known = self.books.attempts.latest(request.id, request.choice)
        if known is not None:
            self.abort(known)
        self.books.attempts = AttemptMemory()
        original(self, request, now)

    patch.setattr(Scheduler, "add", add)


def ended_attempt_forgotten(patch: Patch) -> None:
    """A repeat that comes after the end runs again."""
    original = AttemptMemory.__init__
    patch.setattr(AttemptMemory, "__init__", lambda self: original(self, 0))


def lease_holds_nothing(patch: Patch) -> None:
    """Blocks of a committed handoff may be evicted before anybody has read them."""
    original = lease.LeaseTable.mint

    def mint(self: lease.LeaseTable, grant_id: str, *rest: object) -> object:
        grant = original(self, grant_id, *rest)  # type: ignore[arg-type]
        self._leases[grant_id].keys = _Forgetful()
        return grant

    class _Forgetful(dict[bytes, None]):
        def __iter__(self) -> object:  # type: ignore[override]
            return iter(())

    release = lease.LeaseTable.cover

    def cover(self: lease.LeaseTable, grant_id: str, key: bytes) -> bool:
        covered = release(self, grant_id, key)
        self._index.unhold(key)
        return covered

    patch.setattr(lease.LeaseTable, "mint", mint)
    patch.setattr(lease.LeaseTable, "cover", cover)
    patch.setattr(sim_engine.SimWorker, "check_commit", lambda self, handoff: None)


def credit_leaked(patch: Patch) -> None:
    """An export that is dropped keeps the frames that were promised to it."""
    original = ExportTable._drop

    def drop(self: ExportTable, seq_id: object) -> None:
        self._exports[seq_id].credits = 0  # type: ignore[index]
        original(self, seq_id)  # type: ignore[arg-type]

    patch.setattr(ExportTable, "_drop", drop)


def prompt_starves_decodes(patch: Patch) -> None:
    """Prompts are planned before running answers."""
    original = NextStep._grow

    def grow(self: NextStep, seq: Sequence) -> bool:
        # The budget is gone before the first decode, if a prompt is waiting for more.
        others = [s for s in self._books.running.values() if s.num_remaining > 1 and s is not seq]
        grown = original(self, seq)
        if others and seq.num_remaining == 1:
            self.budget = min(self.budget, 1)
        return grown

    patch.setattr(NextStep, "_grow", grow)


def no_ageing(patch: Patch) -> None:
    """Less work left goes first, however long another has waited."""

    def by_work_alone(seq: Sequence) -> prompt_order.Rank:
        return (seq.num_preemptions == 0, seq.num_remaining, seq.order)

    patch.setattr(prompt_order, "rank", by_work_alone)
    patch.setattr(next_step, "rank", by_work_alone)


def preempted_ranks_like_a_new_one(patch: Patch) -> None:
    """A sequence that gave back its blocks queues among those that never ran."""

    def anew(seq: Sequence) -> prompt_order.Rank:
        value = prompt_order.PASSING * seq.num_remaining + seq.admitted_before
        return (True, value, seq.order)

    patch.setattr(prompt_order, "rank", anew)
    patch.setattr(next_step, "rank", anew)


def block_freed_under_a_step(patch: Patch) -> None:
    """Blocks go back at once, although a step in flight uses them."""
    patch.setattr(
        InFlight,
        "drop",
        lambda self, seq: [chunks.pop(seq.id, None) for chunks in self._steps.values()],
    )


def token_after_the_end(patch: Patch) -> None:
    """What a step drew for a sequence that ended meanwhile is taken in."""
    original = InFlight.end

    def end(self: InFlight, step: int) -> object:
        original(self, step)
        return _Everything()

    class _Everything:
        def __len__(self) -> int:
            return 0

        def __contains__(self, seq_id: object) -> bool:
            return True

    patch.setattr(InFlight, "end", end)


def runs_past_a_foreseen_end(patch: Patch) -> None:
    """A sequence whose last token is being drawn is given another chunk."""
    patch.setattr(next_step, "may_run_ahead", lambda seq, config: True)


def exported_before_collected(patch: Patch) -> None:
    """A block is given to the store when the step that fills it is planned."""
    original = ExportTable.export_full_blocks

    def export(self: ExportTable, seq: Sequence) -> object:
        computed, seq.num_computed = seq.num_computed, min(seq.num_scheduled, seq.num_tokens)
        try:
            return original(self, seq)
        finally:
            seq.num_computed = computed

    patch.setattr(ExportTable, "export_full_blocks", export)


BUGS: dict[Callable[[Patch], None], type[ServingMachine]] = {
    stale_hash: BlindMachine,
    unchained_hash: BlindMachine,
    freed_while_shared: BlindMachine,
    no_reset: BlindMachine,
    no_recompute: BlindMachine,
    zero_token_chunk: BlindMachine,
    cached_block_counted_twice: BlindMachine,
    free_blocks_counted_twice: BlindMachine,
    published_before_computed: SmallBudget,
    digest_not_checked: BlindMachine,
    handoff_keys_not_checked: Roomy,
    all_of_a_broken_fetch_used: BlindMachine,
    import_block_freed_at_abort: Uncached,
    commit_before_last_seal: BlindMachine,
    export_block_freed_before_copied: Uncached,
    attempt_ignored: BlindMachine,
    ended_attempt_forgotten: BlindMachine,
    lease_holds_nothing: BlindMachine,
    credit_leaked: BlindMachine,
    prompt_starves_decodes: BlindMachine,
    no_ageing: SmallBudget,
    preempted_ranks_like_a_new_one: BlindMachine,
    block_freed_under_a_step: Deep,
    token_after_the_end: Deep,
    runs_past_a_foreseen_end: Deep,
    exported_before_collected: Deep,
}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_machine_finds(bug: Callable[[Patch], None], monkeypatch: Patch) -> None:
    bug(monkeypatch)
    with pytest.raises((AssertionError, LookupError, MemoryError, ValueError)):
        run_state_machine_as_test(BUGS[bug], settings=SETTINGS)


@pytest.mark.parametrize("machine", [BlindMachine, Uncached, Roomy, SmallBudget, Deep])
def test_machine_finds_nothing_without_a_bug(machine: type[ServingMachine]) -> None:
    run_state_machine_as_test(machine, settings=settings(SETTINGS, max_examples=25))
