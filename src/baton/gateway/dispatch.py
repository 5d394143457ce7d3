"""Where the HTTP half of the gateway meets the placing half.

`Dispatcher` is all that the HTTP side knows of workers: give it one choice of a request, read
its tokens. Legs, attempts, leases and handoffs stay behind it (`placement.py`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

import msgspec

from baton.types import Request, TokenDelta


class ServedModel(msgspec.Struct, frozen=True):
    """What the workers agree on about the model they serve."""

    max_model_len: int
    vocab_size: int


class Readiness(msgspec.Struct, frozen=True):
    """Whether every worker pool can serve, and if not, a sentence that says which cannot."""

    ready: bool
    reason: str = ""


class Dispatcher(Protocol):
    """Runs requests on workers."""

    def readiness(self) -> Readiness: ...

    def model(self) -> ServedModel | None:
        """None until the first worker has said hello."""

    def generate(self, request: Request) -> AsyncIterator[TokenDelta]:
        """Run one choice to its end.

        `request.id` is minted by the gateway; `hand_off`, `handoff`, `attempt` and `emitted` are
        the dispatcher's to set. Deltas come in order, each token once; the last one has `finish`
        set, and with `FinishReason.ERROR` also `error`. Deltas that end a leg (`HANDOFF`) are
        never shown. Closing the iterator aborts the work in every worker.

        Raises:
            ServeError: the request was refused before it produced anything.
        """
