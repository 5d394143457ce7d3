"""What runs in the next step, and what its outcome means.

One rule: `num_computed` catches up with `num_tokens`. A step has a token budget. Sequences that
need one token go first, so a prompt never starves a running answer. Prompts share what is left,
in the order of `prompt_order`: those already begun, and new ones, which are admitted in their turn
while blocks last. When blocks run out the newest sequence is preempted: it keeps its tokens, gives
back its blocks and comes back through admission, where the prefix cache may spare it most of the
work. The oldest one is never preempted by another, so something always progresses. What changes
when a step is planned while another one runs is told in `in_flight`.

`Scheduler` owns the sequences, the block pool, the exports and the imports. Methods take the
time as an argument; what they bring for the outside is collected by `take`. (Over the
usual length of a file: one rule, told in one place.)
"""

from __future__ import annotations

import heapq
from collections import Counter

from baton.core.admission import OutputLengths
from baton.core.attempts import AttemptMemory
from baton.core.block_pool import BlockPool
from baton.core.early import EarlyFetches
from baton.core.exports import ExportTable
from baton.core.imports import OK, ImportTable
from baton.core.in_flight import MAX_DEPTH, InFlight, may_run_ahead
from baton.core.keys import root_key
from baton.core.lease import LeaseTable
from baton.core.limits import SchedulerConfig
from baton.core.links import LinkTable
from baton.core.plan import Chunk, ImportOrder, StepOutput, StepPlan, Update, error_delta
from baton.core.prompt_order import PromptQueue, rank
from baton.core.sequence import Sequence, SequenceId, Status
from baton.core.store_index import StoreIndex
from baton.core.unlike import is_like, origin
from baton.errors import DeadlineExceeded, ServeError, TransferFailed, Unavailable
from baton.types import (
    FinishReason,
    Lend,
    Request,
    SampledLogprobs,
    Sealed,
    TokenDelta,
    WorkerLoad,
)

_RUNNING = Status.RUNNING  # read for every sequence in every step
_STAGES = {
    Status.ARRIVING: "transfer",
    Status.WAITING: "queue",
    Status.IMPORTING: "transfer",
    Status.EXPORTING: "export",
}

COUNTERS = (
    "refused",
    "aborts",
    "preemptions",
    "tokens_computed",
    "tokens_generated",
    "prompt_tokens_computed",
    "prompt_tokens_recomputed",
    "prefix_query_tokens",
    "prefix_hit_tokens",
    "imported_blocks",
    "restored_blocks",
    "early_blocks",
    "lent_blocks",
    "store_full_waits",
    "late_renewals",
    "leases_expired",
    "fallback_export_failed",
)
"""Running totals that are there from the start; `fallback_import_<reason>` come as they happen."""


