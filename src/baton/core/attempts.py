"""Which attempt of each request a worker has seen last.

A repeat, or a late message of an attempt that was given up, must not run: neither beside the
attempt that does, nor after the end. What has ended is remembered for a while, since a gateway
may repeat itself when a stream was cut; what lives is always remembered.
"""

from __future__ import annotations

from collections import deque

from baton.core.sequence import SequenceId

NUM_REMEMBERED = 1 << 16


class AttemptMemory:
    """The latest attempt of every living choice, and of the last `capacity` that ended."""

    def __init__(self, capacity: int = NUM_REMEMBERED) -> None:
        self._capacity = capacity
        self._latest: dict[tuple[str, int], SequenceId] = {}
        self._ended: deque[SequenceId] = deque()

    def latest(self, request_id: str, choice: int) -> SequenceId | None:
        """The highest attempt that was begun; None if there was none, or it is forgotten."""
        return self._latest.get((request_id, choice))

    def begin(self, seq_id: SequenceId) -> None:
        """This attempt is the latest now."""
        self._latest[seq_id[:2]] = seq_id

    def end(self, seq_id: SequenceId) -> None:
        """This attempt lives no longer; each ends once."""
        self._ended.append(seq_id)
        if len(self._ended) > self._capacity:
            oldest = self._ended.popleft()
            if self._latest.get(oldest[:2]) == oldest:
                del self._latest[oldest[:2]]
