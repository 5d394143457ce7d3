"""Drives an ASGI application by hand, for what no HTTP client can show: the moment of a
disconnect, and a reader that does not read."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.types import ASGIApp, Message


class Exchange:
    """One request. `leave()` disconnects; a cleared `reading` stops the reader."""

    def __init__(
        self,
        app: ASGIApp,
        path: str,
        body: dict[str, Any] | bytes | None = None,
        method: str = "POST",
        headers: dict[str, str] | None = None,
        raw_path: bytes | None = None,
    ) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._inbox.put_nowait(
            {"type": "http.request", "body": b"" if body is None else data, "more_body": False}
        )
        self.reading = asyncio.Event()
        self.reading.set()
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.chunks: list[bytes] = []
        self.got_chunk = asyncio.Event()
        self.ended = False
        sent = {"content-type": "application/json", **(headers or {})}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode() if raw_path is None else raw_path,
            "query_string": b"",
            "root_path": "",
            "headers": [(k.encode(), v.encode()) for k, v in sent.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
            "state": {},
        }
        self.task = asyncio.ensure_future(app(scope, self._inbox.get, self._send))  # type: ignore[arg-type]

    def leave(self) -> None:
        self._inbox.put_nowait({"type": "http.disconnect"})

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        lines = self.body.decode().split("\n\n")[:-1]
        assert all(line.startswith("data: ") for line in lines)
        return [line if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]

    async def done(self, timeout_s: float = 5.0) -> Exchange:
        await asyncio.wait_for(self.task, timeout_s)
        return self

    async def _send(self, message: Message) -> None:
        await self.reading.wait()
        if message["type"] == "http.response.start":
            assert self.status is None
            self.status = message["status"]
            self.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        else:
            assert not self.ended
            if message.get("body"):
                self.chunks.append(message["body"])
                self.got_chunk.set()
            self.ended = not message.get("more_body", False)
