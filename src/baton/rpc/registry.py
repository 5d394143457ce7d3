"""The gateway's listening end: workers say where they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

from baton.rpc.channel import GATEWAY_SERVICE
from baton.rpc.listener import Listener, Refused, check_token, checked, version_text
from baton.rpc.messages import (
    PROTOCOL_VERSION,
    Announce,
    AnnounceReply,
    decode_announce,
    encode,
)


class RegistryServer:
    """The gateway's side of `Announce`: workers say where they are. Serves gRPC health too.

    `on_announce` runs on the event loop's thread and only sees well-formed announcements of this
    protocol version.
    """

    def __init__(self, on_announce: Callable[[Announce], AnnounceReply], secret: bytes) -> None:
        self._on_announce = on_announce
        self._secret = secret
        self._server = Listener(
            GATEWAY_SERVICE,
            {"Announce": grpc.unary_unary_rpc_method_handler(self._announce)},
        )

    async def start(self, address: str) -> str:
        """See `Listener.start`."""
        return await self._server.start(address)

    async def set_serving(self, serving: bool) -> None:
        await self._server.set_serving(serving)

    async def stop(self, grace_s: float) -> None:
        await self._server.set_serving(False)
        await self._server.stop(grace_s)

    async def _announce(self, data: bytes, context: Any) -> bytes:
        try:
            check_token(self._secret, context)
            message = checked(decode_announce, data)
        except Refused as refused:
            await context.abort(refused.code, refused.reason)
            raise  # for the type checker: abort always raises
        if message.protocol != PROTOCOL_VERSION:
            return encode(AnnounceReply(False, version_text(message.protocol)))
        return encode(self._on_announce(message))
