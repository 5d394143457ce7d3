"""The floor under the gateway's streams: `bare_asgi.py PORT STEP_S`, uvicorn and nothing else.

Every POST is answered with as many events as its `max_tokens` says, the same bytes each time, one
every STEP_S seconds for all clients at once, as a worker's steps bring them.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import uvicorn

EVENT = (
    b'data: {"id":"cmpl-0123456789abcdef01234567","created":1700000000,"model":"model",'
    b'"choices":[{"index":0,"text":"a","logprobs":null,"finish_reason":null}],'
    b'"object":"text_completion"}\n\n'
)


class Ticks:
    """`await next()` returns at the next tick, for everyone who waits."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._waiting: list[asyncio.Future[None]] = []
        self._task: asyncio.Task[None] | None = None

    async def next(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        await future

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._step_s)
            waiting, self._waiting = self._waiting, []
            for future in waiting:
                if not future.done():
                    future.set_result(None)


def app(ticks: Ticks) -> Any:
    async def serve(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        if scope["method"] == "GET":
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b""})
            return
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for _ in range(json.loads(body)["max_tokens"]):
            await ticks.next()
            await send({"type": "http.response.body", "body": EVENT, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    return serve


if __name__ == "__main__":
    uvicorn.run(
        app(Ticks(float(sys.argv[2]))), port=int(sys.argv[1]), loop="uvloop", http="httptools",
        lifespan="off", log_level="warning", access_log=False,
    )  # fmt: skip
