"""The leases that a gateway owns: which it must renew, when, and which are worth a release.

A lease is held from the moment that its grant arrives until it is let go, or its minter is lost.
A life has at most two: one to read the blocks of its prompt, and a lender's. All held ones are
renewed together, every third of their time to live, one instruction a worker.
"""

from __future__ import annotations

from collections.abc import Callable

from baton.core.instructions import Release, Renew
from baton.core.life import Life

RENEWALS_PER_TTL = 3


class HeldLeases:
    """Grant ids by the worker that minted them; pure, owned by the `RequestTable`.

    tell: takes the instructions that follow.
    """

    def __init__(self, ttl_s: float, tell: Callable[[Release | Renew], object]) -> None:
        self.renew_at: float | None = None
        self._every_s = ttl_s / RENEWALS_PER_TTL
        self._tell = tell
        self._held: dict[str, dict[str, None]] = {}

    def hold(self, life: Life, worker_id: str, grant_id: str, now: float) -> None:
        """The prompt's blocks may be read under this grant, and under no earlier one."""
        if life.grant != (worker_id, grant_id):
            self.release_prompt(life)
            life.grant = self._add(worker_id, grant_id, now)

    def borrow(self, life: Life, worker_id: str, grant_id: str, now: float) -> None:
        """A lender's blocks may be read."""
        life.loan = self._add(worker_id, grant_id, now)

    def release_prompt(self, life: Life) -> None:
        """Nobody reads the prompt's blocks any more."""
        grant, life.grant = life.grant, None
        self._let_go(grant)

    def return_loan(self, life: Life) -> None:
        """Nobody reads the lender's blocks any more."""
        loan, life.loan = life.loan, None
        self._let_go(loan)

    def release_all(self, life: Life) -> None:
        self.release_prompt(life)
        self.return_loan(life)

    def lose(self, worker_id: str) -> None:
        """The minter is gone, and its leases with it: nobody need be told."""
        self._held.pop(worker_id, None)

    def renew(self, now: float) -> None:
        """Renew every lease, if it is time."""
        if self.renew_at is not None and now >= self.renew_at:
            self.renew_at = now + self._every_s if self._held else None
            for worker_id, grant_ids in self._held.items():
                self._tell(Renew(worker_id, tuple(grant_ids)))

    def _add(self, worker_id: str, grant_id: str, now: float) -> tuple[str, str]:
        self._held.setdefault(worker_id, {})[grant_id] = None
        if self.renew_at is None:
            self.renew_at = now + self._every_s
        return (worker_id, grant_id)

    def _let_go(self, lease: tuple[str, str] | None) -> None:
        if lease is None:
            return
        worker_id, grant_id = lease
        held = self._held.get(worker_id, {})
        if grant_id in held:
            del held[grant_id]
            if not held:
                del self._held[worker_id]
            self._tell(Release(worker_id, grant_id))
