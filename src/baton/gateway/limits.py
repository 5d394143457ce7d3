"""How much the gateway takes on at once, and the counts that hold it to that.

`OpenRequests` owns the number of requests in flight and the bytes of their bodies. Both are
bounded, so a flood costs refusals and not memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from baton.errors import Overloaded

MAX_CHOICES = 128  # over all prompts of one request
MAX_N = 16
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_PROMPTS = 128
MAX_MESSAGES = 4096
# Bodies read at the same time, in units of the largest allowed one.
_BODY_BUDGET = 32


class Limits(msgspec.Struct, frozen=True):
    """request_timeout_s: from the arrival of a request to the end of its answer.
    body_timeout_s: for the body alone, so that a client that trickles it holds nothing long.
    inline_chars: text longer than this is tokenized in a thread, so that streams do not stall.
    """

    max_body_bytes: int = 8 << 20
    max_queued_requests: int = 1024
    request_timeout_s: float = 600.0
    body_timeout_s: float = 60.0
    inline_chars: int = 4096


class OpenRequests:
    """Counts requests in flight and their body bytes. Used from the event loop only."""

    def __init__(self, limits: Limits) -> None:
        self._max_requests = limits.max_queued_requests
        self._max_bytes = limits.max_body_bytes * _BODY_BUDGET
        self.num_open = 0
        self.body_bytes = 0

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Hold one place.

        Raises:
            Overloaded: all are taken.
        """
        if self.num_open >= self._max_requests:
            raise Overloaded(
                f"{self._max_requests} requests are in flight, which is all this gateway takes",
                stage="gateway",
                retry_after_s=1.0,
            )
        self.num_open += 1
        try:
            yield
        finally:
            self.num_open -= 1

    def hold_bytes(self, count: int) -> None:
        """Count bytes of a body; the caller gives them back with `drop_bytes`, even after a
        refusal.

        Raises:
            Overloaded: the bodies in flight are too large together.
        """
        self.body_bytes += count
        if self.body_bytes > self._max_bytes:
            raise Overloaded(
                "the request bodies in flight are too large together", retry_after_s=1.0
            )

    def drop_bytes(self, count: int) -> None:
        self.body_bytes -= count
