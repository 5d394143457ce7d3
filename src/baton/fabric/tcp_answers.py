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
from typing import Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from baton.core.lease import verify_mac
from baton.fabric.arena import Arena, MappedArena
from baton.fabric.bulk import send_pieces
from baton.fabric.digest import DIGEST_BYTES
from baton.fabric.stream import Stream
from baton.fabric.transport import Bytes
from baton.fabric.wire import (
    BLOCK_RESULTS,
    PROTOCOL_VERSION,
    RAW,
    Ask,
    Blocks,
    Codec,
    End,
    Received,
    Refusal,
    bound,
    decode_ask,
    pack,
)
from baton.types import KvFormat

logger = logging.getLogger(__name__)

STRETCH_BYTES: Final = 4 << 20
"""How much of an answer is waited for at a time: a slow reader is served, one that stands still
does not keep its thread."""

Allows = Callable[[str, bytes, float], bool]
"""`LeaseTable.allows`: whether a grant's lease covers a key at an instant. Called by any thread."""

_OK, _MISSING, _OUT_OF_RANGE, _WRONG_SIZE, _REFUSED = range(len(BLOCK_RESULTS))
_Integers = npt.NDArray[np.int64]


class _Judged(NamedTuple):
    """What is said of an ask's blocks; and of those that are sent, all [num_sent]: their indices
    in the ask, frames, generations (uint64) and stored lengths."""

    answer: Blocks
    good: _Integers
    frames: _Integers
    generations: npt.NDArray[np.uint64]
    num_bytes: _Integers


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

    def answer(self, message: Received, stream: Stream, patience_s: float) -> None:
        """Answer one ask on `stream`, of which each `STRETCH_BYTES` must leave in `patience_s`.

        Raises:
            Malformed, OSError: the stream must be closed.
        """
        ask = decode_ask(message)
        reason = self._why_not(ask)
        if reason is not None:
            stream.send([pack(Refusal(ask.ask_id, reason))], time.monotonic() + patience_s)
        elif ask.codec == RAW:
            self._send_stored(ask, stream, patience_s)
        else:
            self._send_encoded(ask, stream, patience_s)

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

    def _judge(self, ask: Ask, encoded_bytes: int = 0) -> _Judged:
        """What to say of each block, and which to send: as long as stored, or `encoded_bytes`."""
        now, grant_id, store = time.monotonic(), ask.grant.grant_id, self._store
        frames, num_bytes, num_tokens = ask.each_number()
        keys = np.frombuffer(ask.keys, "<u8").reshape(-1, 4)
        is_outside = frames >= store.geometry.num_frames
        headers = store.headers(np.where(is_outside, 0, frames))
        stored = headers["num_bytes"]
        fits = (num_bytes == stored) & (stored > 0) & (stored <= store.geometry.frame_bytes)
        fits &= num_tokens <= self._kv_format.block_size
        if encoded_bytes:
            fits &= stored == self._kv_format.block_bytes
        is_missing = (headers["generation"] % 2 == 1) | (headers["key"] != keys).any(axis=1)
        is_refused = np.array([not self._allows(grant_id, key, now) for key in ask.each_key()])
        is_good = fits & ~(is_missing | is_outside | is_refused)
        results = np.full(len(frames), _OK, np.uint8)
        if not is_good.all():
            results[~fits] = _WRONG_SIZE
            results[is_missing] = _MISSING  # what comes later weighs more
            results[is_outside] = _OUT_OF_RANGE
            results[is_refused] = _REFUSED
        good = np.flatnonzero(is_good)
        sizes = np.full(len(good), encoded_bytes) if encoded_bytes else num_bytes[good]
        answer = Blocks(ask.ask_id, results.tobytes(), int(sizes.sum()))
        return _Judged(answer, good, frames[good], headers["generation"][good], num_bytes[good])

    def _send_stored(self, ask: Ask, stream: Stream, patience_s: float) -> None:
        judged, store = self._judge(ask), self._store
        limit = time.monotonic() + patience_s
        stream.send([pack(judged.answer)], limit, more=len(judged.good) > 0)
        starts, at_once = store.starts_at(judged.frames), STRETCH_BYTES // store.geometry.stride
        for first in range(0, len(starts), max(1, at_once)):
            stretch = slice(first, first + max(1, at_once))
            limit = time.monotonic() + patience_s
            send_pieces(stream, store.memory, starts[stretch], judged.num_bytes[stretch], limit)
        stream.send([pack(End(ask.ask_id, changed=self._changed(judged)))], limit)

    def _send_encoded(self, ask: Ask, stream: Stream, patience_s: float) -> None:
        codec, encoded_bytes = self._codecs[ask.codec]
        judged = self._judge(ask, encoded_bytes)
        stream.send([pack(judged.answer)], time.monotonic() + patience_s)
        encoded: Bytes = np.zeros(encoded_bytes, np.uint8)
        filled = ask.each_number()[2].tolist()
        keys, corrupt = ask.each_key(), []
        digests: dict[int, bytes] = {}
        for index, frame, num_bytes in zip(
            judged.good.tolist(), judged.frames.tolist(), judged.num_bytes.tolist(), strict=True
        ):
            stored = self._store.stored(frame, num_bytes)
            if xxhash.xxh3_128_digest(stored) == self._store.header(frame)[3]:
                codec.encode(self._kv_format, stored, encoded, filled[index] or None)
            else:
                corrupt.append(index)
            digests[index] = bound(keys[index], xxhash.xxh3_128_digest(encoded.data))
            stream.send([encoded.data], time.monotonic() + patience_s)
        changed = self._changed(judged)
        digests |= dict.fromkeys((*changed, *corrupt), bytes(DIGEST_BYTES))
        end = End(ask.ask_id, changed, tuple(corrupt), tuple(digests.values()))
        stream.send([pack(end)], time.monotonic() + patience_s)

    def _changed(self, judged: _Judged) -> tuple[int, ...]:
        is_changed = self._store.headers(judged.frames)["generation"] != judged.generations
        return tuple(judged.good[is_changed].tolist())
