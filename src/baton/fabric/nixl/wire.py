"""What a store's door says, and what a reader makes of it before NIXL sees any of it.

    reader                                            door of a store
      Ask(grant) ─────────────────────────────────────►  source, epoch, MAC
      ◄──────────────────────────────── Opened, or Refusal; or it closes: come back later
      any byte: make progress, I am waiting ──────────►

Framing and `Ask` are those of `descriptors.py`. The connection stays open while the reader reads:
its end is the store's, or the reader's.
"""

from __future__ import annotations

from typing import Final

import msgspec

from baton.errors import BatonError
from baton.fabric.arena import PAGE_BYTES, Geometry
from baton.fabric.descriptors import Refusal
from baton.fabric.transport import ReadResult

MAX_REPLY_BYTES: Final = 256 << 10  # NIXL's metadata grow with the number of network cards
_MAX_FRAMES: Final = (1 << 31) - 1  # NIXL counts descriptors with 32 bits
_ADDRESS_END: Final = 1 << 63


class Unreadable(BatonError):
    """There is nothing to read from; `result` is what every block of the fetch gets."""

    def __init__(self, result: ReadResult, reason: str) -> None:
        super().__init__(reason)
        self.result = result


class Registered(msgspec.Struct, frozen=True):
    """serving process → its worker: where the arena begins there, and NIXL's metadata of it."""

    agent: str
    address: int
    metadata: bytes


class Opened(msgspec.Struct, frozen=True, tag=True):
    """door → reader: how the arena is read."""

    geometry: Geometry
    registered: Registered


decode_registered = msgspec.msgpack.Decoder(Registered).decode
_reply_decoder: msgspec.msgpack.Decoder[Opened | Refusal] = msgspec.msgpack.Decoder(
    Opened | Refusal
)


def checked_reply(data: bytes, epoch: int, kv_format_hash: bytes, frame_bytes: int) -> Opened:
    """The answer to an ask, if an arena of that epoch and format can be read with it.

    frame_bytes: the length of a block in our format, which is that of a frame.

    Raises:
        Unreadable: it is a refusal, no answer, or of another epoch, format or size.
    """
    try:
        reply = _reply_decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Unreadable(ReadResult.UNREACHABLE, f"not an answer: {error}") from error
    if isinstance(reply, Refusal):
        raise Unreadable(ReadResult(reply.reason), "the source refused the grant")
    geometry, registered = reply.geometry, reply.registered
    if geometry.epoch != epoch:
        raise Unreadable(ReadResult.STALE_EPOCH, f"the store is of epoch {geometry.epoch}")
    if geometry.kv_format_hash != kv_format_hash or geometry.frame_bytes != frame_bytes:
        raise Unreadable(ReadResult.WRONG_FORMAT, "the store's kv_format is not ours")
    end = registered.address + geometry.total_bytes
    if (
        not 0 < geometry.num_frames <= _MAX_FRAMES
        or registered.address <= 0
        or registered.address % PAGE_BYTES
        or end >= _ADDRESS_END
    ):
        raise Unreadable(
            ReadResult.UNREACHABLE,
            f"{geometry.num_frames} frames at {registered.address:#x} cannot be",
        )
    return reply
