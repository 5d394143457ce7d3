"""What both ends of a gRPC connection must agree on: method names, sizes, keepalive."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

import grpc.aio

from baton.rpc.messages import MAX_MESSAGE_BYTES

T = TypeVar("T")

WORKER_SERVICE: Final = "baton.Worker"
GATEWAY_SERVICE: Final = "baton.Gateway"
STREAM_METHOD: Final = f"/{WORKER_SERVICE}/Stream"
ANNOUNCE_METHOD: Final = f"/{GATEWAY_SERVICE}/Announce"

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


def connect(address: str) -> grpc.aio.Channel:
    """A channel to `unix:/path` or `host:port`; it connects with its first call."""
    return grpc.aio.insecure_channel(address, options=CLIENT_OPTIONS)


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
