"""The outermost layer: API keys by the raw path, and one count for each HTTP request.

Keys are checked here, before any routing, against the bytes of the path as the client sent them:
only exactly `/health` is open. Whatever else a path may turn out to mean further in, it has been
paid for.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from baton.errors import Unauthorized
from baton.gateway.auth import ApiKeys
from baton.gateway.prepare import Tenant
from baton.gateway.problems import to_response
from baton.observe.metrics import HTTP_REQUESTS, Metrics

_OPEN_PATHS = frozenset({b"/health"})
_LEFT = "499"  # the client left before the answer began


class Front:
    """`endpoints` maps paths to the names under which they are counted; others are `other`.

    `secret` keys the salts that keep tenants' cached blocks apart; it must be the same in all
    gateways of a deployment for them to share a tenant's blocks.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        endpoints: Mapping[str, str],
        keys: ApiKeys | None = None,
        secret: bytes = b"",
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._endpoints = dict(endpoints)
        self._keys = keys
        self._secret = secret

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        status = _LEFT

        async def counting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            if self._keys is not None and not self._admit(self._keys, scope):
                refusal = Unauthorized(
                    "the API key is missing or not accepted; send it as"
                    " `Authorization: Bearer KEY`",
                    stage="validate",
                )
                await to_response(refusal)(scope, receive, counting_send)
            else:
                await self._app(scope, receive, counting_send)
        except Exception:
            # Answered further out, by the application's own last resort.
            status = "500" if status == _LEFT else status
            raise
        finally:
            self._metrics.add(HTTP_REQUESTS, endpoint=self._endpoint(scope["path"]), status=status)

    def _admit(self, keys: ApiKeys, scope: Scope) -> bool:
        if scope.get("raw_path") in _OPEN_PATHS:
            return True
        header = next((v for k, v in scope["headers"] if k == b"authorization"), None)
        name = keys.tenant(header)
        if name is None:
            return False
        salt = hmac.digest(self._secret, name.encode(), hashlib.sha256)
        scope["baton.tenant"] = Tenant(name, salt)
        return True

    def _endpoint(self, path: str) -> str:
        if path.startswith("/v1/models/"):
            return "/v1/models/{model_id}"
        return self._endpoints.get(path, "other")
