"""What both ends of a gRPC connection must agree on: method names, sizes, keepalive."""

from __future__ import annotations

from typing import Final

import grpc.aio

from baton.rpc.messages import MAX_MESSAGE_BYTES

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
