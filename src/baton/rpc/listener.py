"""A listening gRPC end with raw-bytes methods, and how it refuses a peer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final, TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from baton.errors import ConfigError
from baton.rpc.auth import is_authorized
from baton.rpc.channel import SERVER_OPTIONS
from baton.rpc.messages import PROTOCOL_VERSION, MalformedMessage

log = logging.getLogger(__name__)

MAX_CONCURRENT_RPCS: Final = 256
CLOSE_S: Final = 0.5

Code = grpc.StatusCode
T = TypeVar("T")


class Refused(Exception):
    """The peer broke the protocol; the stream ends with this status."""

    def __init__(self, code: grpc.StatusCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class Listener:
    """A grpc.aio server with raw-bytes methods and the standard health service."""

    def __init__(self, service: str, methods: dict[str, Any]) -> None:
        self._service = service
        self._methods = methods
        self._health = health.aio.HealthServicer()
        self._server: Any = None

    async def start(self, address: str) -> str:
        # Made here because grpc.aio ties a server to the running loop.
        server = grpc.aio.server(
            options=SERVER_OPTIONS, maximum_concurrent_rpcs=MAX_CONCURRENT_RPCS
        )
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(self._service, self._methods),)
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        await self.set_serving(False)
        try:
            port = server.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {address}: {error}") from None
        await server.start()
        self._server = server
        if address.startswith("unix:"):
            return address
        return f"{address.rpartition(':')[0]}:{port}"

    async def set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        for service in ("", self._service):
            await self._health.set(service, status.SERVING if serving else status.NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        server, self._server = self._server, None
        if server is None:
            return
        # gRPC would wait for ever for a peer that does not read to take its last bytes.
        closing = asyncio.ensure_future(server.stop(grace_s))
        await asyncio.wait({closing}, timeout=grace_s + CLOSE_S)
        if not closing.done():
            closing.cancel()
            log.warning("a peer does not read: its connection is left to the end of the process")


def check_token(secret: bytes, context: Any) -> None:
    if not is_authorized(secret, context.invocation_metadata()):
        raise Refused(Code.UNAUTHENTICATED, "not of this deployment: the secrets differ")


def decoded(decode: Callable[[bytes], T], data: bytes) -> T:
    try:
        return decode(data)
    except MalformedMessage as error:
        raise Refused(Code.INVALID_ARGUMENT, str(error)) from None


def version_text(theirs: int) -> str:
    return f"this end speaks protocol {PROTOCOL_VERSION}, the peer {theirs}: install one version"
