"""When something is due for a request at the gateway."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from baton.core.life import Life, Phase


class Timers:
    """Instants at which something is due for a life that is still where it was."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Life, int, Phase]] = []
        self._num_set = 0

    def set(self, life: Life, at: float) -> None:
        """Due at `at`, unless `life` has left its phase or attempt by then."""
        self._num_set += 1
        heapq.heappush(self._heap, (at, self._num_set, life, life.attempt, life.phase))

    def next(self) -> float | None:
        """The earliest instant; None if nothing is awaited."""
        while self._heap:
            at, _, life, attempt, phase = self._heap[0]
            if life.attempt == attempt and life.phase is phase:
                return at
            heapq.heappop(self._heap)
        return None

    def due(self, now: float) -> Iterator[Life]:
        """Whose time has come, in order. What is done for one may change the others."""
        while (at := self.next()) is not None and at <= now:
            yield heapq.heappop(self._heap)[2]
