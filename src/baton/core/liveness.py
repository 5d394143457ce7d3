"""Which workers stand still, told by their pulses.

              ┌── nothing is heard (silent), or its counter stands still (stuck) ──┐
    joined ▶ ALIVE                                                              FROZEN
              └◀───────── heard again, and it moves, or has nothing to do ─────────┘

Every worker sends a `Pulse` every `HEARTBEAT_S`, from a thread that waits for no step.

* silent: nothing has come for `patience_s`, with work or without: its process is stopped, or its
  host or the link to it is gone. What has no work is given none that would have to wait.
* stuck: it is heard, it says that it is working, and its counter has stood still for `patience_s`
  and for `PATIENCE_STEPS` times what its step was predicted to take. The counter moves layer by
  layer, so a step may take as long as it likes. The same holds for copies into its own store: they
  wait for nobody but the step, so a copier that stands still is broken.

Who waits for others (a store that is full, a peer's blocks) says that it is not working.

Time is that of the watch: from one call to the next not more than `MAX_GAP_S` count. When the
gateway itself has stood still, it has not listened, and holds that against nobody.

No clock: `now` is any clock that does not go back, in seconds, the same in every call.
"""

from __future__ import annotations

from typing import NamedTuple

from baton.core.sequence import SequenceId
from baton.types import Pulse

HEARTBEAT_S = 0.5
"""Between two pulses of a worker, and between two checks."""

MAX_GAP_S = 2 * HEARTBEAT_S
PATIENCE_S = 3.0
PATIENCE_STEPS = 5


class Frozen(NamedTuple):
    """A worker stands still, for `for_s` already; `stuck_at` is what is in its step, as far as it
    has said so (nothing, if it is its copier), or None: it is silent."""

    worker_id: str
    for_s: float
    stuck_at: tuple[SequenceId, ...] | None


class _Watched:
    __slots__ = ("copied_at", "frozen_at", "heard_at", "moved_at", "pulse")

    def __init__(self, at: float) -> None:
        self.heard_at = at
        self.moved_at = at
        self.copied_at = at
        self.pulse = Pulse()
        self.frozen_at: float | None = None


class Liveness:
    """The workers of one gateway; pure. Which of them take requests is the caller's business."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._workers: dict[str, _Watched] = {}
        self._now: float | None = None
        self._time = 0.0

    def joined(self, worker_id: str, now: float) -> None:
        """A worker, of a new start, is there."""
        self._advance(now)
        self._workers[worker_id] = _Watched(self._time)

    def left(self, worker_id: str) -> None:
        """Its stream has ended. Idempotent."""
        self._workers.pop(worker_id, None)

    def heard(self, worker_id: str, pulse: Pulse | None, now: float) -> bool:
        """Anything has come from a worker, maybe its pulse. Returns whether it goes on again."""
        self._advance(now)
        worker = self._workers.get(worker_id)
        if worker is None:
            return False
        worker.heard_at = self._time
        if pulse is None:
            return False
        moves = not pulse.is_working or pulse.progress != worker.pulse.progress
        copies = not pulse.is_copying or pulse.num_copied != worker.pulse.num_copied
        worker.pulse = pulse
        if moves:
            worker.moved_at = self._time
        if copies:
            worker.copied_at = self._time
        if not (moves and copies):
            return False
        goes_on, worker.frozen_at = worker.frozen_at is not None, None
        return goes_on

    def check(self, now: float) -> list[Frozen]:
        """Those that have come to stand still since the last check, `HEARTBEAT_S` ago."""
        self._advance(now)
        found = []
        for worker_id, worker in self._workers.items():
            if worker.frozen_at is None and (frozen := self._judge(worker_id, worker)):
                worker.frozen_at = self._time
                found.append(frozen)
        return found

    def frozen(self) -> dict[str, float]:
        """Seconds since each of those that stand still was found to."""
        return {
            worker_id: self._time - worker.frozen_at
            for worker_id, worker in self._workers.items()
            if worker.frozen_at is not None
        }

    def _judge(self, worker_id: str, worker: _Watched) -> Frozen | None:
        pulse = worker.pulse
        silent_s = self._time - worker.heard_at
        if silent_s > self._patience_s:
            return Frozen(worker_id, silent_s, None)
        # By what it has said: while it is silent nobody knows whether its counter moves.
        patience_s = max(self._patience_s, PATIENCE_STEPS * pulse.predicted_s)
        still_s = worker.heard_at - worker.moved_at
        if pulse.is_working and still_s > patience_s:
            return Frozen(worker_id, still_s, pulse.batch)
        still_s = worker.heard_at - worker.copied_at
        if pulse.is_copying and still_s > patience_s:
            return Frozen(worker_id, still_s, ())
        return None

    def _advance(self, now: float) -> None:
        if self._now is not None:
            self._time += min(now - self._now, MAX_GAP_S)
        self._now = now
