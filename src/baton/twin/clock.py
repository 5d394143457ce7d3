"""Virtual time: what happens next, and when.

Events of the same instant happen in the order in which they were put down, so a run depends on
nothing but its inputs.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

Action = Callable[[], None]


class Clock:
    """An event heap. `now` is seconds from the start of the run."""

    def __init__(self) -> None:
        self.now = 0.0
        self.num_events = 0
        self._heap: list[tuple[float, int, Action]] = []

    def __len__(self) -> int:
        """Events to come."""
        return len(self._heap)

    def at(self, when: float, action: Action) -> None:
        """Do `action` at `when`; at once, after what else is due, if that has passed."""
        self.num_events += 1
        heapq.heappush(self._heap, (when if when > self.now else self.now, self.num_events, action))

    def after(self, seconds: float, action: Action) -> None:
        self.at(self.now + seconds, action)

    def next(self) -> None:
        """Go to the next event and let it happen. Raises IndexError if there is none."""
        self.now, _, action = heapq.heappop(self._heap)
        action()
