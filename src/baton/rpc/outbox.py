"""Numbered messages that are kept until the peer has acted upon them. Pure."""

from __future__ import annotations

from collections import deque
from itertools import islice


class Outbox:
    """Messages 1, 2, 3, …, of which the last ones are kept to be sent again after a break."""

    def __init__(self) -> None:
        self._kept: deque[bytes] = deque()
        self._first = 1
        self.num_bytes = 0

    @property
    def last(self) -> int:
        """Index of the newest message; 0 when there was none."""
        return self._first + len(self._kept) - 1

    def __len__(self) -> int:
        return len(self._kept)

    def append(self, message: bytes) -> None:
        """Keep `message` under the index `last + 1`."""
        self._kept.append(message)
        self.num_bytes += len(message)

    def drop_through(self, index: int) -> None:
        """Forget the messages up to `index`; those already forgotten are no error."""
        while self._kept and self._first <= index:
            self.num_bytes -= len(self._kept.popleft())
            self._first += 1

    def can_resume_after(self, index: int) -> bool:
        """Whether every message after `index` is still here, and `index` was ever given."""
        return self._first - 1 <= index <= self.last

    def after(self, index: int, limit: int = 64) -> list[bytes]:
        """At most `limit` kept messages that follow `index`, in order."""
        start = max(index + 1 - self._first, 0)
        return list(islice(self._kept, start, start + limit))
