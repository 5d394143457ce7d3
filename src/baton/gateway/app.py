"""The two HTTP applications of a gateway: the public one, and the one for its operators.

`create_app` gives the OpenAI API; `create_admin_app` gives `/metrics` and belongs on a listener of
its own. Neither knows of workers beyond the `Dispatcher`.
"""

from __future__ import annotations

import functools
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.routing import Route

from baton.errors import Internal, InvalidRequest, ServeError, Unavailable
from baton.gateway.auth import ApiKeys
from baton.gateway.body import read_json
from baton.gateway.dispatch import Dispatcher, Readiness, ServedModel
from baton.gateway.front import Front
from baton.gateway.intake import parse
from baton.gateway.limits import Limits, OpenRequests
from baton.gateway.openai import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from baton.gateway.openapi import document
from baton.gateway.prepare import Preparer
from baton.gateway.problems import from_http, to_response
from baton.gateway.replies import Detokenized, Model, ModelList, Status, Tokens
from baton.gateway.session import CompletionEndpoint, Service
from baton.observe.events import RecentRequests
from baton.observe.metrics import CONTENT_TYPE, Metrics
from baton.text.chat_template import ChatTemplate
from baton.text.tokenizer import Tokenizer


def create_app(
    *,
    dispatcher: Dispatcher,
    tokenizer: Tokenizer,
    chat_template: ChatTemplate | None,
    model_name: str,
    metrics: Metrics,
    limits: Limits | None = None,
    keys: ApiKeys | None = None,
    tenant_secret: bytes | None = None,
) -> FastAPI:
    """The public application.

    `keys` None: no keys are asked for. `tenant_secret`: see `Front`; random if not given.
    """
    limits = limits or Limits()
    service = Service(
        preparer=Preparer(dispatcher, tokenizer, chat_template, limits),
        limits=limits,
        open_requests=OpenRequests(limits),
        metrics=metrics,
        model_name=model_name,
    )
    app = _bare_app()
    plain = _PlainEndpoints(service)
    app.router.routes += [
        Route("/v1/completions", CompletionEndpoint(service, CompletionRequest), methods=["POST"]),
        Route("/v1/chat/completions", CompletionEndpoint(service, ChatRequest), methods=["POST"]),
    ]
    app.add_api_route("/v1/models", plain.models, methods=["GET"])
    app.add_api_route("/v1/models/{model_id:path}", plain.model, methods=["GET"])
    app.add_api_route("/tokenize", plain.tokenize, methods=["POST"])
    app.add_api_route("/detokenize", plain.detokenize, methods=["POST"])
    app.add_api_route("/health", _health, methods=["GET"])
    app.add_api_route("/ready", plain.ready, methods=["GET"])
    app.add_api_route("/openapi.json", _document_route(service, keys is not None), methods=["GET"])
    endpoints = {
        str(path): str(path)
        for route in app.router.routes
        if (path := getattr(route, "path", None)) is not None
    }
    app.add_middleware(
        Front,
        metrics=metrics,
        endpoints=endpoints,
        keys=keys,
        secret=secrets.token_bytes(32) if tenant_secret is None else tenant_secret,
    )
    return app


