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
and the present attempt are believed, each token once and in order; anything else is counted as
stale, and what it holds is let go.

The table owns every lease: it renews while somebody may still read, and releases a prompt's when
the decode worker has shown its first token, a lender's when the prompt is computed, and all at
whatever end comes first.

`RequestTable` takes in what happens. What it knows of the requests stands in `lives`; where their
legs run is decided in `placing`.

No clock, no sockets: `now` is any clock that does not go back, in seconds, the same in every call.
A driver calls a method, carries out what `take` then returns, and calls `tick` at
`next_deadline`, or later. Messages of a worker must be those of the start that joined last.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import msgspec

from baton.core.blame import blame_without_a_word, leave
from baton.core.instructions import Outcome, Release
from baton.core.keys import ExtendKeys, extend_chain
from baton.core.life import Content, HandoffPolicy, Life, Phase
from baton.core.lives import Lives
from baton.core.offers import offers
from baton.core.placing import Placing
from baton.core.router import Router, WorkerInfo
from baton.core.sequence import SequenceId
from baton.errors import Internal, ServeError, Unavailable, from_wire
from baton.types import FinishReason, Handoff, Landed, Request, Sealed, StageTimes, TokenDelta


class RequestTable:
    """All living requests of one gateway. Pure; every call is deterministic in its arguments.

    Nobody else calls the router's `join`, `leave`, `place`, `timed`, `kept`, `prefilled` and
    `finished`; so a `LoggedRouter` writes a complete log of it. extend_keys: what the keys of full
    blocks are made of (see `keys`), the same as at the workers. `lives` may be read by the tests.
    """

    def __init__(
        self, router: Router, policy: HandoffPolicy, extend_keys: ExtendKeys = extend_chain
    ) -> None:
        self.lives = Lives(router, policy.lease_ttl_s)
        self.counters = self.lives.counters
        self._router = router
        self._policy = policy
        self._extend_keys = extend_keys
        self._placing = Placing(self.lives, policy, extend_keys)

    def __len__(self) -> int:
        """Requests that have not ended."""
        return len(self.lives.living)

    # Workers --------------------------------------------------------------------------------

    def join(self, info: WorkerInfo, content: Content, now: float) -> None:
        """A worker, of a new start, can take requests; those that wait for one are placed.

        All workers that are there have the same weights. Other ones end those that wait.
        """
        members, waiting = self.lives.members, self.lives.waiting
        if info.worker_id in members:
            self.lose(info.worker_id, now, None)
        known = members.reference
        if known is None or content.fingerprint != known[0].fingerprint:
            # What was emitted is another model's.
            for life in list(waiting.values()):
                self.lives.fail(life, life.loss or Internal("the model has changed"), now)
        members.add(info, content)
        self._router.join(info)
        self._placing.place_waiting(now)

    def drain(self, worker_id: str) -> None:
        """Nothing more is placed on this worker; its legs go on."""
        self._router.leave(worker_id)

    def lose(self, worker_id: str, now: float, suspects: Seq[SequenceId] | None = ()) -> None:
        """A worker is gone, and its leases with it: its legs are placed again, or end.

        suspects: what was in a step of its own that failed; None: it has gone without a word.
        """
        if suspects is None:
            blame_without_a_word(self.lives.living, worker_id)
        self._router.leave(worker_id)
        self.lives.members.remove(worker_id)
        self.lives.held.lose(worker_id)
        self._placing.lose_legs(worker_id, now, suspects or ())

    def freeze(self, worker_id: str, now: float, stuck_at: Seq[SequenceId] | None) -> None:
        """A worker stands still: as if it were lost, but it will hear what to forget.

        stuck_at: what is in its step, so suspects; None: it says nothing at all.
        """
        if worker_id in self.lives.members:
            self.counters["workers_stuck"] += stuck_at is not None
            self.counters["workers_silent"] += stuck_at is None
            self._router.leave(worker_id)
            self.lives.members.freeze(worker_id)
            self._placing.lose_legs(worker_id, now, stuck_at or ())

    def thaw(self, worker_id: str, now: float) -> None:
        """A worker that stood still goes on."""
        frozen = self.lives.members.frozen(worker_id)
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
        assert life.key not in self.lives.living, "ids are minted once"
        if not self.lives.members:
            raise Unavailable("no worker is there yet", stage="queue")
        self._placing.place(life, now)
        self.lives.living[life.key] = life
        return life

    def abandon(self, request_id: str, choice: int, now: float) -> None:
        """Nobody reads any more: free the work wherever it is. Idempotent; brings no delta."""
        life = self.lives.living.get((request_id, choice))
        if life is not None:
            self.lives.withdraw(life)
            self.lives.end(life, FinishReason.ABORT, now)

    def refuse(self, request_id: str, choice: int, error: ServeError, now: float) -> None:
        """An instruction of this request could not be carried out: it ends with `error`."""
        life = self.lives.living.get((request_id, choice))
        if life is not None:
            self.lives.fail(life, error, now)

    # What workers say -----------------------------------------------------------------------

    def sealed(self, worker_id: str, sealed: Sealed, now: float) -> None:
        """Blocks may be read: of the prompt that is being computed, or lent to compute it."""
        lives = self.lives
        life = lives.living.get((sealed.request_id, sealed.choice))
        grant_id = sealed.grant.grant_id
        placement = life.placement if life and life.attempt == sealed.attempt else None
        if life is None or placement is None:
            self.counters["stale_messages"] += 1
        elif life.phase is Phase.BORROWING and worker_id == placement.lender:
            lives.held.borrow(life, worker_id, grant_id, now)
            self._placing.begin(life, sealed, now)
            return
        elif life.phase is Phase.FIRST and worker_id == placement.prefill:
            lives.held.hold(life, worker_id, grant_id, now)
            if self._policy.fetch_early:
                for offer in offers(lives.members, life, sealed, self._extend_keys):
                    lives.tell(offer)
            return
        lives.tell(Release(worker_id, grant_id))  # a lender that was late, for one

    def landed(self, landed: Landed) -> None:
        """Blocks have arrived early."""
        life = self.lives.living.get((landed.request_id, landed.choice))
        if life is not None and life.attempt == landed.attempt:
            life.num_landed += landed.num_blocks

    def timed(self, worker_id: str, times: StageTimes) -> Life | None:
        """A leg has ended. Returns whose it was; None if it is not the present one's."""
        self._router.timed(worker_id, times)
        return self.lives.current(worker_id, (times.request_id, times.choice), times.attempt)

    def delivered(self, worker_id: str, delta: TokenDelta, now: float) -> None:
        """Tokens, or the end. To be called after `timed` and before `handed_off` of one report."""
        lives = self.lives
        life = lives.current(worker_id, (delta.request_id, delta.choice), delta.attempt)
        if life is None:
            return
        if delta.token_ids:
            if delta.first_index != len(life.tokens):
                count = len(life.tokens)
                what = f"worker {worker_id} sent token {delta.first_index} after {count}"
                lives.fail(life, Internal(what, stage="decode"), now)
                return
            if not life.drew:
                self._drew_first(life, delta, now)
        if life.phase is Phase.SECOND:
            # The first delta of this leg shows that it has what it wanted to read.
            lives.held.release_prompt(life)
        error = delta.error
        if error is not None and error.code == Unavailable.code:  # it drains; others may not
            self._placing.place_again(life, from_wire(error), now)
            return
        if delta.num_cached is not None and life.tokens:
            # The hit that the client is told of is that of the leg which drew the first token.
            delta = msgspec.structs.replace(delta, num_cached=None)
        life.take(delta.token_ids)
        lives.outcome.deltas.append(delta)
        if delta.finish is not None:
            life.error = error
            if error is None:
                self._remember(life, worker_id)
            lives.end(life, delta.finish, now)

    def alone(self, worker_id: str, seq_id: SequenceId, begins: bool) -> None:
        """A suspect waits for leave to make steps of its own, or others go on beside it."""
        life = self.lives.current(worker_id, seq_id[:2], seq_id[2])
        if life is not None:
            for proceed in leave(life, worker_id, begins):
                self.lives.tell(proceed)

    def handed_off(self, worker_id: str, handoff: Handoff, now: float) -> None:
        """The commit record: the decode worker takes over."""
        lives = self.lives
        life = lives.current(worker_id, (handoff.request_id, handoff.choice), handoff.attempt)
        placement = life and life.placement
        if not life or not placement or worker_id != placement.prefill:
            # Its request was abandoned, or lost, while the record was on its way.
            lives.tell(Release(worker_id, handoff.grant.grant_id))
            return
        lives.held.hold(life, worker_id, handoff.grant.grant_id, now)
        self._placing.hand_over(life, handoff, now)

    # Time and outcome -----------------------------------------------------------------------

    def next_deadline(self) -> float | None:
        """When `tick` has something to do even if no news comes; None: nothing is awaited."""
        at, renew_at = self.lives.timers.next(), self.lives.held.renew_at
        return renew_at if at is None else at if renew_at is None else min(at, renew_at)

    def tick(self, now: float) -> None:
        """Do what is due: begin without a lender, renew leases, end what waited too long."""
        self._placing.tick(now)
        self.lives.held.renew(now)

    def take(self) -> Outcome:
        """What the calls since the last `take` brought."""
        outcome, self.lives.outcome = self.lives.outcome, Outcome()
        return outcome

    # Inside ---------------------------------------------------------------------------------

    def _drew_first(self, life: Life, delta: TokenDelta, now: float) -> None:
        """The present attempt has computed its prompt."""
        self.lives.held.return_loan(life)
        self._router.prefilled(*life.key, now)
        life.drew_first(delta.num_cached or 0, now)

    def _remember(self, life: Life, worker_id: str) -> None:
        """What the last worker has computed beyond the placed keys may serve the next turn."""
        members = self.lives.members
        info = members.info(worker_id)
        if info is None or not info.keeps_blocks or info.key_class != life.key_class:
            return  # of another class, it has other keys for these tokens
        num_tokens = len(life.request.prompt) + len(life.tokens) - 1  # the last one has no KV
        keys = life.extend_keys(members.content(worker_id), num_tokens, self._extend_keys)
        self._router.kept(worker_id, keys[life.num_placed_keys if life.took_over else 0 :])
