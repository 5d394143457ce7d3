"""The open-loop client: sends each request when its time has come, whatever the server does.

One connection pool, one clock (`time.perf_counter`), a timestamp for each event at its arrival.
Every request ends as one `RequestResult`; failures have a kind and are never dropped.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Protocol

import httpx
import msgspec

from baton.cli.endpoint import Endpoint
from baton.cli.load.prompts import PromptSource
from baton.cli.load.workload import Arrival, Prompt
from baton.cli.sse import DONE, SseParser, Usage, decode_event, error_in_body
from baton.observe.results import RequestResult

INTERRUPTED = "interrupted"


class Target(msgspec.Struct, frozen=True):
    """Where requests go and what all of them have in common.

    api is `completions` or `chat`; `extra` is merged into each body.
    """

    endpoint: Endpoint
    api: str = "completions"
    ignore_eos: bool = True
    timeout_s: float = 600.0
    extra: dict[str, object] = {}

    @property
    def url(self) -> str:
        paths = {"completions": "/completions", "chat": "/chat/completions"}
        return self.endpoint.base_url + paths[self.api]

    def body(self, prompt: Prompt, output_tokens: int | None) -> bytes:
        """The JSON of one streamed request."""
        fields: dict[str, object] = {"model": self.endpoint.model, "stream": True}
        fields["stream_options"] = {"include_usage": True}
        if self.api == "completions":
            fields["prompt"] = prompt
        elif isinstance(prompt, str):
            fields["messages"] = [{"role": "user", "content": prompt}]
        else:
            fields["messages"] = prompt
        if output_tokens is not None:
            fields["max_tokens"] = output_tokens
            if self.ignore_eos:
                fields["ignore_eos"] = True
        return msgspec.json.encode(fields | self.extra)


class Progress(Protocol):
    """Told what happens, while it happens."""

    def sent(self) -> None: ...

    def tokens(self, count: int) -> None: ...

    def ended(self, result: RequestResult) -> None: ...


class Silent:
    """No progress display."""

    def sent(self) -> None:
        """Nothing is shown."""

    def tokens(self, count: int) -> None:
        """Nothing is shown."""

    def ended(self, result: RequestResult) -> None:
        """Nothing is shown."""


async def run_load(
    target: Target,
    arrivals: Sequence[Arrival],
    prompts: PromptSource,
    progress: Progress | None = None,
) -> list[RequestResult]:
    """Send `arrivals` (sorted by time) open-loop and wait for all of them.

    Cancelled (Ctrl-C), it ends what is in flight as `interrupted` and returns what was sent.
    """
    progress = progress or Silent()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx.Timeout(None, connect=min(30.0, target.timeout_s))
    tasks: list[asyncio.Task[RequestResult]] = []
    async with httpx.AsyncClient(
        limits=limits, timeout=timeout, headers=target.endpoint.headers, trust_env=False
    ) as client:
        start = time.perf_counter() + 0.02
        try:
            for index, arrival in enumerate(arrivals):
                body = target.body(prompts.make(arrival), arrival.output_tokens)
                planned = start + arrival.at_s
                await asyncio.sleep(max(0.0, planned - time.perf_counter()))
                request = _Exchange(index, planned, progress)
                tasks.append(asyncio.create_task(request.run(client, target, body)))
            return list(await asyncio.gather(*tasks))
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            return [result for result in ended if isinstance(result, RequestResult)]
        finally:
            for task in tasks:
                task.cancel()


class _Exchange:
    """One request on its way."""

    def __init__(self, index: int, planned_s: float, progress: Progress) -> None:
        self._index = index
        self._planned = planned_s
        self._sent = planned_s
        self._progress = progress
        self._events: list[float] = []
        self._usage: Usage | None = None
        self._finish: str | None = None
        self._end: float | None = None

    async def run(self, client: httpx.AsyncClient, target: Target, body: bytes) -> RequestResult:
        self._progress.sent()
        self._sent = time.perf_counter()
        try:
            async with asyncio.timeout(target.timeout_s):
                failure, detail = await self._stream(client, target.url, body)
        except TimeoutError:
            failure, detail = "timeout", f"no end within {target.timeout_s:g} s"
        except httpx.ConnectTimeout as error:
            failure, detail = "connect timeout", str(error)
        except httpx.ConnectError as error:
            failure, detail = "connect", str(error)
        except httpx.TransportError as error:
            failure, detail = "disconnected", f"{type(error).__name__}: {error}"
        except msgspec.MsgspecError as error:
            failure, detail = "malformed event", str(error)
        except asyncio.CancelledError:
            failure, detail = INTERRUPTED, "stopped by the user"
        result = self._result(failure, detail)
        self._progress.ended(result)
        return result

    async def _stream(
        self, client: httpx.AsyncClient, url: str, body: bytes
    ) -> tuple[str | None, str]:
        """(failure kind or None, detail)."""
        async with client.stream("POST", url, content=body) as response:
            if response.status_code != 200:
                code, message = error_in_body(await response.aread())
                return f"http {response.status_code}", f"{code}: {message}"
            parser = SseParser()
            async for chunk in response.aiter_raw():
                now = time.perf_counter()
                for data in parser.feed(chunk):
                    if data == DONE:
                        return self._verdict()
                    error = self._take(data, now)
                    if error is not None:
                        return f"error {error[0]}", error[1]
        if self._finish is not None:  # some servers end without [DONE]
            return self._verdict()
        return "cut short", "the stream ended without a finish reason"

    def _take(self, data: bytes, now: float) -> tuple[str, str] | None:
        event = decode_event(data)
        if event.has_tokens:
            self._events.append(now)
            self._end = now
            self._progress.tokens(1)
        if event.finish_reason is not None:
            self._finish = event.finish_reason
            self._end = now
        if event.usage is not None:
            self._usage = event.usage
        return event.error_text

    def _verdict(self) -> tuple[str | None, str]:
        if self._finish is None:
            return "cut short", "the stream ended without a finish reason"
        if self._events:
            return None, ""
        if self._usage is not None and self._usage.completion_tokens and self._end is not None:
            self._events.append(self._end)  # tokens without visible text: all came by the end
            return None, ""
        return "no tokens", f"finished ({self._finish}) without a token"

    def _result(self, failure: str | None, detail: str) -> RequestResult:
        usage = self._usage
        cached = usage.prompt_tokens_details if usage else None
        end = self._end if failure is None and self._end is not None else time.perf_counter()
        return RequestResult(
            index=self._index,
            planned_s=self._planned,
            sent_s=self._sent,
            end_s=end,
            event_s=tuple(self._events),
            prompt_tokens=usage.prompt_tokens if usage else None,
            cached_tokens=cached.cached_tokens if cached else None,
            output_tokens=usage.completion_tokens if usage else len(self._events),
            counted_by="usage" if usage else "events",
            failure=failure,
            detail=detail,
        )
