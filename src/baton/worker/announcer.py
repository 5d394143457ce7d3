"""How a worker stays known to one gateway."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

from baton.rpc.channel import is_unix
from baton.rpc.client import announce
from baton.rpc.messages import Announce
from baton.rpc.tls import RpcTls

AGAIN_S: Final = 5.0


async def stay_announced(
    gateway: str, message: Announce, secret: bytes, tls: RpcTls | None, lost: asyncio.Event
) -> str:
    """Say that this worker is there, and go on saying it; returns why the gateway refuses it.

    At once when `lost` is set, for a new gateway knows nobody. Over TCP every `AGAIN_S` in any
    case: where a wire was cut the gateway may give this worker up later than we have come back to
    it, when our word that we are there was nothing new to it.
    """
    every_s = None if is_unix(gateway) else AGAIN_S
    while True:
        reply = await announce(gateway, message, secret, tls)
        if not reply.accepted:
            return reply.reason
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(every_s):
                await lost.wait()
        lost.clear()