def create_admin_app(
    *,
    metrics: Metrics,
    refresh: Callable[[], None] = lambda: None,
    recent: RecentRequests | None = None,
    readiness: Callable[[], Readiness] = lambda: Readiness(True),
    frozen: Callable[[], dict[str, float]] = dict,
    check_fabric: Callable[[], Awaitable[msgspec.Struct]] | None = None,
    audit: Callable[[], msgspec.Struct] | None = None,
) -> FastAPI:
    """For operators: `/metrics` (Prometheus), `/requests` (waterfalls, newest first), `/audit`
    (predicted beside measured), `/frozen` (seconds, by id, for which workers have been known to
    stand still), `/health` and `/ready`, which the supervisor asks: it has no key for the public
    one; and a POST to `/fabric/check`, which measures the ways between workers.

    It asks for no key: keep it on loopback. `refresh` brings the metrics up to date first.
    """
    app = _bare_app()

    async def exposition() -> Response:
        refresh()
        return Response(metrics.exposition(), media_type=CONTENT_TYPE)

    async def ready() -> Response:
        return _ready(readiness())

    async def requests() -> Response:
        body = msgspec.json.encode(recent.newest_first() if recent else [])
        return Response(body, media_type="application/json")

    async def stands_still() -> Response:
        return Response(msgspec.json.encode(frozen()), media_type="application/json")

    if check_fabric is not None:

        async def fabric() -> Response:
            body = msgspec.json.encode(await check_fabric())
            return Response(body, media_type="application/json")

        app.add_api_route("/fabric/check", fabric, methods=["POST"])
    if audit is not None:

        async def audited() -> Response:
            return _reply(audit())

        app.add_api_route("/audit", audited, methods=["GET"])
    app.add_api_route("/metrics", exposition, methods=["GET"])
    app.add_api_route("/requests", requests, methods=["GET"])
    app.add_api_route("/frozen", stands_still, methods=["GET"])
    app.add_api_route("/health", _health, methods=["GET"])
    app.add_api_route("/ready", ready, methods=["GET"])
    return app


def _bare_app() -> FastAPI:
    """Without FastAPI's own pages, and with every error in OpenAI's shape."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)

    async def serve_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ServeError)
        return to_response(error)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        headers: Mapping[str, str] | None = error.headers
        return to_response(from_http(error), headers)

    async def fault(request: Request, error: Exception) -> Response:
        return to_response(Internal("the gateway failed on this request"))

    app.add_exception_handler(ServeError, serve_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, fault)
    return app


class _PlainEndpoints:
    """The operations that need no worker."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._created = int(time.time())

    async def models(self) -> Response:
        return _reply(ModelList([self._model()]))

    async def model(self, model_id: str) -> Response:
        self._service.check_model(model_id)
        return _reply(self._model())

    async def tokenize(self, request: Request) -> Response:
        service, preparer = self._service, self._service.preparer
        with service.open_requests.enter():
            body = await read_json(request, service.limits, service.open_requests)
            wanted = parse(TokenizeRequest, body)
            service.check_model(wanted.model)
            if (wanted.prompt is None) == (wanted.messages is None):
                raise InvalidRequest(
                    "send either prompt or messages", stage="validate", param="prompt"
                )
            if wanted.messages is not None:
                tokens = await preparer.chat_prompt(
                    [message.to_template() for message in wanted.messages],
                    wanted.add_generation_prompt is not False,
                )
            else:
                tokens = await preparer.text_prompt(
                    wanted.prompt or "", wanted.add_special_tokens is not False
                )
        return _reply(Tokens(len(tokens), list(tokens), self._max_model_len()))

    async def detokenize(self, request: Request) -> Response:
        service = self._service
        with service.open_requests.enter():
            body = await read_json(request, service.limits, service.open_requests)
            wanted = parse(DetokenizeRequest, body)
            service.check_model(wanted.model)
            text = await service.preparer.detokenize(
                wanted.tokens, bool(wanted.skip_special_tokens)
            )
        return _reply(Detokenized(text))

    async def ready(self) -> Response:
        return _ready(self._service.preparer.dispatcher.readiness())

    def _model(self) -> Model:
        return Model(self._service.model_name, self._created, self._max_model_len())

    def _max_model_len(self) -> int | None:
        model = self._service.preparer.dispatcher.model()
        return None if model is None else model.max_model_len


async def _health() -> Response:
    """The process is alive and its event loop turns."""
    return _reply(Status("ok"))


def _ready(readiness: Readiness) -> Response:
    if not readiness.ready:
        raise Unavailable(readiness.reason or "not ready", retry_after_s=1.0)
    return _reply(Status("ready"))


def _document_route(service: Service, with_keys: bool) -> Callable[[], Awaitable[Response]]:
    @functools.lru_cache(maxsize=4)
    def encoded(served: ServedModel | None) -> bytes:
        return msgspec.json.encode(document(service.model_name, served, with_keys))

    async def served_document() -> Response:
        served = service.preparer.dispatcher.model()
        return Response(encoded(served), media_type="application/json")

    return served_document


def _reply(reply: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(reply), media_type="application/json")
