"""The open-loop client: sends each request when its time has come, whatever the server does.

One connection pool, one clock (`time.perf_counter`), a timestamp for each event at its arrival.
Every request ends as one `RequestResult`; failures have a kind and are never dropped.

Tokens are told by their ids, which are asked for (`return_token_ids`): one may show no text of its
own, such as half a letter or an end of sequence that is ignored. A server that sends none tells
the number at least, by its usage; then a chunk with text is taken for the arrival of a token, and
the end of the answer for that of its last one. Without usage such chunks are all there is to count.
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
from baton.cli.sse import DONE, SseParser, StreamEvent, Usage, decode_event, error_in_body
from baton.observe.results import RequestResult

INTERRUPTED = "interrupted"
REFUSED = ("http 400", "http 422")
"""How servers answer to a field that they do not know, if they do not ignore it."""


class Target(msgspec.Struct, frozen=True):
    """Where requests go and what all of them have in common.

    api is `completions` or `chat`; token_ids: ask for the ids of generated tokens. `extra` is
    merged into each body.
    """

    endpoint: Endpoint
    api: str = "completions"
    ignore_eos: bool = True
    token_ids: bool = True
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
        if self.token_ids:
            fields["return_token_ids"] = True
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


async def settle(
    target: Target, arrival: Arrival, prompts: PromptSource
) -> tuple[Target, RequestResult | None]:
    """Send one request; if it is refused, once more without asking for token ids.

    Returns the target as the server takes it and what became of the last request, None if the user
    stopped before it was sent.
    """
    result = next(iter(await run_load(target, [arrival], prompts)), None)
    if result is not None and result.failure in REFUSED and target.token_ids:
        plain = msgspec.structs.replace(target, token_ids=False)
        result = next(iter(await run_load(plain, [arrival], prompts)), None)
        if result is None or result.failure is None:
            return plain, result
    return target, result


class _Exchange:
    """One request on its way."""

    def __init__(self, index: int, planned_s: float, progress: Progress) -> None:
        self._index = index
        self._planned = planned_s
        self._sent = planned_s
        self._progress = progress
        self._events: list[float] = []
        self._num_ids: int | None = None  # None until the server has told ids
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
        count = self._count(event)
        if count:
            self._events.append(now)
            self._end = now
            self._progress.tokens(count)
        if event.finish_reason is not None:
            self._finish = event.finish_reason
            self._end = now
        if event.usage is not None:
            self._usage = event.usage
        return event.error_text

    def _count(self, event: StreamEvent) -> int:
        """Tokens that came with it; text that follows its token (held back, flushed) is none."""
        told = event.num_token_ids
        if told is not None:
            self._num_ids = (self._num_ids or 0) + told
            return told
        return int(event.has_text and self._num_ids is None)

    def _verdict(self) -> tuple[str | None, str]:
        if self._finish is None:
            return "cut short", "the stream ended without a finish reason"
        if self._events:
            return None, ""
        if self._hides_tokens and self._end is not None:
            self._events.append(self._end)  # all of them came by the end
            return None, ""
        return "no tokens", f"finished ({self._finish}) without a token"

    @property
    def _hides_tokens(self) -> bool:
        """Whether the usage alone tells of some tokens."""
        if self._usage is None or self._num_ids is not None:
            return False
        return self._usage.completion_tokens > len(self._events)

    def _result(self, failure: str | None, detail: str) -> RequestResult:
        usage = self._usage
        num_tokens, counted_by = len(self._events), "events"
        if self._num_ids is not None:
            num_tokens, counted_by = self._num_ids, "token ids"
        elif usage is not None:
            num_tokens, counted_by = usage.completion_tokens, "usage"
        cached = usage.prompt_tokens_details if usage else None
        end = self._end if failure is None and self._end is not None else time.perf_counter()
        return RequestResult(
            index=self._index,
            planned_s=self._planned,
            sent_s=self._sent,
            end_s=end,
            event_s=tuple(self._events),
            last_s=end if self._hides_tokens else None,
            prompt_tokens=usage.prompt_tokens if usage else None,
            cached_tokens=cached.cached_tokens if cached else None,
            output_tokens=num_tokens,
            counted_by=counted_by,
            failure=failure,
            detail=detail,
        )
