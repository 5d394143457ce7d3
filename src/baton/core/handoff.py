"""The gateway's half of every request's life, from placement to the terminal delta.

                        ┌────────── a worker joins ──────────┐
                        ▼                                    │
    add ──────────▶ placed ──▶ BORROWING ──lent, late──▶ FIRST ──Handoff──▶ SECOND
                        │                                ▲   │                 │
                        └──────── no lender ─────────────┘   └──── finish ─────┴──▶ ENDED
    its worker is lost, stands still, or refuses because it drains: placed again, with a higher
    attempt and what was emitted; nobody can take it: WAITING for a worker to join, for `max_wait_s`
    at most; budget or deadline used up: ENDED with a typed error. `abandon` ends it from anywhere.
    What may have taken its worker along is a suspect (`blame`): its next legs are to run alone.

FIRST is a prompt to be handed off, or a whole request on one worker; blocks that are sealed in the
first case are offered to the decode worker, which may fetch them early. Handoffs are passed on when
they arrive, not when the client reads: a slow client holds no lease. Only the present leg's worker
and attempt are believed, each token once and in order; anything else is counted as stale, and what
it holds is let go. The table owns every lease: it renews while somebody may still read, and
releases a prompt's when the decode worker has shown its first token, a lender's when the prompt is
computed, and all at whatever end comes first.

No clock: `now` is any that does not go back, in seconds, the same in every call. A driver calls a
method, carries out what `take` then returns, and calls `tick` at `next_deadline`, or later.
Messages of a worker must be those of the start that joined last.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence as Seq

import msgspec

from baton.core.blame import blame, blame_without_a_word, leave
from baton.core.counters import new_request_counters
from baton.core.held_leases import HeldLeases
from baton.core.instructions import Ask, Instruction, Outcome, Release, Submit, Withdraw
from baton.core.keys import ExtendKeys, extend_chain
from baton.core.life import LEGS, Content, HandoffPolicy, Life, Phase, Timers
from baton.core.members import Members
from baton.core.offers import offers
from baton.core.router import Router, WorkerInfo
from baton.core.sequence import SequenceId
from baton.errors import DeadlineExceeded, Internal, ServeError, Unavailable, WorkerLost, from_wire
from baton.types import FinishReason, Handoff, Landed, Lend, Request, Sealed, StageTimes, TokenDelta


class RequestTable:
    """All living requests of one gateway. Pure; every call is deterministic in its arguments.

    The table alone calls the router's `join`, `leave`, `place`, `timed`, `kept`, `prefilled` and
    `finished`; so a `LoggedRouter` writes a complete log of it. extend_keys: what the keys of full
    blocks are made of (see `keys`), the same as at the workers.
    """

    def __init__(
        self, router: Router, policy: HandoffPolicy, extend_keys: ExtendKeys = extend_chain
    ) -> None:
        self.counters: Counter[str] = new_request_counters()
        self._router = router
        self._policy = policy
        self._extend_keys = extend_keys
        self._lives: dict[tuple[str, int], Life] = {}
        self._waiting: dict[tuple[str, int], Life] = {}
        self._members = Members()
        self._held = HeldLeases(policy.lease_ttl_s, self._tell)
        self._timers = Timers()
        self._outcome = Outcome()

    def __len__(self) -> int:
        """Requests that have not ended."""
        return len(self._lives)

    # Workers --------------------------------------------------------------------------------

    def join(self, info: WorkerInfo, content: Content, now: float) -> None:
        """A worker, of a new start, can take requests; those that wait for one are placed.

        All workers that are there have the same weights. Other ones end those that wait.
        """
        if info.worker_id in self._members:
            self.lose(info.worker_id, now, None)
        known = self._members.reference
        if known is None or content.fingerprint != known[0].fingerprint:  # another model's tokens
            for life in list(self._waiting.values()):
                self._fail(life, life.loss or Internal("the model has changed"), now)
        self._members.add(info, content)
        self._router.join(info)
        for life in list(self._waiting.values()):
            self._try_place(life, now)

    def drain(self, worker_id: str) -> None:
        """Nothing more is placed on this worker; its legs go on."""
        self._router.leave(worker_id)

    def lose(self, worker_id: str, now: float, suspects: Seq[SequenceId] | None = ()) -> None:
        """A worker is gone, with its leases: its legs are placed again, or end. suspects: what was
        in a step of its own that failed; None: it has gone without a word."""
        if suspects is None:
            blame_without_a_word(self._lives, worker_id)
        self._router.leave(worker_id)
        self._members.remove(worker_id)
        self._held.lose(worker_id)
        self._lose_legs(worker_id, now, suspects or ())

    def freeze(self, worker_id: str, now: float, stuck_at: Seq[SequenceId] | None) -> None:
        """A worker stands still: as if it were lost, but it will hear what to forget.

        stuck_at: what is in its step, so suspects; None: it says nothing at all.
        """
        if worker_id in self._members:
            self.counters["workers_stuck"] += stuck_at is not None
            self.counters["workers_silent"] += stuck_at is None
            self._router.leave(worker_id)
            self._members.freeze(worker_id)
            self._lose_legs(worker_id, now, stuck_at or ())

    def thaw(self, worker_id: str, now: float) -> None:
        """A worker that stood still goes on."""
        frozen = self._members.frozen(worker_id)
        if frozen is not None:
            self.counters["workers_thawed"] += 1
            self.join(*frozen, now)

    # Requests -------------------------------------------------------------------------------

    def add(self, request: Request, now: float) -> Life:
        """Place one choice of a request; its (id, choice) is new.

        Raises:
            Unavailable: no worker can take it now; nothing has changed.
        """
        life = Life(request, now)
        assert life.key not in self._lives, "ids are minted once"
        if not self._members:
            raise Unavailable("no worker is there yet", stage="queue")
        self._place(life, now)
        self._lives[life.key] = life
        return life

    def abandon(self, request_id: str, choice: int, now: float) -> None:
        """Nobody reads any more: free the work wherever it is. Idempotent; brings no delta."""
        life = self._lives.get((request_id, choice))
        if life is not None:
            self._withdraw(life)
            self._end(life, FinishReason.ABORT, now)

    def refuse(self, request_id: str, choice: int, error: ServeError, now: float) -> None:
        """An instruction of this request could not be carried out: it ends with `error`."""
        life = self._lives.get((request_id, choice))
        if life is not None:
            self._fail(life, error, now)

    # What workers say -----------------------------------------------------------------------

    def sealed(self, worker_id: str, sealed: Sealed, now: float) -> None:
        """Blocks may be read: of the prompt that is being computed, or lent to compute it."""
        life = self._lives.get((sealed.request_id, sealed.choice))
        grant_id = sealed.grant.grant_id
        placement = life.placement if life and life.attempt == sealed.attempt else None
        if life is None or placement is None:
            self.counters["stale_messages"] += 1
        elif life.phase is Phase.BORROWING and worker_id == placement.lender:
            self._held.borrow(life, worker_id, grant_id, now)
            self._begin(life, sealed, now)
            return
        elif life.phase is Phase.FIRST and worker_id == placement.prefill:
            self._held.hold(life, worker_id, grant_id, now)
            if self._policy.fetch_early:
                self._outcome.instructions += offers(self._members, life, sealed, self._extend_keys)
            return
        self._tell(Release(worker_id, grant_id))  # a lender that was late, for one

    def landed(self, landed: Landed) -> None:
        """Blocks have arrived early."""
        life = self._lives.get((landed.request_id, landed.choice))
        if life is not None and life.attempt == landed.attempt:
            life.num_landed += landed.num_blocks

    def timed(self, worker_id: str, times: StageTimes) -> Life | None:
        """A leg has ended. Returns whose it was; None if it is not the present one's."""
        self._router.timed(worker_id, times)
        return self._current(worker_id, (times.request_id, times.choice), times.attempt)

    def delivered(self, worker_id: str, delta: TokenDelta, now: float) -> None:
        """Tokens, or the end. To be called after `timed` and before `handed_off` of one report."""
        life = self._current(worker_id, (delta.request_id, delta.choice), delta.attempt)
        if life is None:
            return
        if delta.token_ids:
            if delta.first_index != len(life.tokens):
                what = f"worker {worker_id} sent token {delta.first_index}, not {len(life.tokens)}"
                self._fail(life, Internal(what, stage="decode"), now)
                return
            if not life.drew:
                self._drew_first(life, delta, now)
        if life.phase is Phase.SECOND:
            # The first delta of this leg shows that it has what it wanted to read.
            self._held.release_prompt(life)
        error = delta.error
        if error is not None and error.code == Unavailable.code:  # it drains; others may not
            self._place_again(life, from_wire(error), now)
            return
        if delta.num_cached is not None and life.tokens:
            # The hit that the client is told of is that of the leg which drew the first token.
            delta = msgspec.structs.replace(delta, num_cached=None)
        life.take(delta.token_ids)
        self._outcome.deltas.append(delta)
        if delta.finish is not None:
            life.error = error
            if error is None:
                self._remember(life, worker_id)
            self._end(life, delta.finish, now)

    def alone(self, worker_id: str, seq_id: SequenceId, begins: bool) -> None:
        """A suspect waits for leave to make steps of its own, or others go on beside it."""
        life = self._current(worker_id, seq_id[:2], seq_id[2])
        self._outcome.instructions += leave(life, worker_id, begins) if life else ()

    def handed_off(self, worker_id: str, handoff: Handoff, now: float) -> None:
        """The commit record: the decode worker takes over."""
        life = self._current(worker_id, (handoff.request_id, handoff.choice), handoff.attempt)
        placement = life and life.placement
        if not life or not placement or worker_id != placement.prefill:
            # Its request was abandoned, or lost, while the record was on its way.
            self._tell(Release(worker_id, handoff.grant.grant_id))
            return
        self._held.hold(life, worker_id, handoff.grant.grant_id, now)
        if placement.decode not in self._members:
            self._lost(life, placement.decode, now)
            return
        life.worker_id = placement.decode
        life.phase = Phase.SECOND
        self._submit(life, now, handoff=handoff)

    # Time and outcome -----------------------------------------------------------------------

    def next_deadline(self) -> float | None:
        """When `tick` has something to do even if no news comes; None: nothing is awaited."""
        at, renew_at = self._timers.next(), self._held.renew_at
        return renew_at if at is None else at if renew_at is None else min(at, renew_at)

    def tick(self, now: float) -> None:
        """Do what is due: begin without a lender, renew leases, end what waited too long."""
        for life in self._timers.due(now):
            if life.phase is Phase.BORROWING:
                self._begin_without(life, now)
            else:
                self._waited_too_long(life, now)
        self._held.renew(now)

    def take(self) -> Outcome:
        """What the calls since the last `take` brought."""
        outcome, self._outcome = self._outcome, Outcome()
        return outcome

    # Placing --------------------------------------------------------------------------------

    def _place(self, life: Life, now: float) -> None:
        request, reference = life.request, self._members.reference
        assert reference is not None, "somebody has joined"
        content, key_class = reference
        num_tokens = len(request.prompt) + len(life.tokens)
        keys = life.extend_keys(content, num_tokens, self._extend_keys)
        sought = [] if life.num_crashes else keys  # a suspect goes where there is the least work
        placement = self._router.place(*life.key, num_tokens, sought, key_class, now)
        prefill = self._members.info(placement.prefill)
        if life.tokens and prefill and num_tokens > prefill.num_frames * prefill.block_size:
            # The answer has outgrown the store it would be handed off from.
            placement = msgspec.structs.replace(placement, prefill=None, lender=None)
        self._waiting.pop(life.key, None)
        life.placed(placement, len(keys), key_class)
        lender, first = placement.lender, placement.first_lent
        if lender is None:
            self._begin(life, None, now)
            return
        life.phase = Phase.BORROWING
        wanted = tuple(keys[first:])
        ask = Lend(request.id, request.choice, life.attempt, request.tenant, first, wanted)
        self._tell(Ask(lender, ask))
        self._timers.set(life, now + self._policy.borrow_wait_s)

    def _begin_without(self, life: Life, now: float) -> None:
        self.counters["lenders_late"] += 1
        self._begin(life, None, now)

    def _begin(self, life: Life, prefix: Sealed | None, now: float) -> None:
        life.phase = Phase.FIRST
        self._submit(life, now, prefix=prefix)

    def _submit(
        self,
        life: Life,
        now: float,
        prefix: Sealed | None = None,
        handoff: Handoff | None = None,
    ) -> None:
        assert life.worker_id is not None
        self._tell(Submit(life.worker_id, life.begin_leg(now, prefix, handoff)))

    # Losing ---------------------------------------------------------------------------------

    def _lose_legs(self, worker_id: str, now: float, suspects: Seq[SequenceId]) -> None:
        blame(self._lives, suspects)
        for life in list(self._lives.values()):
            if life.worker_id == worker_id:
                self._lost(life, worker_id, now)
            elif life.borrows_from(worker_id):
                self._begin_without(life, now)

    def _lost(self, life: Life, worker_id: str, now: float) -> None:
        stage = "decode" if life.tokens else "prefill"
        self._place_again(life, WorkerLost(f"worker {worker_id} is gone", stage=stage), now)

    def _place_again(self, life: Life, loss: ServeError, now: float) -> None:
        """The attempt is given up: whoever has it hears so, and nobody believes it any more."""
        policy = self._policy
        if life.attempt >= policy.max_retries or life.num_crashes > policy.max_crashes:
            self.counters["given_up"] += 1
            self._fail(life, loss, now)
            return
        self.counters["placed_again"] += 1
        self._withdraw(life)
        self._held.release_all(life)
        life.attempt += 1
        life.phase = Phase.WAITING
        life.worker_id = None
        life.loss = loss
        self._waiting[life.key] = life
        self._try_place(life, now)
        if life.phase is Phase.WAITING:
            until = now + policy.max_wait_s
            self._timers.set(life, until if life.deadline is None else min(until, life.deadline))

    def _try_place(self, life: Life, now: float) -> None:
        with contextlib.suppress(Unavailable):
            self._place(life, now)

    def _waited_too_long(self, life: Life, now: float) -> None:
        loss = life.loss
        assert loss is not None
        self.counters["given_up"] += 1
        if life.deadline is not None and now >= life.deadline:
            loss = DeadlineExceeded("the request's deadline has passed", stage="queue")
        self._fail(life, loss, now)

    # Ending ---------------------------------------------------------------------------------

    def _fail(self, life: Life, error: ServeError, now: float) -> None:
        self._withdraw(life)
        life.error = error.to_wire()
        position = (*life.key, life.attempt, len(life.tokens))
        end = TokenDelta(*position, (), finish=FinishReason.ERROR, error=life.error)
        self._outcome.deltas.append(end)
        self._end(life, FinishReason.ERROR, now)

    def _withdraw(self, life: Life) -> None:
        """Stop the present leg, if it was begun and its worker is there."""
        if life.phase in LEGS and life.worker_id and self._members.hears(life.worker_id):
            self._tell(Withdraw(life.worker_id, *life.key, life.attempt))

    def _end(self, life: Life, finish: FinishReason, now: float) -> None:
        self._held.release_all(life)
        life.end(finish, now)
        self._waiting.pop(life.key, None)
        del self._lives[life.key]
        self._router.finished(*life.key, now)

    def _remember(self, life: Life, worker_id: str) -> None:
        """What the last worker has computed beyond the placed keys may serve the next turn."""
        info = self._members.info(worker_id)
        if info is None or not info.keeps_blocks or info.key_class != life.key_class:
            return  # of another class, it has other keys for these tokens
        num_tokens = len(life.request.prompt) + len(life.tokens) - 1  # the last one has no KV
        keys = life.extend_keys(self._members.content(worker_id), num_tokens, self._extend_keys)
        self._router.kept(worker_id, keys[life.num_placed_keys if life.took_over else 0 :])

    # Inside ---------------------------------------------------------------------------------

    def _drew_first(self, life: Life, delta: TokenDelta, now: float) -> None:
        """The present attempt has computed its prompt."""
        self._held.return_loan(life)
        self._router.prefilled(*life.key, now)
        life.drew_first(delta.num_cached or 0, now)

    def _tell(self, instruction: Instruction) -> None:
        self._outcome.instructions.append(instruction)

    def _current(self, worker_id: str, key: tuple[str, int], attempt: int) -> Life | None:
        """The life that this worker's message is about, if it is still its to serve."""
        life = self._lives.get(key)
        if (
            life is None
            or life.worker_id != worker_id
            or life.attempt != attempt
            or life.phase not in LEGS
        ):
            self.counters["stale_messages"] += 1
            return None
        return life
