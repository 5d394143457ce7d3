"""Whether the workers stand still: `core.liveness` with a real clock.

`Watch` owns the liveness of all workers that have joined, and the timer by which it is checked.
All methods run on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from baton.core.liveness import HEARTBEAT_S, Frozen, Liveness
from baton.types import Pulse

logger = logging.getLogger(__name__)


def _how(frozen: Frozen) -> str:
    if frozen.stuck_at is None:
        return "silent"
    return "stuck in a step" if frozen.stuck_at else "stuck, in no step of a request"


class Watch:
    """Checks every `HEARTBEAT_S` from the first worker on; `on_frozen` is told of each, once."""

    def __init__(self, patience_s: float, on_frozen: Callable[[Frozen], None]) -> None:
        self._liveness = Liveness(patience_s)
        self._on_frozen = on_frozen
        self._timer: asyncio.TimerHandle | None = None

    def joined(self, worker_id: str) -> None:
        """A worker, of a new start, is there."""
        self._liveness.joined(worker_id, time.monotonic())
        if self._timer is None:
            self._arm()

    def left(self, worker_id: str) -> None:
        self._liveness.left(worker_id)

    def heard(self, worker_id: str, pulse: Pulse | None) -> bool:
        """Something has come from a worker. Returns whether it stood still and goes on."""
        goes_on = self._liveness.heard(worker_id, pulse, time.monotonic())
        if goes_on:
            logger.warning("worker id=%s goes on", worker_id)
        return goes_on

    def frozen(self) -> dict[str, float]:
        """Workers that stand still, and for how many seconds that has been known."""
        return self._liveness.frozen()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(HEARTBEAT_S, self._check)

    def _check(self) -> None:
        self._arm()
        for frozen in self._liveness.check(time.monotonic()):
            logger.warning(
                "worker id=%s stands still: %s for %.1f s",
                frozen.worker_id,
                _how(frozen),
                frozen.for_s,
            )
            self._on_frozen(frozen)
