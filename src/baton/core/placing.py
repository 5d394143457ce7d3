"""Where the legs of a request run: its first placement, the way from leg to leg, and again.

The router chooses workers; here is what follows from the choice, what a request does while nobody
can take it, and when it is given up. `handoff` draws the phases.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence as Seq

import msgspec

from baton.core.blame import blame
from baton.core.instructions import Ask, Submit
from baton.core.keys import ExtendKeys
from baton.core.life import HandoffPolicy, Life, Phase
from baton.core.lives import Lives
from baton.core.sequence import SequenceId
from baton.errors import DeadlineExceeded, ServeError, Unavailable, WorkerLost
from baton.types import Handoff, Lend, Sealed


class Placing:
    """Gives the lives of one gateway to its workers; pure, owned by the `RequestTable`."""

    def __init__(self, lives: Lives, policy: HandoffPolicy, extend_keys: ExtendKeys) -> None:
        self._lives = lives
        self._policy = policy
        self._extend_keys = extend_keys

    # From leg to leg --------------------------------------------------------------------------

    def place(self, life: Life, now: float) -> None:
        """An attempt begins, with its first leg or with a lender's answer.

        Raises:
            Unavailable: no worker can take it now; nothing has changed.
        """
        lives, request, reference = self._lives, life.request, self._lives.members.reference
        assert reference is not None, "somebody has joined"
        content, key_class = reference
        num_tokens = len(request.prompt) + len(life.tokens)
        keys = life.extend_keys(content, num_tokens, self._extend_keys)
        sought = [] if life.num_crashes else keys  # a suspect goes where there is the least work
        placement = lives.router.place(*life.key, num_tokens, sought, key_class, now)
        prefill = lives.members.info(placement.prefill)
        if life.tokens and prefill and num_tokens > prefill.num_frames * prefill.block_size:
            # The answer has outgrown the store it would be handed off from.
            placement = msgspec.structs.replace(placement, prefill=None, lender=None)
        lives.waiting.pop(life.key, None)
        life.placed(placement, len(keys), key_class)
        lender, first = placement.lender, placement.first_lent
        if lender is None:
            self.begin(life, None, now)
            return
        life.phase = Phase.BORROWING
        wanted = tuple(keys[first:])
        ask = Lend(request.id, request.choice, life.attempt, request.tenant, first, wanted)
        lives.tell(Ask(lender, ask))
        lives.timers.set(life, now + self._policy.borrow_wait_s)

    def begin(self, life: Life, prefix: Sealed | None, now: float) -> None:
        """The first leg; `prefix` is what a lender has of the prompt."""
        life.phase = Phase.FIRST
        self._submit(life, now, prefix=prefix)

    def begin_without(self, life: Life, now: float) -> None:
        """The first leg; the lender has not answered, or is gone."""
        self._lives.counters["lenders_late"] += 1
        self.begin(life, None, now)

    def hand_over(self, life: Life, handoff: Handoff, now: float) -> None:
        """The second leg, on the decode worker, if that is there."""
        assert life.placement is not None, "it has had a first leg"
        decode = life.placement.decode
        if decode not in self._lives.members:
            self.lost(life, decode, now)
            return
        life.worker_id = decode
        life.phase = Phase.SECOND
        self._submit(life, now, handoff=handoff)

    def _submit(
        self,
        life: Life,
        now: float,
        prefix: Sealed | None = None,
        handoff: Handoff | None = None,
    ) -> None:
        assert life.worker_id is not None
        self._lives.tell(Submit(life.worker_id, life.begin_leg(now, prefix, handoff)))

    # Again ------------------------------------------------------------------------------------

    def lose_legs(self, worker_id: str, now: float, suspects: Seq[SequenceId]) -> None:
        """What this worker had, or was to lend, must come from elsewhere."""
        living = self._lives.living
        blame(living, suspects)
        for life in list(living.values()):
            if life.worker_id == worker_id:
                self.lost(life, worker_id, now)
            elif life.borrows_from(worker_id):
                self.begin_without(life, now)

    def lost(self, life: Life, worker_id: str, now: float) -> None:
        """The worker of its present or next leg is gone."""
        stage = "decode" if life.tokens else "prefill"
        self.place_again(life, WorkerLost(f"worker {worker_id} is gone", stage=stage), now)

    def place_again(self, life: Life, loss: ServeError, now: float) -> None:
        """The attempt is given up: whoever has it hears so, and nobody believes it any more."""
        lives, policy = self._lives, self._policy
        if life.attempt >= policy.max_retries or life.num_crashes > policy.max_crashes:
            lives.counters["given_up"] += 1
            lives.fail(life, loss, now)
            return
        lives.counters["placed_again"] += 1
        lives.withdraw(life)
        lives.held.release_all(life)
        life.attempt += 1
        life.phase = Phase.WAITING
        life.worker_id = None
        life.loss = loss
        lives.waiting[life.key] = life
        self._try_place(life, now)
        if life.phase is Phase.WAITING:
            until = now + policy.max_wait_s
            lives.timers.set(life, until if life.deadline is None else min(until, life.deadline))

    def place_waiting(self, now: float) -> None:
        """Somebody has come who may be able to take them."""
        for life in list(self._lives.waiting.values()):
            self._try_place(life, now)

    def _try_place(self, life: Life, now: float) -> None:
        with contextlib.suppress(Unavailable):
            self.place(life, now)

    # Time -------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Begin without lenders that are late, and end what has waited too long."""
        for life in self._lives.timers.due(now):
            if life.phase is Phase.BORROWING:
                self.begin_without(life, now)
            else:
                self._waited_too_long(life, now)

    def _waited_too_long(self, life: Life, now: float) -> None:
        loss = life.loss
        assert loss is not None
        self._lives.counters["given_up"] += 1
        if life.deadline is not None and now >= life.deadline:
            loss = DeadlineExceeded("the request's deadline has passed", stage="queue")
        self._lives.fail(life, loss, now)