class Scheduler:
    """Policy of one worker. Every call is deterministic in its arguments."""

    def __init__(self, config: SchedulerConfig, leases: LeaseTable, index: StoreIndex) -> None:
        self.config = config
        self.counters: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
        self.pool = BlockPool(config.num_blocks)
        self.exports = ExportTable(config, self.pool, index, leases)
        self.imports = ImportTable(config, self.pool, index, self.counters)
        self.early = EarlyFetches(self.pool, config.kv_format.block_size, self.counters)
        self.links = LinkTable(config)
        self._leases = leases
        self._in_flight = InFlight(self.pool)
        # A decode takes one token of the budget, so no more of them may run than it has.
        self._max_running = min(config.max_num_seqs, config.max_num_batched_tokens)
        self._sequences: dict[SequenceId, Sequence] = {}
        self._attempts = AttemptMemory()
        self._arriving: dict[SequenceId, Sequence] = {}
        self._waiting = PromptQueue()
        self._running: dict[SequenceId, Sequence] = {}
        self._chunks: dict[SequenceId, Chunk] = {}
        self._budget = 0
        self._deadlines: list[tuple[float, SequenceId]] = []
        self._num_added = 0
        self._num_fetches = 0
        self._imports: list[ImportOrder] = []
        self._num_admitted_tokens = 0
        self._lengths = OutputLengths()
        self._step = 0
        self._draining = False
        self._update = Update()

    # What comes in ---------------------------------------------------------------------------

    def add(self, request: Request, now: float) -> None:
        """Accept a request, or end it at once with a typed error."""
        seq_id = (request.id, request.choice, request.attempt)
        known = self._attempts.latest(*seq_id[:2])
        if known is not None:
            if known[2] >= request.attempt:
                return  # a repeat, or a late message of an attempt that was given up
            self.abort(known)
        self._attempts.begin(seq_id)
        try:
            if self._draining:
                raise Unavailable("this worker is draining", stage="queue")
            self.config.validate(request)
        except ServeError as error:
            self.counters["refused"] += 1
            self._update.deltas.append(error_delta(seq_id, len(request.emitted), error))
            self._attempts.end(seq_id)
            return
        root = root_key(self.config.fingerprint, self.config.numerics, request.salt)
        seq = Sequence(request, root, self.config.kv_format.block_size, now)
        self._num_added += 1
        seq.order = self._num_added
        seq.admitted_before = self._num_admitted_tokens
        self._sequences[seq.id] = seq
        if request.handoff is not None:
            seq.origin = origin(self.config, request.handoff)
            if is_like(self.config, request.handoff):  # no codec was measured for another form
                seq.codec = self.links.codec(seq.id, request.handoff.grant.source)
        if request.handoff is not None and self.early.awaits(seq.class_keys(seq.num_tokens - 1)):
            seq.status = Status.ARRIVING
            self._arriving[seq.id] = seq
        else:
            self._waiting.add(seq)
        if seq.deadline is not None:
            heapq.heappush(self._deadlines, (seq.deadline, seq.id))

    def abort(self, seq_id: SequenceId) -> None:
        """Forget a sequence. Blocks in transfer are freed when the transfer is acknowledged."""
        seq = self._sequences.get(seq_id)
        if seq is not None:
            self.counters["aborts"] += 1
            self._release(seq)

    def drain(self) -> None:
        """Finish what was accepted, refuse what comes."""
        self._draining = True

    def exported(self, key: bytes, digest: bytes | None, now: float) -> None:
        """A copy into the store ended: with its digest, or badly (None)."""
        if digest is None:
            self.counters["fallback_export_failed"] += 1
        for seq in self.exports.sealed(key, digest):
            if self.exports.failed(seq.id):
                error = TransferFailed("a block could not be copied to the store", stage="export")
                self._fail(seq, now, error)
            elif seq.status is Status.EXPORTING:
                self._try_commit(seq, now)
            self._tell(seq, now)

    def offer(self, sealed: Sealed, now: float) -> None:
        """Blocks that this worker may soon want can be had; it fetches them if there is room."""
        if self.config.prefix_cache and not self._draining:
            spare = self.pool.num_free - sum(map(self._growth, self._running.values()))
            seq_id = (sealed.request_id, sealed.choice, sealed.attempt)
            codec = self.links.codec(seq_id, sealed.grant.source)
            order = self.early.offer(sealed, codec, spare, now, self._num_fetches)
            if order is not None:
                self._num_fetches += 1
                self._imports.append(order)

    def lend(self, ask: Lend, now: float) -> None:
        """Open blocks of the store to a reader; the answer is among what was sealed."""
        lent = self.exports.lend(ask, now)
        self.counters["lent_blocks"] += len(lent.keys)
        self._update.sealed.append(lent)

    def link(self, source: str) -> None:
        """Blocks of `source` come over a network; until this is said, through shared memory."""
        self.links.reached_by_wire(source)

    def imported(
        self, number: int, results: tuple[str, ...], now: float, elapsed_s: float = 0.0
    ) -> None:
        """A fetch ended; one word a wanted block, `ok` or the reason why it may not be used.

        elapsed_s: how long it took, without the time in which it waited for others.
        """
        order = (self.early if number in self.early else self.imports).order_of(number)
        if order.recut is None and all(result == OK for result in results):
            self.links.observe(order.grant, order.codec, len(results), elapsed_s)
        if number in self.early:
            landed = self.early.finish(number, results)
            if landed is not None:
                self._update.landed.append(landed)
            self._arrived()
            return
        done = self.imports.finish(number, results)
        if done is None:
            return
        seq, num_verified = done
        if num_verified:
            computed = seq.num_computed + num_verified * seq.block_size
            # The last token is always computed, and the last block may be a partial one.
            seq.num_computed = seq.num_scheduled = min(computed, seq.num_tokens - 1)
            seq.num_imported_blocks = num_verified
            seq.num_kept = seq.num_computed // seq.block_size
            self._publish(seq)
        seq.import_done = now
        seq.status = Status.RUNNING
        self._running[seq.id] = seq

    def renew(self, grant_ids: tuple[str, ...], now: float) -> None:
        for grant_id in grant_ids:
            if not self._leases.renew(grant_id, now):
                self.counters["late_renewals"] += 1

    def release(self, grant_ids: tuple[str, ...]) -> None:
        for grant_id in grant_ids:
            self._leases.release(grant_id)

    # The step --------------------------------------------------------------------------------

    def schedule(self, now: float) -> StepPlan:
        """Choose the next step. A plan without chunks means: nothing can run until news comes."""
        assert len(self._in_flight) < MAX_DEPTH, "too many steps in flight"
        self._expire(now)
        self._step += 1
        self._chunks = {}
        self._budget = self.config.max_num_batched_tokens
        num_preempted = self.counters["preemptions"]
        decodes: list[Sequence] = []
        prompts: list[Sequence] = []
        for seq in self._running.values():
            (decodes if seq.num_expected - seq.num_scheduled == 1 else prompts).append(seq)
        if self._in_flight:
            decodes = [seq for seq in decodes if self._is_ready(seq)]
        for seq in decodes:
            if seq.status is _RUNNING and self._grow(seq):
                self._plan(seq)
        # Whoever was preempted in this step must not take the blocks back in the same step.
        admits = self.counters["preemptions"] == num_preempted
        self._plan_prompts(prompts, admits, now)
        if self._chunks:
            self._in_flight.begin(self._step, self._chunks)
        imports, self._imports = tuple(self._imports), []
        return StepPlan(self._step, tuple(self._chunks.values()), imports)

    def update(self, plan: StepPlan, output: StepOutput, now: float) -> None:
        """Take in what a step computed. Steps end in the order in which they were planned."""
        num_generated = 0
        counting = self._in_flight.end(plan.step)
        all_count = len(counting) == len(plan.chunks)
        for chunk, tokens, logprobs in zip(
            plan.chunks, output.token_ids, output.logprobs, strict=True
        ):
            seq = chunk.seq
            if not all_count and seq.id not in counting:
                continue  # ended or preempted while the step ran
            if chunk.start < len(seq.request.prompt):
                self._count_prompt(seq, chunk)
            seq.num_computed = chunk.start + chunk.num_tokens
            if seq.num_computed >= (seq.num_published + 1) * seq.block_size:
                self._publish(seq)
                if self.config.keep_blocks and not seq.request.hand_off:
                    self._update.exports += self.exports.keep(seq)
            if seq.request.hand_off:
                self._update.exports += self.exports.export_full_blocks(seq)
                self._tell(seq, now)
            if chunk.samples:
                (token,) = tokens
                num_generated += 1
                self._append(seq, token, logprobs, now)
        self.counters["tokens_computed"] += plan.num_tokens
        self.counters["tokens_generated"] += num_generated

    def take(self) -> Update:
        """What happened since the last call: deltas, copies to make, commit records, times."""
        update, self._update = self._update, Update()
        return update

    # What others ask -------------------------------------------------------------------------

    @property
    def num_sequences(self) -> int:
        """Sequences that have not ended."""
        return len(self._sequences)

    @property
    def num_transfers(self) -> int:
        """Copies and fetches that have not been acknowledged."""
        return self.exports.num_copying + len(self.imports) + len(self.early)

    def is_drained(self) -> bool:
        """Nothing is accepted, nothing is left, and nobody may still read from the store."""
        left = self._sequences or self.num_transfers or len(self._leases) or self._in_flight
        return self._draining and not left

    def next_deadline(self) -> float | None:
        """When `schedule` has something to do even if no news comes."""
        expiry = self._leases.next_expiry()
        times = [at for at, _ in self._deadlines[:1]] + ([] if expiry is None else [expiry])
        return min(times, default=None)

    def load(self) -> WorkerLoad:
        """The part of the load that the scheduler knows."""
        return WorkerLoad(
            num_total_blocks=self.pool.num_blocks,
            num_free_blocks=self.pool.num_free,
            num_running=self._num_active(),
            num_waiting=len(self._waiting) + len(self._arriving),
            num_waiting_tokens=sum(seq.num_remaining for seq in self._waiting)
            + sum(seq.num_remaining for seq in self._running.values() if seq.num_remaining > 1),
        )

    def check(self) -> None:
        """Verify that pool and sequences agree; used when idle and by the tests.

        Raises:
            AssertionError: naming what does not add up.
        """
        self.pool.check()
        wanted = [0] * self.pool.num_blocks
        for seq in self._sequences.values():
            for block in seq.blocks:
                wanted[block] += 1
            if not self._in_flight:
                assert seq.num_scheduled == seq.num_computed, f"{seq.id} awaits no step"
                assert seq.num_expected == seq.num_tokens, f"{seq.id} awaits no token"
        for block in (
            *self.exports.blocks_in_transfer(),
            *self.imports.blocks_in_transfer(),
            *self.early.blocks_in_transfer(),
            *self._in_flight.held_blocks(),
        ):
            wanted[block] += 1
        for block, refs in enumerate(wanted):
            assert self.pool.refs(block) == refs, f"block {block}: {refs} owners"

    # Inside ----------------------------------------------------------------------------------

    def _num_active(self) -> int:
        return len(self._running) + len(self.imports)

    def _plan_prompts(self, prompts: list[Sequence], admits: bool, now: float) -> None:
        """Share the rest of the budget among prompts, and admit those whose turn it is."""
        promised = 0
        if admits and self._waiting and self._num_active() < self._max_running:
            promised = sum(map(self._growth, self._running.values()))
        begun = [seq for seq in prompts if seq.status is _RUNNING]
        begun.sort(key=rank, reverse=True)
        while self._budget > 0:
            admits = admits and bool(self._waiting) and self._num_active() < self._max_running
            if admits and not (begun and rank(begun[-1]) < rank(self._waiting.head)):
                seq = self._waiting.head
                admits = self._admit(seq, promised, now)
                if admits:
                    promised += self._growth(seq)
                    if seq.status is _RUNNING:
                        self._plan(seq)
            elif begun:
                self._plan(begun.pop())  # it has had room for all its tokens since admission
            else:
                break

    def _plan(self, seq: Sequence) -> None:
        start = seq.num_scheduled
        num_tokens = remaining = seq.num_expected - start
        if remaining > self._budget:
            num_tokens = self._budget
        samples = num_tokens == remaining
        self._chunks[seq.id] = Chunk(seq, start, num_tokens, samples)
        self._budget -= num_tokens
        seq.num_scheduled = start + num_tokens
        if samples:
            seq.num_expected += 1

    def _is_ready(self, seq: Sequence) -> bool:
        """Whether `seq` may have a chunk before what is in flight is collected."""
        return seq.num_expected == seq.num_tokens or may_run_ahead(seq, self.config)

    def _grow(self, seq: Sequence) -> bool:
        """Make room for all tokens of `seq`.

        False if there is none in this step: `seq` itself was preempted for it, or the blocks of
        one that was preempted, or that ended, are still in use by the step in flight.
        """
        if seq.num_expected <= len(seq.blocks) * seq.block_size:
            return True
        missing = self.config.num_blocks_for(seq.num_expected) - len(seq.blocks)
        while missing > self.pool.num_free:
            if missing <= self.pool.num_free + self._in_flight.num_returning():
                return False
            victim = next(reversed(self._running.values()))
            planned = self._chunks.pop(victim.id, None)
            if planned is not None:
                self._budget += planned.num_tokens
            self._preempt(victim)
            if victim is seq:
                return False
        seq.blocks += self.pool.allocate(missing)
        return True

    def _preempt(self, seq: Sequence) -> None:
        self.counters["preemptions"] += 1
        seq.num_preemptions += 1
        self._in_flight.drop(seq)
        self.pool.release(seq.blocks)
        seq.reset()
        del self._running[seq.id]
        seq.status = Status.WAITING
        self._waiting.add(seq)

    def _growth(self, seq: Sequence) -> int:
        """Blocks that `seq` is predicted to want beyond those for the tokens it has."""
        rest = self._lengths.predict_rest(seq.request, seq.num_generated)
        return self.config.num_blocks_for(rest)

    def _admit(self, seq: Sequence, promised: int, now: float) -> bool:
        """Move the head of the queue to running or importing, if there is room for it.

        `promised` blocks are free now and will be wanted by those that run already.
        """
        # The last token is always computed: without it there is nothing to draw from.
        covered = seq.num_tokens - 1
        keys = seq.class_keys(covered)
        hits = self.pool.lookup(keys) if self.config.prefix_cache else []
        needed = self.config.num_blocks_for(seq.num_tokens) - len(hits)
        wanted = needed + self.pool.num_unreferenced(hits)
        if self._num_active():  # a lone sequence may use everything: its worst case fits
            wanted += promised + self._growth(seq)
        if wanted > self.pool.num_free:
            return False
        if seq.request.hand_off and not self.exports.open(seq):
            self.counters["store_full_waits"] += 1
            return False
        self._waiting.discard(seq.id)
        self._num_admitted_tokens += seq.num_tokens
        self.pool.acquire(hits)
        seq.blocks = hits + self.pool.allocate(needed)
        seq.num_published = seq.num_kept = len(hits)
        seq.num_computed = seq.num_scheduled = len(hits) * seq.block_size
        if not seq.first_scheduled:
            seq.first_scheduled = now
            seq.num_cached = seq.num_computed
        self.counters["prefix_query_tokens"] += covered
        self.counters["prefix_hit_tokens"] += seq.num_computed
        orders: list[ImportOrder] = []
        if seq.num_computed < covered:
            orders = self.imports.order(seq, len(hits), now, self._num_fetches)
        if orders:
            seq.status = Status.IMPORTING
            self._num_fetches += len(orders)
            self._imports += orders
        else:
            seq.status = Status.RUNNING
            self._running[seq.id] = seq
        return True

    def _arrived(self) -> None:
        """Blocks came early: whoever waited for nothing else may be admitted."""
        for seq in list(self._arriving.values()):
            if not self.early.awaits(seq.class_keys(seq.num_tokens - 1)):
                del self._arriving[seq.id]
                seq.status = Status.WAITING
                self._waiting.add(seq)

    def _tell(self, seq: Sequence, now: float) -> None:
        sealed = self.exports.tell(seq.id, now)
        if sealed is not None:
            self._update.sealed.append(sealed)

    def _count_prompt(self, seq: Sequence, chunk: Chunk) -> None:
        num_prompt = min(seq.num_prompt - chunk.start, chunk.num_tokens)
        again = "recomputed" if seq.num_preemptions else "computed"
        self.counters[f"prompt_tokens_{again}"] += num_prompt
        seq.num_prompt_computed += num_prompt

    def _publish(self, seq: Sequence) -> None:
        num_full = seq.num_computed // seq.block_size
        if self.config.prefix_cache and num_full > seq.num_published:
            keys = seq.class_keys(seq.num_computed)
            for i in range(seq.num_published, num_full):
                self.pool.publish(seq.blocks[i], keys[i])
        seq.num_published = num_full

    def _append(
        self, seq: Sequence, token: int, logprobs: SampledLogprobs | None, now: float
    ) -> None:
        if not seq.prefilled:
            seq.prefilled = now
        seq.token_ids.append(token)
        num_tokens = len(seq.token_ids)
        num_generated = num_tokens - len(seq.request.prompt)
        sampling = seq.request.sampling
        finish = None
        if token in sampling.stop_token_ids:
            finish = FinishReason.STOP
        elif num_generated >= sampling.max_tokens or num_tokens >= self.config.max_model_len:
            finish = FinishReason.LENGTH
        self._update.deltas.append(
            TokenDelta(
                *seq.id,
                num_generated - 1,
                (token,),
                None if logprobs is None else (logprobs,),
                finish,
                None,
                None if seq.told_cached else seq.num_cached,
            )
        )
        seq.told_cached = True
        if finish is not None:
            self._lengths.observe(seq.num_generated)
            self._end(seq, now)
        elif seq.request.hand_off:
            self._update.exports += self.exports.close(seq)
            del self._running[seq.id]
            seq.status = Status.EXPORTING
            self._try_commit(seq, now)

    def _try_commit(self, seq: Sequence, now: float) -> None:
        handoff = self.exports.commit(seq.id, now)
        if handoff is not None:
            seq.exported = now
            self._update.handoffs.append(handoff)
            self._end(seq, now)

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            _, seq_id = heapq.heappop(self._deadlines)
            seq = self._sequences.get(seq_id)
            if seq is not None:
                stage = _STAGES.get(seq.status, "decode" if seq.prefilled else "prefill")
                error = DeadlineExceeded("the request's deadline has passed", stage=stage)
                self._fail(seq, now, error)
        self.counters["leases_expired"] += len(self._leases.expire(now))

    def _fail(self, seq: Sequence, now: float, error: ServeError) -> None:
        self._update.deltas.append(error_delta(seq.id, seq.num_generated, error))
        self._end(seq, now)

    def _end(self, seq: Sequence, now: float) -> None:
        seq.finished = now
        self._update.times.append(seq.stage_times())
        self._release(seq)

    def _release(self, seq: Sequence) -> None:
        """Take the sequence out of every table and give back its own references."""
        seq.status = Status.FINISHED
        del self._sequences[seq.id]
        self._attempts.end(seq.id)
        self._waiting.discard(seq.id)
        self._arriving.pop(seq.id, None)
        self._running.pop(seq.id, None)
        self.exports.abandon(seq.id)
        self._in_flight.drop(seq)
        self.pool.release(seq.blocks)
        seq.blocks = []
