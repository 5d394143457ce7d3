"""All choices of one request as one bounded stream of pieces.

One task a choice reads its token stream; what it makes goes through a queue that a slow client
fills. A full queue stops the tasks, not other requests: tokens then wait at the dispatcher, at
most `max_tokens` of them. Leaving the context closes every token stream, which aborts its work in
the workers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from types import TracebackType

from baton.errors import Internal, ServeError
from baton.gateway.choice import ChoiceText, Piece
from baton.gateway.dispatch import Dispatcher
from baton.observe.metrics import (
    CACHED_TOKENS,
    GENERATION_TOKENS,
    INTER_TOKEN_LATENCY,
    PROMPT_TOKENS,
    REQUEST_GENERATION_TOKENS,
    REQUEST_PROMPT_TOKENS,
    REQUESTS_FINISHED,
    TIME_TO_FIRST_TOKEN,
    Metrics,
)
from baton.types import Request, TokenDelta

log = logging.getLogger(__name__)

_MAX_PIECES = 32


class Merge:
    """`async with Merge(…) as merge`, then `merge.next()` until it gives nothing.

    `started` is the arrival of the request, in `time.monotonic()` seconds.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        requests: Sequence[Request],
        texts: Sequence[ChoiceText],
        metrics: Metrics,
        started: float,
        show_token_ids: bool,
    ) -> None:
        self._dispatcher = dispatcher
        self._work = tuple(zip(requests, texts, strict=True))
        self._metrics = metrics
        self._started = started
        self._show_token_ids = show_token_ids
        self._queue: asyncio.Queue[Piece | ServeError] = asyncio.Queue(_MAX_PIECES)
        self._tasks: list[asyncio.Task[None]] = []
        self._num_unfinished = len(self._work)
        self._error: ServeError | None = None

    async def __aenter__(self) -> Merge:
        self._tasks = [
            asyncio.create_task(self._pump(request, text)) for request, text in self._work
        ]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.abort()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def abort(self) -> None:
        """Begin closing every token stream, without waiting for it."""
        for task in self._tasks:
            task.cancel()

    async def next(self) -> list[Piece]:
        """What has come since the last call, at least one piece; empty at the end.

        Raises:
            ServeError: one of the choices ended in an error, and so the request does.
        """
        if self._error is not None:
            raise self._error
        if not self._num_unfinished:
            return []
        item = await self._queue.get()
        pieces: list[Piece] = []
        while True:
            if isinstance(item, ServeError):
                if not pieces:
                    raise item
                self._error = item  # what came before it is shown first
                return pieces
            pieces.append(item)
            if item.finish is not None:
                self._num_unfinished -= 1
            if self._queue.empty():
                return pieces
            item = self._queue.get_nowait()

    async def _pump(self, request: Request, text: ChoiceText) -> None:
        last: Piece | ServeError
        try:
            last = await self._read(request, text)
        except ServeError as error:
            last = error
        except Exception:
            # Whatever broke, the client must hear of an end.
            log.exception("token stream failed request=%s choice=%d", request.id, request.choice)
            last = Internal("the gateway failed while reading the answer")
        await self._queue.put(last)

    async def _read(self, request: Request, text: ChoiceText) -> Piece:
        """Queue every piece but the last, which is returned once the token stream is closed."""
        metrics = self._metrics
        metrics.add(PROMPT_TOKENS, len(request.prompt))
        metrics.observe(REQUEST_PROMPT_TOKENS, len(request.prompt))
        before: float | None = None
        deltas = self._dispatcher.generate(request)
        try:
            async for delta in deltas:
                if delta.token_ids:
                    now = time.monotonic()
                    if before is None:
                        metrics.observe(TIME_TO_FIRST_TOKEN, now - self._started)
                        metrics.add(CACHED_TOKENS, delta.num_cached or 0)
                    else:
                        metrics.observe(INTER_TOKEN_LATENCY, now - before)
                    before = now
                num_tokens = text.num_tokens
                piece = text.push(delta)
                metrics.add(GENERATION_TOKENS, text.num_tokens - num_tokens)
                if piece.finish is not None:
                    metrics.add(REQUESTS_FINISHED, finished_reason=piece.finish)
                    metrics.observe(REQUEST_GENERATION_TOKENS, text.num_tokens)
                    return piece
                if piece.text or piece.shown or (self._show_token_ids and piece.token_ids):
                    await self._queue.put(piece)
        finally:
            await _close(deltas)
        raise Internal("the token stream ended without a finish reason")


async def _close(deltas: AsyncIterator[TokenDelta]) -> None:
    if isinstance(deltas, AsyncGenerator):
        await deltas.aclose()
