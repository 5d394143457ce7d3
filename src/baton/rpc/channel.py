"""What both ends of a gRPC connection must agree on: method names, addresses, sizes, keepalive."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

import grpc.aio

from baton.errors import ConfigError
from baton.rpc.messages import MAX_MESSAGE_BYTES
from baton.rpc.tls import RpcTls

T = TypeVar("T")

WORKER_SERVICE: Final = "baton.Worker"
GATEWAY_SERVICE: Final = "baton.Gateway"
STREAM_METHOD: Final = f"/{WORKER_SERVICE}/Stream"
ANNOUNCE_METHOD: Final = f"/{GATEWAY_SERVICE}/Announce"

_TCP_ADDRESS = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([^\s:/\[\]]+)):(\d{1,5})")

_SIZES: Final = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
)

# A dead process closes its sockets and is noticed at once. Keepalive is for what closes nothing,
# a host or link that is gone; a frozen worker is told by its progress counter, much sooner.
_KEEPALIVE: Final = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)

SERVER_OPTIONS: Final = (
    *_SIZES,
    *_KEEPALIVE,
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.max_metadata_size", 16 << 10),
    ("grpc.so_reuseport", 0),  # a second server on the same port is an error, not a silent share
)

CLIENT_OPTIONS: Final = (
    *_SIZES,
    *_KEEPALIVE,
    ("grpc.use_local_subchannel_pool", 1),  # each channel connects for itself, without back-off
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
)


def connect(address: str, tls: RpcTls | None = None, role: str = "") -> grpc.aio.Channel:
    """A channel to `unix:/path` or `host:port`; it connects with its first call.

    tls: what to speak with `host:port`, None for plain text; role: that the other end's certificate
    must name. Through a Unix socket it is the kernel that keeps out other users.
    """
    if tls is None or is_unix(address):
        return grpc.aio.insecure_channel(address, options=CLIENT_OPTIONS)
    options = (*CLIENT_OPTIONS, ("grpc.ssl_target_name_override", role))
    return grpc.aio.secure_channel(address, tls.calling(), options=options)


def is_unix(address: str) -> bool:
    return address.startswith("unix:")


def tcp_address(host: str, port: int) -> str:
    """`10.0.0.1:7000`, `[fd00::1]:7000`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_tcp_address(address: str) -> tuple[str, int] | None:
    """Host and port of `host:port`; None if it is not written so."""
    match = _TCP_ADDRESS.fullmatch(address)
    if match is None or not 0 < int(match[3]) < 1 << 16:
        return None
    return match[1] or match[2], int(match[3])


def is_numeric(host: str) -> bool:
    """Whether `host` is an address that needs no name service."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def numeric(host: str, field: str) -> str:
    """The address of a host.

    Raises:
        ConfigError: it has none; names the field.
    """
    try:
        found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"{field} {host} has no address: {error}; give one") from None
    return str(found[0][4][0])


def caller_host(peer: str) -> str | None:
    """The host in what grpc calls a peer, `ipv4:10.0.0.2:4567`; None for a Unix socket."""
    kind, _, address = peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return None
    split = split_tcp_address(address.replace("%5B", "[").replace("%5D", "]"))
    return "" if split is None else split[0].partition("%")[0]


async def unbroken(operation: Coroutine[Any, Any, T]) -> T:
    """Await a read or write of a stream so that cancelling the caller does not cancel it.

    grpc.aio frees the buffers of an operation that is cancelled while its core still fills them,
    which crashes the process or stalls its poller. The operation ends with the stream instead.
    """
    task = asyncio.ensure_future(operation)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(_forget_outcome)
        raise


def _forget_outcome(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()
