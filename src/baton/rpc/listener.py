"""A listening gRPC end with raw-bytes methods, and how it refuses a peer.

It listens at a Unix socket, which the kernel guards, or over TCP, or both. Whoever calls must have
the deployment's secret; who calls over TLS must also have a certificate for the role that calls
here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final, TypeVar

import grpc
import grpc.aio
import msgspec
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from baton.errors import ConfigError
from baton.rpc.auth import is_authorized
from baton.rpc.channel import SERVER_OPTIONS, caller_host, is_unix, tcp_address
from baton.rpc.messages import PROTOCOL_VERSION, MalformedMessage
from baton.rpc.tls import RpcTls, may_be

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


class Tcp(msgspec.Struct, frozen=True):
    """Where to listen besides a Unix socket. port 0 takes any free one; tls None is plain text."""

    host: str
    port: int
    tls: RpcTls | None


class Listener:
    """A grpc.aio server with raw-bytes methods and the standard health service.

    secret: of the deployment. callers: the name that certificates of those who call must have.
    `tcp_address` is where it listens over TCP, "" if it does not.
    """

    def __init__(self, service: str, methods: dict[str, Any], secret: bytes, callers: str) -> None:
        self.tcp_address = ""
        self._service = service
        self._methods = methods
        self._secret = secret
        self._callers = callers
        self._tls: RpcTls | None = None
        self._health = health.aio.HealthServicer()
        self._server: Any = None

    async def start(self, address: str, tcp: Tcp | None = None) -> str:
        """Listen at `address`, `unix:/path` or plain `host:port`, and at `tcp` if given.

        Returns `address` with the port that was bound.

        Raises:
            ConfigError: it cannot be bound.
        """
        # Made here because grpc.aio ties a server to the running loop.
        server = grpc.aio.server(
            options=SERVER_OPTIONS, maximum_concurrent_rpcs=MAX_CONCURRENT_RPCS
        )
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(self._service, self._methods),)
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        await self.set_serving(False)
        port = _bind(server, address, None)
        if tcp is not None:
            self._tls = tcp.tls
            tcp_port = _bind(server, tcp_address(tcp.host, tcp.port), tcp.tls)
            self.tcp_address = tcp_address(tcp.host, tcp_port)
            log.info("listening address=%s tls=%s", self.tcp_address, tcp.tls is not None)
        await server.start()
        self._server = server
        return address if is_unix(address) else f"{address.rpartition(':')[0]}:{port}"

    def check(self, context: Any) -> None:
        """Raises:
        Refused: the caller is none of ours, or may not call here.
        """
        if not is_authorized(self._secret, context.invocation_metadata()):
            raise Refused(Code.UNAUTHENTICATED, "not of this deployment: the secrets differ")
        over_tls = self._tls is not None and caller_host(context.peer()) is not None
        if over_tls and not may_be(self._callers, context):
            raise Refused(
                Code.UNAUTHENTICATED, f"the caller's certificate lacks the name {self._callers}"
            )

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


def _bind(server: Any, address: str, tls: RpcTls | None) -> int:
    try:
        if tls is None:
            return int(server.add_insecure_port(address))
        return int(server.add_secure_port(address, tls.listening()))
    except RuntimeError as error:
        raise ConfigError(f"cannot listen on {address}: {error}") from None


def decoded(decode: Callable[[bytes], T], data: bytes) -> T:
    try:
        return decode(data)
    except MalformedMessage as error:
        raise Refused(Code.INVALID_ARGUMENT, str(error)) from None


def version_text(theirs: int) -> str:
    return f"this end speaks protocol {PROTOCOL_VERSION}, the peer {theirs}: install one version"
