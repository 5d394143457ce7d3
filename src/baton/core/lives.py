"""The requests that live at one gateway: where they are, what is held for them, how they end.

`handoff.RequestTable` owns one `Lives` and hands it to `placing`. Whatever takes a request out of
several tables at once is a method here, so that they agree.
"""

from __future__ import annotations

from collections import Counter

from baton.core.counters import new_request_counters
from baton.core.held_leases import HeldLeases
from baton.core.instructions import Instruction, Outcome, Withdraw
from baton.core.life import LEGS, Life
from baton.core.members import Members
from baton.core.router import Router
from baton.core.timers import Timers
from baton.errors import ServeError
from baton.types import FinishReason, TokenDelta


class Lives:
    """State of a gateway's half of all handoffs; pure.

    living: by (id, choice), all that have not ended. waiting: those of them that nobody could take.
    members: the workers. held: the leases. timers: what is due for a life. outcome: what the driver
    has not been told of.
    """

    def __init__(self, router: Router, lease_ttl_s: float) -> None:
        self.counters: Counter[str] = new_request_counters()
        self.router = router
        self.living: dict[tuple[str, int], Life] = {}
        self.waiting: dict[tuple[str, int], Life] = {}
        self.members = Members()
        self.held = HeldLeases(lease_ttl_s, self.tell)
        self.timers = Timers()
        self.outcome = Outcome()

    def tell(self, instruction: Instruction) -> None:
        """Something for a worker; in order."""
        self.outcome.instructions.append(instruction)

    def current(self, worker_id: str, key: tuple[str, int], attempt: int) -> Life | None:
        """The life that this worker's message is about, if it is still its to serve."""
        life = self.living.get(key)
        if (
            life is None
            or life.worker_id != worker_id
            or life.attempt != attempt
            or life.phase not in LEGS
        ):
            self.counters["stale_messages"] += 1
            return None
        return life

    def withdraw(self, life: Life) -> None:
        """Stop the present leg, if it was begun and its worker is there."""
        if life.phase in LEGS and life.worker_id and self.members.hears(life.worker_id):
            self.tell(Withdraw(life.worker_id, *life.key, life.attempt))

    def fail(self, life: Life, error: ServeError, now: float) -> None:
        """It ends badly, and its client is told so."""
        self.withdraw(life)
        life.error = error.to_wire()
        position = (*life.key, life.attempt, len(life.tokens))
        end = TokenDelta(*position, (), finish=FinishReason.ERROR, error=life.error)
        self.outcome.deltas.append(end)
        self.end(life, FinishReason.ERROR, now)

    def end(self, life: Life, finish: FinishReason, now: float) -> None:
        """It ends; its client has been told how."""
        self.held.release_all(life)
        life.end(finish, now)
        self.waiting.pop(life.key, None)
        del self.living[life.key]
        self.router.finished(*life.key, now)
