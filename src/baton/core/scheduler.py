"""What a worker does with the requests that it is given: its policy, in one object.

One rule: `num_computed` catches up with `num_tokens`. Requests, and news of copies and fetches,
come in and change the books; a step is planned from them and its outcome taken into them; what the
outside is to be told of is collected by `take`. Each part has a module:

    books       whatever is known of the sequences and the blocks
    admission   what a prompt needs to begin       prompt_order   whose turn it is
    next_step   what the next step computes        in_flight      steps whose outcome is not known
    outcome     what a step has brought            advance        many steps at once
    alone       who has steps to itself            fetches        how blocks come from elsewhere
                                                   exports        how they leave

`Scheduler` owns them all. Methods take the time as an argument.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from baton.core import advance, outcome
from baton.core.books import Books
from baton.core.deadlines import too_late
from baton.core.in_flight import MAX_DEPTH
from baton.core.keys import ExtendKeys, extend_chain, root_key
from baton.core.lease import LeaseTable
from baton.core.limits import SchedulerConfig
from baton.core.next_step import NextStep
from baton.core.plan import StepOutput, StepPlan, Update, error_delta
from baton.core.sequence import Sequence, SequenceId, Status
from baton.core.store_index import StoreIndex
from baton.errors import ServeError, TransferFailed, Unavailable
from baton.types import Lend, Request, Sealed, WorkerLoad


class Scheduler:
    """Policy of one worker. Every call is deterministic in its arguments.

    extend_keys: what the keys of full blocks are made of (see `keys`). tells_each: every token is
    told when it was drawn; else the first one is, and the others with the last, or when
    `tell_rest` is called, for who counts steps can tell when they were drawn. A sequence that
    missed a step, preempted or not, has each told from then on. `books` may be read by the tests;
    everyone else gets along with what stands in it and is named here too.
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
        self.books = books = Books(config, leases, index)
        self.config = config
        self.counters = books.counters
        self.pool = books.pool
        self.exports = books.exports
        self.fetches = books.fetches
        self.admission = books.admission
        self._next_step = NextStep(books)
        self._leases = leases
        self._extend_keys = extend_keys
        self._tells_each = tells_each
        self._draining = False

    # What comes in ---------------------------------------------------------------------------

    def add(self, request: Request, now: float) -> None:
        """Accept a request, or end it at once with a typed error."""
        seq_id = (request.id, request.choice, request.attempt)
        books, attempts = self.books, self.books.attempts
        known = attempts.latest(*seq_id[:2])
        if known is not None:
            if known[2] >= request.attempt:
                return  # a repeat, or a late message of an attempt that was given up
            self.abort(known)
        attempts.begin(seq_id)
        try:
            if self._draining:
                raise Unavailable("this worker is draining", stage="queue")
            self.config.validate(request)
        except ServeError as error:
            self.counters["refused"] += 1
            books.update.deltas.append(error_delta(seq_id, len(request.emitted), error))
            attempts.end(seq_id)
            return
        root = root_key(self.config.fingerprint, self.config.numerics, request.salt)
        size = self.config.kv_format.block_size
        seq = Sequence(request, root, size, now, self._extend_keys)
        seq.tells_each = self._tells_each
        seq.max_tokens = min(seq.max_tokens, self.config.max_model_len)
        books.enter(seq)

    def abort(self, seq_id: SequenceId) -> None:
        """Forget a sequence. Blocks in transfer are freed when the transfer is acknowledged."""
        seq = self.books.sequences.get(seq_id)
        if seq is not None:
            self.counters["aborts"] += 1
            self.books.release(seq)

    def proceed(self, seq_id: SequenceId) -> None:
        """A suspect has leave to make its first steps."""
        self.books.suspects.give_leave(seq_id)

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
                self.books.fail(seq, now, error)
            elif seq.status is Status.EXPORTING:
                outcome.try_commit(self.books, seq, now)
            self.exports.note(seq.id, now)

    def offer(self, sealed: Sealed, now: float) -> None:
        """Blocks that this worker may soon want can be had; it fetches them if there is room."""
        if self.config.prefix_cache and not self._draining:
            spare = self.pool.num_free - self.admission.promised(self.books.running.values())
            self.fetches.offer(sealed, spare, now)

    def lend(self, ask: Lend, now: float) -> None:
        """Open blocks of the store to a reader; the answer is among what was sealed."""
        lent = self.exports.lend(ask, now)
        self.counters["lent_blocks"] += len(lent.keys)
        self.books.update.sealed.append(lent)

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
            self.books.update.landed.append(ended.landed)
        for seq in ended.arrived:
            self.books.wait(seq)
        if ended.importer is not None:
            outcome.take_over(self.books, ended.importer, ended.num_verified, now)

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
        assert len(self.books.in_flight) < MAX_DEPTH, "too many steps in flight"
        self._expire(now)
        return self._next_step.plan(now)

    def update(self, plan: StepPlan, output: StepOutput, now: float) -> None:
        """Take in what a step computed. Steps end in the order in which they were planned."""
        outcome.take_in(self.books, plan, output, now)

    def steady_steps(self, plan: StepPlan) -> int:
        """How many updates in a row, that of `plan` first, bring one token a sequence and no more.

        1: nothing is foreseen. See `advance`, which tells what news and deadlines do to it.
        """
        return advance.steady_steps(self.books, self._next_step, plan)

    def advance(
        self, plan: StepPlan, token_ids: Seq[Seq[int]], nows: Seq[float]
    ) -> StepPlan | None:
        """`len(nows)` updates at these times, the first of `plan`, with a `schedule` in between.

        At most `steady_steps` of them. token_ids: for each chunk, a token an update. Returns the
        plan that is in flight then, if a step was planned ahead.
        """
        return advance.advance(self.books, self._next_step, plan, token_ids, nows)

    def take(self) -> Update:
        """What happened since the last call: deltas, copies to make, commit records, times."""
        update, self.books.update = self.books.update, Update()
        update.sealed += self.exports.take_news()
        return update

    def tell_rest(self) -> None:
        """Tell the tokens that were kept back (see `tells_each`)."""
        outcome.tell_rest(self.books)

    # What others ask -------------------------------------------------------------------------

    @property
    def num_sequences(self) -> int:
        """Sequences that have not ended."""
        return len(self.books.sequences)

    @property
    def num_transfers(self) -> int:
        """Copies and fetches that have not been acknowledged."""
        return self.exports.num_copying + len(self.fetches)

    def is_drained(self) -> bool:
        """Nothing is accepted, nothing is left, and nobody may still read from the store."""
        left = self.num_sequences or self.num_transfers or len(self._leases)
        return self._draining and not left and not self.books.in_flight

    def next_deadline(self) -> float | None:
        """When `schedule` has something to do even if no news comes."""
        deadlines, fetches = self.books.deadlines, self.fetches
        times = (deadlines.next(), self._leases.next_expiry(), fetches.next_limit())
        return min((at for at in times if at is not None), default=None)

    def load(self) -> WorkerLoad:
        """The part of the load that the scheduler knows."""
        return self.books.load()

    def check(self) -> None:
        """Verify that pool and sequences agree; used when idle and by the tests.

        Raises:
            AssertionError: naming what does not add up.
        """
        self.books.check()

    # Inside ----------------------------------------------------------------------------------

    def _expire(self, now: float) -> None:
        books = self.books
        for seq_id in books.deadlines.due(now):
            seq = books.sequences.get(seq_id)
            if seq is not None:
                books.fail(seq, now, too_late(seq))
        self.counters["leases_expired"] += len(self._leases.expire(now))
        outcome.give_up_fetches(books, now)
