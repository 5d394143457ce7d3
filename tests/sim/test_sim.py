"""A thousand histories of whole deployments, and the bugs that they must find.

`make sim SEEDS=100000` runs more of them. Each bug is one that other systems had (the sources are
those of the project's list of known failures); it is patched in, and some seed must fail.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
import sim_engine
from sim.cluster import FAULTS, simulate
from sim.run import many, one

from baton.core.blame import Living
from baton.core.books import Books
from baton.core.exports import ExportTable
from baton.core.handoff import RequestTable
from baton.core.held_leases import HeldLeases
from baton.core.imports import ImportTable
from baton.core.lease import LeaseTable
from baton.core.life import Life
from baton.core.liveness import Liveness
from baton.core.lives import Lives
from baton.core.outcome import take_over
from baton.core.placing import Placing
from baton.core.scheduler import Scheduler
from baton.core.sequence import Status
from baton.core.store_index import StoreIndex
from baton.types import Pulse

Patch = pytest.MonkeyPatch
NUM_SEEDS = 1000


def test_a_thousand_histories() -> None:
    totals, failures = many(range(NUM_SEEDS), processes=2)
    assert not failures, failures[:5]
    # Every fault happened, each was survived by its own way, and the paths were taken.
    for kind in FAULTS:
        assert totals[f"hit_{kind}"], kind
    for name in (
        "early_blocks",
        "early_in_time",
        "imported_blocks",
        "restored_blocks",
        "lent_blocks",
        "preemptions",
        "placed_again",
        "given_up",
        "workers_silent",
        "workers_stuck",
        "workers_thawed",
        "stale_messages",
        "store_full_waits",
        "leases_expired",
        "fallback_export_failed",
        "fallback_import_corrupt",
        "fallback_import_stale_epoch",
        "fallback_import_overdue",
        "early_lost_overdue",
        "fallback_import_timed_out",
        "fallback_import_unreachable",
    ):
        assert totals[name], f"no {name} in all histories"


def test_a_seed_is_one_history() -> None:
    for seed in (1, 2, 3):
        assert simulate(seed) == simulate(seed)


# The bugs ----------------------------------------------------------------------------------


def blocks_freed_while_they_are_read(patch: Patch) -> None:
    """A lease keeps nothing from eviction (aws-do-eks#84: readers got blocks of others)."""
    patch.setattr(LeaseTable, "cover", lambda self, grant_id, key: grant_id in self)


def digest_not_compared(patch: Patch) -> None:
    """What was copied is taken for whole (vllm#54363: no checksum)."""
    patch.setattr(sim_engine, "digests_match", lambda frame, digest: True)


def copy_does_not_pin_its_source(patch: Patch) -> None:
    """A block is reused while a copy still reads it (vllm#52360)."""

    class NoRelease:
        def release(self, blocks: list[int]) -> None: ...

    copy, sealed = ExportTable._copy, ExportTable.sealed

    def copied(self: ExportTable, *args: object) -> object:
        order = copy(self, *args)  # type: ignore[arg-type]
        self._pool.release([order.block])
        return order

    def answered(self: ExportTable, key: bytes, digest: bytes | None) -> object:
        pool, self._pool = self._pool, NoRelease()  # type: ignore[assignment]
        try:
            return sealed(self, key, digest)
        finally:
            self._pool = pool

    patch.setattr(ExportTable, "_copy", copied)
    patch.setattr(ExportTable, "sealed", answered)


def fetch_does_not_pin_its_destination(patch: Patch) -> None:
    """The blocks of an aborted import are given away while they are written (sglang#24527)."""
    original = Scheduler.abort

    def abort(self: Scheduler, seq_id: object) -> None:
        for number, order in list(self.fetches.imports._orders.items()):
            if order.seq_id == seq_id:
                self.fetches.imports._pool.release([want.block for want in order.wanted])
                self.fetches.imports._orders[number] = type(order)(
                    order.number, order.seq_id, order.grant, (), order.deadline
                )
        original(self, seq_id)  # type: ignore[arg-type]

    patch.setattr(Scheduler, "abort", abort)


def aborted_prefill_keeps_its_lease(patch: Patch) -> None:
    """The KV of a prompt whose client left is stranded (vllm#41269, llm-d#1138)."""
    patch.setattr(HeldLeases, "release_all", lambda self, life: None)


def attempt_is_not_raised(patch: Patch) -> None:
    """A request is placed again under the name of the attempt that was given up."""
    original = Placing.place_again

    def place_again(self: Placing, life: Life, *args: object) -> None:
        life.attempt -= 1
        original(self, life, *args)  # type: ignore[arg-type]

    patch.setattr(Placing, "place_again", place_again)


def zombie_is_believed(patch: Patch) -> None:
    """Whoever names a request that lives may add to it: a frozen worker that wakes, for one."""
    patch.setattr(
        Lives,
        "current",
        lambda self, worker_id, key, attempt: (
            life if (life := self.living.get(key)) and life.worker_id else None
        ),
    )


def emitted_is_forgotten(patch: Patch) -> None:
    """A request that is placed again begins anew, and repeats what the client has."""
    original = Placing._submit

    def submit(self: Placing, life: Life, *args: object, **legs: object) -> None:
        tokens = life.tokens
        if life.attempt and "handoff" not in legs:
            life.tokens = []
        original(self, life, *args, **legs)  # type: ignore[arg-type]
        life.tokens = tokens

    patch.setattr(Placing, "_submit", submit)


def half_a_prompt_is_decoded(patch: Patch) -> None:
    """Blocks that did not come count as computed (sglang#30233)."""
    original = ImportTable.finish
    patch.setattr(
        ImportTable,
        "finish",
        lambda self, number, results: original(self, number, ("ok",) * len(results)),
    )


def old_epoch_is_read(patch: Patch) -> None:
    """A store that was started anew answers for the one before it (Mooncake, restarted peers)."""

    def fetch(order: object, store: object, kv: object) -> tuple[str, ...]:
        for want in order.wanted:  # type: ignore[attr-defined]
            slots = store.frames[want.frame].slots  # type: ignore[attr-defined]
            kv.blocks[want.block] = list(slots) or [sim_engine.POISON] * 2  # type: ignore[attr-defined]
        return ("ok",) * len(order.wanted)  # type: ignore[attr-defined]

    patch.setattr("sim.node.fetch", fetch)


def full_store_evicts_what_is_held(patch: Patch) -> None:
    """A block that somebody may read, or is about to, is the first to go (vllm#32255)."""
    original = StoreIndex.hold

    def hold(self: StoreIndex, key: bytes) -> bool:
        held = original(self, key)
        if held and self._slots[key].digest:
            self._cached[key] = None
            self._cached.move_to_end(key, last=False)
        return held

    patch.setattr(StoreIndex, "hold", hold)


def suspects_have_company(patch: Patch) -> None:
    """What may have crashed a worker is run again beside others, which then end with it."""
    original = Life.begin_leg

    def begin_leg(self: Life, *args: object) -> object:
        return msgspec.structs.replace(original(self, *args), alone=False)  # type: ignore[arg-type]

    patch.setattr(Life, "begin_leg", begin_leg)


def whoever_is_there_is_a_suspect(patch: Patch) -> None:
    """Also those that wait behind the one that is run alone."""
    original = Placing.lose_legs

    def lose_legs(self: Placing, worker_id: str, now: float, suspects: object) -> None:
        everyone = [(*life.key, life.attempt) for life in self._lives.living.values()]
        original(self, worker_id, now, everyone if suspects else ())

    patch.setattr(Placing, "lose_legs", lose_legs)


def a_frozen_worker_never_comes_back(patch: Patch) -> None:
    """What waits for it waits for ever."""
    patch.setattr(RequestTable, "thaw", lambda self, worker_id, now: None)


def a_frozen_worker_is_given_more(patch: Patch) -> None:
    """It is known to stand still, and requests are placed on it all the same."""

    def freeze(self: RequestTable, worker_id: str, now: float, stuck_at: object) -> None:
        self._lose_legs(worker_id, now, ())

    patch.setattr(RequestTable, "freeze", freeze)


def a_long_step_is_mistaken(patch: Patch) -> None:
    """Whoever works is taken to stand still, though its counter moves (dynamo#13675, reversed)."""
    original = Liveness.heard

    def heard(self: Liveness, worker_id: str, pulse: Pulse, now: float) -> bool:
        return original(self, worker_id, msgspec.structs.replace(pulse, progress=0), now)

    patch.setattr(Liveness, "heard", heard)


def a_frozen_worker_stays_healthy(patch: Patch) -> None:
    """Nobody looks (dynamo#13675)."""
    patch.setattr(Liveness, "check", lambda self, now: [])


def all_legs_of_a_dead_worker_are_convicted(patch: Patch) -> None:
    """Whatever was there when a worker ended without a word counts as its cause."""

    def blame_all(living: Living, worker_id: str) -> None:
        for life in living.values():
            if life.worker_id == worker_id:
                life.blame(life.attempt)

    patch.setattr("baton.core.handoff.blame_without_a_word", blame_all)


def nobody_is_suspected_of_a_silent_end(patch: Patch) -> None:
    """A request that crashes workers without a word takes one after the other along."""
    patch.setattr("baton.core.handoff.blame_without_a_word", lambda living, worker_id: None)


def blocks_of_an_overdue_fetch_are_used(patch: Patch) -> None:
    """What did not come in time is recomputed where it may still arrive (sglang#38961)."""

    def give_up(books: Books, now: float) -> None:
        for seq in books.fetches.give_up(now):
            if seq.status is Status.IMPORTING:
                take_over(books, seq, 0, now)
            else:
                books.wait(seq)

    patch.setattr("baton.core.outcome.give_up_fetches", give_up)


BUGS: tuple[Callable[[Patch], None], ...] = (
    blocks_freed_while_they_are_read,
    digest_not_compared,
    fetch_does_not_pin_its_destination,
    copy_does_not_pin_its_source,
    aborted_prefill_keeps_its_lease,
    attempt_is_not_raised,
    zombie_is_believed,
    emitted_is_forgotten,
    half_a_prompt_is_decoded,
    old_epoch_is_read,
    full_store_evicts_what_is_held,
    suspects_have_company,
    whoever_is_there_is_a_suspect,
    all_legs_of_a_dead_worker_are_convicted,
    nobody_is_suspected_of_a_silent_end,
    blocks_of_an_overdue_fetch_are_used,
    a_frozen_worker_never_comes_back,
    a_frozen_worker_is_given_more,
    a_long_step_is_mistaken,
)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_finds(bug: Callable[[Patch], None], monkeypatch: Patch) -> None:
    bug(monkeypatch)
    for seed in range(NUM_SEEDS):
        if one(seed)[1] is not None:
            return
    raise AssertionError(f"no seed of {NUM_SEEDS} found it")
