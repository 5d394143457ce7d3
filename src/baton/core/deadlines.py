"""When which sequence must have ended."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from baton.core.sequence import Sequence, SequenceId, Status
from baton.errors import DeadlineExceeded

_STAGES = {
    Status.ARRIVING: "transfer",
    Status.WAITING: "queue",
    Status.IMPORTING: "transfer",
    Status.EXPORTING: "export",
}


class Deadlines:
    """Deadlines of one worker's sequences, those of ended ones included until they pass."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, SequenceId]] = []

    def add(self, seq: Sequence) -> None:
        if seq.deadline is not None:
            heapq.heappush(self._heap, (seq.deadline, seq.id))

    def next(self) -> float | None:
        """The earliest; None if there is none."""
        return self._heap[0][0] if self._heap else None

    def due(self, now: float) -> Iterator[SequenceId]:
        """Whose deadline is not after `now`; each is told once."""
        while self._heap and self._heap[0][0] <= now:
            yield heapq.heappop(self._heap)[1]


def too_late(seq: Sequence) -> DeadlineExceeded:
    """The error with which a sequence ends whose deadline has passed."""
    stage = _STAGES.get(seq.status, "decode" if seq.prefilled else "prefill")
    return DeadlineExceeded("the request's deadline has passed", stage=stage)
