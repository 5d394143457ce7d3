"""One completion request's life, from its first byte to the last of its answer.

    body → parse → prepare → merge ─┬─ stream:  first piece → 200, chunks …, usage?, [DONE]
      │       │        │       │    └─ whole:   all pieces → 200, one JSON object
      └───────┴────────┴───────┴── ServeError: its status, OpenAI's shape

The answer starts with the first piece and not before, so a refusal by the workers has its own
HTTP status. Once it has started, an error is an event of the stream, which then ends without
[DONE]. The client's leaving is watched from the moment the body is read: it cancels whatever is
under way, which closes every token stream. So does the deadline.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable

import msgspec
from msgspec import UNSET
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from baton.errors import DeadlineExceeded, Internal, ServeError
from baton.gateway import sse
from baton.gateway.body import read_json
from baton.gateway.choice import ChoiceText
from baton.gateway.intake import parse
from baton.gateway.limits import Limits, OpenRequests
from baton.gateway.merge import Merge
from baton.gateway.openai import ChatRequest, CompletionRequest
from baton.gateway.prepare import Preparer, Tenant, Work
from baton.gateway.problems import ModelNotFound, to_reply
from baton.gateway.render import ChatRenderer, CompletionRenderer, Renderer, Shape
from baton.gateway.replies import PromptTokensDetails, Usage
from baton.observe.metrics import DISCONNECTS, E2E_LATENCY, ERRORS, RUNNING, Metrics

log = logging.getLogger(__name__)

# After the deadline, how long the last event may take to be written to a slow client.
_LAST_WORD_S = 0.5


class Service(msgspec.Struct, frozen=True):
    """What all requests share."""

    preparer: Preparer
    limits: Limits
    open_requests: OpenRequests
    metrics: Metrics
    model_name: str

    def check_model(self, name: str | None) -> None:
        """Raises:
        ModelNotFound: this is not the served model.
        """
        if name is not None and name != self.model_name:
            shown = name if len(name) <= 100 else name[:100] + "…"
            raise ModelNotFound(
                f"the model {shown!r} does not exist; this server has {self.model_name!r}",
                stage="validate",
                param="model",
            )


class CompletionEndpoint:
    """The ASGI application of one of the two completion operations."""

    def __init__(
        self, service: Service, model: type[CompletionRequest] | type[ChatRequest]
    ) -> None:
        self._service = service
        self._model = model

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._service
        session = Session(service, scope.get("baton.tenant", Tenant()), send)
        with service.open_requests.enter():
            service.metrics.add(RUNNING, 1)
            try:
                await self._serve(session, scope, receive)
            except ServeError as error:
                service.metrics.add(ERRORS, code=error.code, stage=error.stage)
                log.info(
                    "request failed id=%s code=%s stage=%s", session.id, error.code, error.stage
                )
                raise
            finally:
                service.metrics.add(RUNNING, -1)

    async def _serve(self, session: Session, scope: Scope, receive: Receive) -> None:
        service = self._service
        try:
            body = await read_json(Request(scope, receive), service.limits, service.open_requests)
        except ClientDisconnect:
            left = True
        else:
            request = parse(self._model, body)
            del body
            service.check_model(request.model)
            left = await _unless_disconnected(receive, session, session.answer(request))
        if left:
            service.metrics.add(DISCONNECTS)
            log.info("client left id=%s after_s=%.3f", session.id, session.elapsed_s())


class Session:
    """One request. Owns its ids, its deadline and whether the answer has started."""

    def __init__(self, service: Service, tenant: Tenant, send: Send) -> None:
        self.id = secrets.token_hex(12)
        self._service = service
        self._tenant = tenant
        self._send = send
        self._started_s = time.monotonic()
        self._answering = False
        self.answered = False  # the last byte is on its way

    def elapsed_s(self) -> float:
        return time.monotonic() - self._started_s

    async def answer(self, request: CompletionRequest | ChatRequest) -> None:
        """Raises:
        ServeError: nothing was sent, and the caller must answer with it.
        """
        left_s = self._service.limits.request_timeout_s - self.elapsed_s()
        try:
            try:
                async with asyncio.timeout(left_s):
                    await self._run(request, left_s)
            except TimeoutError as error:
                raise DeadlineExceeded(
                    f"the request took longer than {self._service.limits.request_timeout_s:g} s",
                    stage="gateway",
                ) from error
            except ServeError:
                raise
            except Exception as error:
                log.exception("request failed id=%s", self.id)
                raise Internal("the gateway failed on this request") from error
        except ServeError as error:
            if not self._answering:
                raise
            self._service.metrics.add(ERRORS, code=error.code, stage=error.stage)
            log.info("stream failed id=%s code=%s stage=%s", self.id, error.code, error.stage)
            await self._last_word(error)

    async def _run(self, request: CompletionRequest | ChatRequest, deadline_s: float) -> None:
        service, preparer = self._service, self._service.preparer
        shape = Shape(
            id=("chatcmpl-" if isinstance(request, ChatRequest) else "cmpl-") + self.id,
            created=int(time.time()),
            model=service.model_name,
            # False asks a chat for none; 0 asks a completion for the chosen token's own.
            logprobs=request.logprobs is not None and request.logprobs is not False,
            token_ids=bool(request.return_token_ids),
            chunk_usage=None if _wants_usage(request) else UNSET,
        )
        renderer: Renderer
        if isinstance(request, ChatRequest):
            work = await preparer.chat(self.id, request, self._tenant, deadline_s)
            renderer = ChatRenderer(shape, work, preparer.tokenizer)
        else:
            work = await preparer.completion(self.id, request, self._tenant, deadline_s)
            renderer = CompletionRenderer(shape, work, preparer.tokenizer)
        texts = [
            ChoiceText(
                index,
                preparer.tokenizer,
                work.options,
                first_offset=len(work.echo[index // work.n]),
            )
            for index in range(len(work.requests))
        ]
        async with Merge(
            preparer.dispatcher,
            work.requests,
            texts,
            service.metrics,
            self._started_s,
            shape.token_ids,
        ) as merge:
            if request.stream:
                await self._stream(merge, renderer)
            else:
                while pieces := await merge.next():
                    for piece in pieces:
                        renderer.collect(piece)
        usage = _usage(work, texts)
        if request.stream:
            last = sse.events([renderer.usage_chunk(usage)]) if _wants_usage(request) else b""
            await self._body(last + sse.DONE, more=False)
        else:
            await self._whole(renderer.whole(usage))
        elapsed_s = self.elapsed_s()
        service.metrics.observe(E2E_LATENCY, elapsed_s)
        log.info(
            "request finished id=%s choices=%d prompt_tokens=%d completion_tokens=%d"
            " cached_tokens=%d e2e_s=%.3f",
            shape.id,
            len(work.requests),
            usage.prompt_tokens,
            usage.completion_tokens,
            usage.prompt_tokens_details.cached_tokens,
            elapsed_s,
        )

    async def _stream(self, merge: Merge, renderer: Renderer) -> None:
        pieces = await merge.next()
        self._answering = True
        await self._send(
            {"type": "http.response.start", "status": 200, "headers": list(sse.HEADERS)}
        )
        while pieces:
            await self._body(
                sse.events(chunk for piece in pieces for chunk in renderer.chunks(piece))
            )
            pieces = await merge.next()

    async def _whole(self, reply: msgspec.Struct) -> None:
        body = msgspec.json.encode(reply)
        self._answering = True
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._body(body, more=False)

    async def _body(self, data: bytes, more: bool = True) -> None:
        """Waits while the client's connection has too much unsent: that is the back-pressure."""
        self.answered = not more
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def _last_word(self, error: ServeError) -> None:
        try:
            async with asyncio.timeout(_LAST_WORD_S):
                await self._body(sse.events([to_reply(error)]), more=False)
        except TimeoutError:
            log.info("client reads too slowly to be told id=%s", self.id)


def _wants_usage(request: CompletionRequest | ChatRequest) -> bool:
    return request.stream_options is not None and bool(request.stream_options.include_usage)


def _usage(work: Work, texts: list[ChoiceText]) -> Usage:
    """Each prompt counts once however many choices it has; so does what of it was cached."""
    prompt = sum(len(ids) for ids in work.prompts)
    completion = sum(text.num_tokens for text in texts)
    cached = sum(text.num_cached or 0 for text in texts[:: work.n])
    return Usage(prompt, completion, prompt + completion, PromptTokensDetails(cached))


async def _unless_disconnected(receive: Receive, session: Session, work: Awaitable[None]) -> bool:
    """Run `work`; cancel it when the client leaves, and tell whether that happened.

    Servers also tell of a disconnect once the answer is complete; that one is no news.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done() and not session.answered:
            return True
        await task
        return False
    finally:
        watch.cancel()
        task.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
