"""What runs in the next step, and what its outcome means.

One rule: `num_computed` catches up with `num_tokens`. A step has a token budget. Sequences that
need one token go first, so a prompt never starves a running answer. Prompts share what is left,
in the order of `prompt_order`: those already begun, and new ones, which are admitted in their turn
while blocks last. When blocks run out the newest sequence is preempted: it keeps its tokens, gives
back its blocks and comes back through admission, where the prefix cache may spare it most of the
work. The oldest one is never preempted by another, so something always progresses. What changes
when a step is planned while another one runs is told in `in_flight`, who has steps to itself in
`alone`, what a prompt needs to be admitted in `admission`, how blocks come from elsewhere in
`fetches`.

`Scheduler` owns the sequences, the block pool, the exports and the fetches. Methods take the
time as an argument; what they bring for the outside is collected by `take`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq

from baton.core import advance, alone, books
from baton.core.admission import Admission
from baton.core.attempts import AttemptMemory
from baton.core.block_pool import BlockPool
from baton.core.counters import new_counters
from baton.core.deadlines import Deadlines, too_late
from baton.core.exports import ExportTable
from baton.core.fetches import Fetches
from baton.core.in_flight import MAX_DEPTH, InFlight, may_run_ahead
from baton.core.keys import ExtendKeys, extend_chain, root_key
from baton.core.lease import LeaseTable
from baton.core.limits import SchedulerConfig
from baton.core.outcome import take_in, take_over, tell_rest, try_commit
from baton.core.plan import Chunk, StepOutput, StepPlan, Update, error_delta
from baton.core.prompt_order import PromptQueue, rank
from baton.core.sequence import Sequence, SequenceId, Status
from baton.core.store_index import StoreIndex
from baton.errors import ServeError, TransferFailed, Unavailable
from baton.types import Lend, Request, Sealed, WorkerLoad

_RUNNING = Status.RUNNING  # read for every sequence in every step


class Scheduler:
    """Policy of one worker. Every call is deterministic in its arguments.

    extend_keys: what the keys of full blocks are made of (see `keys`). tells_each: every token is
    told when it was drawn; else the first one is, and the others with the last, or when
    `tell_rest` is called, for who counts steps can tell when they were drawn. A sequence that
    missed a step, preempted or not, has each told from then on.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        leases: LeaseTable,
        index: StoreIndex,
        extend_keys: ExtendKeys = extend_chain,
        *,
        tells_each: bool = True,
    ) -> None:
        self.config = config
        self.counters: Counter[str] = new_counters()
        self.pool = BlockPool(config.num_blocks)
        self.exports = ExportTable(config, self.pool, index, leases)
        self.fetches = Fetches(config, self.pool, index, self.counters)
        self.admission = Admission(config, self.pool, self.exports, self.counters)
        self._extend_keys = extend_keys
        self._tells_each = tells_each
        self._leases = leases
        self._in_flight = InFlight(self.pool)
        # A decode takes one token of the budget, so no more of them may run than it has.
        self._max_running = min(config.max_num_seqs, config.max_num_batched_tokens)
        self._sequences: dict[SequenceId, Sequence] = {}
        self._attempts = AttemptMemory()
        self._waiting = PromptQueue()
        self._running: dict[SequenceId, Sequence] = {}
        self._suspects: dict[SequenceId, Sequence] = {}  # see `alone`
        self._chunks: dict[SequenceId, Chunk] = {}
        self._budget = 0
        self._deadlines = Deadlines()
        self._num_added = 0
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
        size = self.config.kv_format.block_size
        seq = Sequence(request, root, size, now, self._extend_keys)
        seq.tells_each = self._tells_each
        self._num_added += 1
        seq.order = self._num_added
        seq.max_tokens = min(seq.max_tokens, self.config.max_model_len)
        seq.admitted_before = self.admission.num_admitted_tokens
        self._sequences[seq.id] = seq
        if request.alone:
            self._suspects[seq.id] = seq
        if not self.fetches.detain(seq):
            self._waiting.add(seq)
        self._deadlines.add(seq)

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
                try_commit(self, seq, now)
            self.exports.note(seq.id, now)

    def offer(self, sealed: Sealed, now: float) -> None:
        """Blocks that this worker may soon want can be had; it fetches them if there is room."""
        if self.config.prefix_cache and not self._draining:
            spare = self.pool.num_free - self.admission.promised(self._running.values())
            self.fetches.offer(sealed, spare, now)

    def lend(self, ask: Lend, now: float) -> None:
        """Open blocks of the store to a reader; the answer is among what was sealed."""
        lent = self.exports.lend(ask, now)
        self.counters["lent_blocks"] += len(lent.keys)
        self._update.sealed.append(lent)

    def link(self, source: str) -> None:
        """Blocks of `source` come over a network; until this is said, through shared memory."""
        self.fetches.links.reached_by_wire(source)

    def imported(
        self, number: int, results: tuple[str, ...], now: float, elapsed_s: float = 0.0
    ) -> None:
        """A fetch ended; one word a wanted block, `ok` or the reason why it may not be used.

        elapsed_s: how long it took, without the time in which it waited for others.
        """
        ended = self.fetches.end(number, results, elapsed_s)
        if ended.landed is not None:
            self._update.landed.append(ended.landed)
        for seq in ended.arrived:
            seq.status = Status.WAITING
            self._waiting.add(seq)
        if ended.importer is not None:
            take_over(self, ended.importer, ended.num_verified, now)

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
        self._chunks, self._budget = {}, self.config.max_num_batched_tokens
        num_preempted = self.counters["preemptions"]
        if self._suspects and alone.plan(self):
            for seq in self._running.values():
                seq.tells_each = True
            return self._planned()
        ahead, size = len(self._in_flight), self.config.kv_format.block_size
        prompts: list[Sequence] = []
        for seq in list(self._running.values()):
            start, expected = seq.num_scheduled, seq.num_expected
            if expected - start != 1:
                prompts.append(seq)
            elif ahead and not self._is_ready(seq):
                seq.tells_each = True  # it misses a step
            elif seq.status is _RUNNING and (expected <= len(seq.blocks) * size or self._grow(seq)):
                self._chunks[seq.id] = Chunk(seq, start, 1, True)
                self._budget -= 1  # it lasts for all that may run
                seq.num_scheduled = expected
                seq.num_expected = expected + 1
            else:
                seq.tells_each = True
        if prompts or self._waiting:
            # Whoever was preempted in this step must not take the blocks back in the same step.
            admits = self.counters["preemptions"] == num_preempted
            self._plan_prompts(prompts, admits, now)
        if self._suspects and not self._chunks:
            alone.plan(self)  # it has just been admitted
        return self._planned()

    def update(self, plan: StepPlan, output: StepOutput, now: float) -> None:
        """Take in what a step computed. Steps end in the order in which they were planned."""
        take_in(self, plan, output, now)

    def steady_steps(self, plan: StepPlan) -> int:
        """How many updates in a row, that of `plan` first, bring one token a sequence and no more.

        1: nothing is foreseen. See `advance`, which tells what news and deadlines do to it.
        """
        return advance.steady_steps(self, plan)

    def advance(
        self, plan: StepPlan, token_ids: Seq[Seq[int]], nows: Seq[float]
    ) -> StepPlan | None:
        """`len(nows)` updates at these times, the first of `plan`, with a `schedule` in between.

        At most `steady_steps` of them. token_ids: for each chunk, a token an update. Returns the
        plan that is in flight then, if a step was planned ahead.
        """
        return advance.advance(self, plan, token_ids, nows)

    def take(self) -> Update:
        """What happened since the last call: deltas, copies to make, commit records, times."""
        update, self._update = self._update, Update()
        update.sealed += self.exports.take_news()
        return update

    def tell_rest(self) -> None:
        """Tell the tokens that were kept back (see `tells_each`)."""
        tell_rest(self)

    # What others ask -------------------------------------------------------------------------

    @property
    def num_sequences(self) -> int:
        """Sequences that have not ended."""
        return len(self._sequences)

    @property
    def num_transfers(self) -> int:
        """Copies and fetches that have not been acknowledged."""
        return self.exports.num_copying + len(self.fetches)

    def is_drained(self) -> bool:
        """Nothing is accepted, nothing is left, and nobody may still read from the store."""
        left = self._sequences or self.num_transfers or len(self._leases) or self._in_flight
        return self._draining and not left

    def next_deadline(self) -> float | None:
        """When `schedule` has something to do even if no news comes."""
        times = (self._deadlines.next(), self._leases.next_expiry())
        return min((at for at in times if at is not None), default=None)

    def load(self) -> WorkerLoad:
        """The part of the load that the scheduler knows."""
        return books.load(self)

    def check(self) -> None:
        """Verify that pool and sequences agree; used when idle and by the tests.

        Raises:
            AssertionError: naming what does not add up.
        """
        books.check(self)

    # Inside ----------------------------------------------------------------------------------

    def _planned(self) -> StepPlan:
        if self._chunks:
            self._in_flight.begin(self._step, self._chunks)
        return StepPlan(self._step, tuple(self._chunks.values()), self.fetches.start())

    def _num_active(self) -> int:
        return len(self._running) + len(self.fetches.imports)

    def _plan_prompts(self, prompts: list[Sequence], admits: bool, now: float) -> None:
        """Share the rest of the budget among prompts, and admit those whose turn it is."""
        promised = 0
        if admits and self._waiting and self._num_active() < self._max_running:
            promised = self.admission.promised(self._running.values())
        begun = [seq for seq in prompts if seq.status is _RUNNING]
        begun.sort(key=rank, reverse=True)
        while self._budget > 0:
            admits = admits and bool(self._waiting) and self._num_active() < self._max_running
            if admits and not (begun and rank(begun[-1]) < rank(self._waiting.head)):
                seq = self._waiting.head
                admits = self._admit(seq, promised, now)
                if admits:
                    promised += self.admission.growth(seq)
                    if seq.status is _RUNNING and seq.id not in self._suspects:
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
        """Make room for all tokens of `seq`, which has none for the last of them.

        False if there is none in this step: `seq` itself was preempted for it, or the blocks of
        one that was preempted, or that ended, are still in use by the step in flight.
        """
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
        seq.tells_each = True
        self._in_flight.drop(seq)
        self.pool.release(seq.blocks)
        seq.reset()
        del self._running[seq.id]
        seq.status = Status.WAITING
        self._waiting.add(seq)

    def _admit(self, seq: Sequence, promised: int, now: float) -> bool:
        """Move the head of the queue to running or importing, if there is room for it.

        `promised` blocks are free now and will be wanted by those that run already.
        """
        if self._suspects and not alone.may_enter(self, seq):
            return False
        if not self.admission.admit(seq, promised, now, alone=not self._num_active()):
            return False
        self._waiting.discard(seq.id)
        if self.fetches.order(seq, now):
            seq.status = Status.IMPORTING
        else:
            seq.status = Status.RUNNING
            self._running[seq.id] = seq
        return True

    def _expire(self, now: float) -> None:
        for seq_id in self._deadlines.due(now):
            seq = self._sequences.get(seq_id)
            if seq is not None:
                self._fail(seq, now, too_late(seq))
        self.counters["leases_expired"] += len(self._leases.expire(now))

    def _fail(self, seq: Sequence, now: float, error: ServeError) -> None:
        untold = tuple(seq.token_ids[seq.num_told :])
        first_index = seq.num_told - seq.num_prompt
        self._update.deltas.append(error_delta(seq.id, first_index, error, untold))
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
        self._suspects.pop(seq.id, None)
        self.fetches.forget(seq.id)
        self._running.pop(seq.id, None)
        self.exports.abandon(seq.id)
        self._in_flight.drop(seq)
        self.pool.release(seq.blocks)
        seq.blocks = []
