"""What a reader's ask is answered with: the checks of the serving end, and the sending of blocks.

An ask as a whole is refused for its protocol, source, epoch, MAC (and with it the tenant),
kv_format or codec. A block is refused unless the grant's lease is alive and covers its key, now, by
this process's clock; and then its frame must hold that key, whole, in the length asked for.

Blocks go from the store's memory to the kernel without a copy of ours. When all are sent, each
frame's generation is looked at again, and `End` tells which have changed. A reader that checks
digests, as ours does, refuses such a block anyway; so it learns that the frame was reused, not
damaged. Where the blocks are encoded, the reader cannot know: then what was stored is checked
against its digest here, before it is encoded, and `changed` is what makes the block good or not.

The store is read through a mapping of our own that cannot be written to; a mapping and nothing
else is what an `Answers` owns. Any thread may use it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import xxhash

from baton.core.lease import verify_mac
from baton.fabric.arena import Arena, MappedArena
from baton.fabric.bulk import send_pieces
from baton.fabric.stream import Stream
from baton.fabric.transport import Bytes
from baton.fabric.wire import (
    PROTOCOL_VERSION,
    RAW,
    Ask,
    Blocks,
    Codec,
    End,
    Received,
    Refusal,
    State,
    decode_ask,
    pack,
)
from baton.types import KvFormat

logger = logging.getLogger(__name__)

Allows = Callable[[str, bytes, float], bool]
"""`LeaseTable.allows`: whether a grant's lease covers a key at an instant. Called by any thread."""

_Sent = tuple[int, int, int]
"""A block that may be sent: its index in the ask, its frame, the frame's generation."""


class Answers:
    """What one store answers. The arguments are those of `TcpServer`."""

    def __init__(
        self,
        source: str,
        arena: Arena,
        kv_format: KvFormat,
        secret: bytes,
        allows: Allows,
        codecs: Mapping[str, Codec],
    ) -> None:
        self._source = source
        self._store = MappedArena(arena.fd, arena.geometry.epoch)
        self._kv_format = kv_format
        self._secret = secret
        self._allows = allows
        self._codecs: dict[str, tuple[Codec, int]] = {}  # with the length of an encoded block
        for name, codec in codecs.items():
            with contextlib.suppress(ValueError):  # it cannot take our format
                self._codecs[name] = codec, codec.encoded_bytes(kv_format)

    def close(self) -> None:
        """Unmap; only when nobody is being answered."""
        self._store.close()

    def answer(self, message: Received, stream: Stream, limit: float) -> None:
        """Answer one ask on `stream`, by the instant `limit`.

        Raises:
            Malformed, OSError: the stream must be closed.
        """
        ask = decode_ask(message)
        reason = self._why_not(ask)
        if reason is not None:
            stream.send([pack(Refusal(ask.ask_id, reason))], limit)
        elif ask.codec == RAW:
            self._send_stored(ask, stream, limit)
        else:
            self._send_encoded(ask, stream, limit)

    def _why_not(
        self, ask: Ask
    ) -> Literal["refused", "stale_epoch", "wrong_format", "codec"] | None:
        grant = ask.grant
        if ask.protocol != PROTOCOL_VERSION or grant.source != self._source:
            return "refused"
        if grant.epoch != self._store.geometry.epoch:
            return "stale_epoch"
        if not verify_mac(self._secret, grant):
            logger.warning("refused a grant with a wrong MAC tenant=%r", grant.tenant)
            return "refused"
        if ask.kv_format != self._store.geometry.kv_format_hash:
            return "wrong_format"
        if ask.codec != RAW and ask.codec not in self._codecs:
            return "codec"
        return None

    def _judge(self, ask: Ask, encoded_bytes: int = 0) -> tuple[list[State], list[_Sent]]:
        """What to say of each block, and which to send: as long as stored, or `encoded_bytes`."""
        now, grant_id = time.monotonic(), ask.grant.grant_id
        num_frames = self._store.geometry.num_frames
        longest = self._store.geometry.frame_bytes
        states: list[State] = []
        good: list[_Sent] = []
        for index, block in enumerate(ask.blocks):
            key, frame = block.key, block.frame
            if not self._allows(grant_id, key, now):
                states.append(("refused", 0))
                continue
            if frame >= num_frames:
                states.append(("out_of_range", 0))
                continue
            generation, num_bytes, stored_key, _ = self._store.header(frame)
            fits = block.num_bytes == num_bytes and 0 < num_bytes <= longest
            fits = fits and block.num_tokens <= self._kv_format.block_size
            if generation % 2 or stored_key != key:
                states.append(("missing", 0))
            elif not fits or (encoded_bytes and num_bytes != self._kv_format.block_bytes):
                states.append(("wrong_size", 0))
            else:
                states.append(("ok", encoded_bytes or num_bytes))
                good.append((index, frame, generation))
        return states, good

    def _send_stored(self, ask: Ask, stream: Stream, limit: float) -> None:
        states, good = self._judge(ask)
        starts = [self._store.starts_at(frame) for _, frame, _ in good]
        num_bytes = [states[index][1] for index, _, _ in good]
        stream.send([pack(Blocks(ask.ask_id, tuple(states)))], limit, more=bool(good))
        send_pieces(stream, self._store.memory, starts, num_bytes, limit)
        stream.send([pack(End(ask.ask_id, changed=self._changed(good)))], limit)

    def _send_encoded(self, ask: Ask, stream: Stream, limit: float) -> None:
        codec, encoded_bytes = self._codecs[ask.codec]
        states, good = self._judge(ask, encoded_bytes)
        stream.send([pack(Blocks(ask.ask_id, tuple(states)))], limit)
        encoded: Bytes = np.zeros(encoded_bytes, np.uint8)
        corrupt, digests = [], []
        for index, frame, _ in good:
            stored = self._store.stored(frame, ask.blocks[index].num_bytes)
            if xxhash.xxh3_128_digest(stored) == self._store.header(frame)[3]:
                num_tokens = ask.blocks[index].num_tokens or None
                codec.encode(self._kv_format, stored, encoded, num_tokens)
            else:
                corrupt.append(index)
            digests.append(xxhash.xxh3_128_digest(encoded.data))
            stream.send([encoded.data], limit)
        end = End(ask.ask_id, self._changed(good), tuple(corrupt), tuple(digests))
        stream.send([pack(end)], limit)

    def _changed(self, sent: list[_Sent]) -> tuple[int, ...]:
        generation = self._store.generation
        return tuple(index for index, frame, was in sent if generation(frame) != was)
