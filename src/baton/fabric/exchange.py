"""One ask of a reader, and the reading of its answer into the blocks' destinations.

A destination is written to only for a block that the source said is ok, and has exactly the
length that was asked for; what it holds counts only after OK.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from baton.fabric.arena import KEY_BYTES
from baton.fabric.bulk import receive_digested
from baton.fabric.stream import Stream
from baton.fabric.transport import Bytes, ReadResult, Wanted
from baton.fabric.wire import (
    ASK_ID_BYTES,
    BLOCK_RESULTS,
    MAX_BLOCKS,
    MAX_NUMBER,
    PROTOCOL_VERSION,
    Ask,
    Blocks,
    Codec,
    Malformed,
    Refusal,
    bound,
    decode_answer,
    decode_end,
    pack,
    pack_numbers,
)
from baton.types import Grant, KvFormat

MIN_ASK_BYTES: Final = 1 << 20
MAX_ASK_BYTES: Final = 32 << 20
"""About how many bytes of blocks to ask for at once. Where one answer ends and the next begins,
both ends are busy with other things than bytes."""
MAX_ENCODED_ASK_BYTES: Final = 4 << 20
"""The same, if the blocks come encoded: those of one ask are kept together until all have come."""

_OK: Final = BLOCK_RESULTS.index(ReadResult.OK)
_REASONS: Final = {str(result): result for result in ReadResult}


class Exchange:
    """An ask for some of the blocks of a fetch.

    wanted: 1 to `MAX_BLOCKS`. destinations: theirs, as `view_of` gives them. indices: where they
    are in the fetch. results: one for each, None until it is known.
    """

    def __init__(
        self,
        wanted: Sequence[Wanted],
        destinations: Sequence[memoryview],
        indices: Sequence[int] = (),
    ) -> None:
        self.results: list[ReadResult | None] = [None] * len(wanted)
        self.indices = indices
        self._wanted = wanted
        self._destinations = destinations
        self._lengths = [destination.nbytes for destination in destinations]
        self._ask_id = os.urandom(ASK_ID_BYTES)

    def ask(self, grant: Grant, kv_format_hash: bytes, codec: str) -> bytes:
        """The message to send."""
        wanted = self._wanted
        keys = b"".join([block.key for block in wanted])
        numbers = pack_numbers(
            [block.frame for block in wanted],
            self._lengths,
            [block.num_tokens for block in wanted],
        )
        return pack(
            Ask(PROTOCOL_VERSION, self._ask_id, kv_format_hash, codec, grant, keys, numbers)
        )

    def receive(
        self, stream: Stream, limit: float, kv_format: KvFormat, codec: Codec | None
    ) -> None:
        """Read the answer by the instant `limit`; `codec` is None for raw. All results are set.

        Raises:
            Malformed, OSError: the stream must be closed; blocks that were whole have a result.
        """
        answer = decode_answer(stream.receive_message(limit))
        self._check_id(answer.ask_id)
        if isinstance(answer, Refusal):
            self.results = [_REASONS[answer.reason]] * len(self._wanted)
        elif codec is None:
            self._receive_stored(stream, answer, limit)
        else:
            self._receive_encoded(stream, answer, limit, kv_format, codec)

    def _receive_stored(self, stream: Stream, answer: Blocks, limit: float) -> None:
        coming = self._coming(answer, self._lengths)
        blocks = [self._destinations[index] for index in coming]
        digests: list[bytes] = []
        try:
            receive_digested(stream, blocks, digests, limit)
        finally:
            for index, digest in zip(coming, digests, strict=False):
                right = digest == self._wanted[index].digest
                self.results[index] = ReadResult.OK if right else ReadResult.CORRUPT
        end = decode_end(stream.receive_message(limit))
        self._check_id(end.ask_id)
        for index in end.changed:
            if index in coming and self.results[index] is ReadResult.CORRUPT:
                self.results[index] = ReadResult.MISSING

    def _receive_encoded(
        self, stream: Stream, answer: Blocks, limit: float, kv_format: KvFormat, codec: Codec
    ) -> None:
        encoded_bytes = codec.encoded_bytes(kv_format)
        coming = self._coming(answer, [encoded_bytes] * len(self._wanted))
        encoded: Bytes = np.empty((len(coming), encoded_bytes), np.uint8)
        rows = [row.data for row in encoded]
        digests: list[bytes] = []
        receive_digested(stream, rows, digests, limit)
        end = decode_end(stream.receive_message(limit))
        self._check_id(end.ask_id)
        if len(end.digests) != len(coming):
            raise Malformed(f"{len(end.digests)} digests of {len(coming)} blocks")
        for index, row, digest, sent in zip(coming, encoded, digests, end.digests, strict=True):
            if bound(self._wanted[index].key, digest) == sent:
                result = self._decode(index, row, kv_format, codec)
            elif index in end.changed:
                result = ReadResult.MISSING
            else:
                result = ReadResult.CORRUPT
            self.results[index] = result

    def _decode(self, index: int, row: Bytes, kv_format: KvFormat, codec: Codec) -> ReadResult:
        try:
            codec.decode(kv_format, row, self._wanted[index].destination)
        except ValueError:
            return ReadResult.CORRUPT
        return ReadResult.OK

    def _coming(self, answer: Blocks, lengths: list[int]) -> list[int]:
        """Indices of the blocks whose bytes follow; the others have their results then."""
        if len(answer.results) != len(self._wanted):
            raise Malformed(f"{len(answer.results)} results of {len(self._wanted)} blocks")
        coming = [index for index, result in enumerate(answer.results) if result == _OK]
        num_bytes = sum([lengths[index] for index in coming])
        if answer.num_bytes != num_bytes:
            raise Malformed(f"{answer.num_bytes} bytes of blocks, not {num_bytes}")
        if len(coming) < len(answer.results):
            for index, result in enumerate(answer.results):
                if result != _OK:
                    self.results[index] = BLOCK_RESULTS[result]
        return coming

    def _check_id(self, ask_id: bytes) -> None:
        if ask_id != self._ask_id:
            raise Malformed("an answer to another ask")


def view_of(block: Wanted) -> memoryview:
    """The destination of `block` as bytes, one after the other; empty as it is."""
    view = memoryview(block.destination)  # type: ignore[arg-type]  # an array is a buffer, too
    if (view.ndim == 1 and view.format == "B" and view.contiguous) or not view.nbytes:
        return view
    return view.cast("B")


def ask_bytes(num_bytes: int, num_streams: int, is_encoded: bool = False) -> int:
    """About how many bytes of blocks to ask for at once, so that each stream gets some asks."""
    most = MAX_ENCODED_ASK_BYTES if is_encoded else MAX_ASK_BYTES
    return min(max(MIN_ASK_BYTES, num_bytes // (4 * num_streams)), most)


def exchanges(
    wanted: Sequence[Wanted], results: list[ReadResult | None], most: int
) -> Iterator[Exchange]:
    """Asks for these blocks, in order, each for at least one and at most `most` bytes.

    A block that no ask can be made for gets its result instead, when its turn comes.
    """
    indices: list[int] = []
    views: list[memoryview] = []
    num_bytes = 0
    for index, block in enumerate(wanted):
        view = view_of(block)
        length = view.nbytes
        if (
            len(block.key) != KEY_BYTES
            or not 0 <= block.frame <= MAX_NUMBER
            or not 0 < length <= MAX_NUMBER
        ):
            results[index] = _why_not(block)
            continue
        if indices and (num_bytes + length > most or len(indices) == MAX_BLOCKS):
            yield Exchange([wanted[n] for n in indices], views, indices)
            indices, views, num_bytes = [], [], 0
        indices.append(index)
        views.append(view)
        num_bytes += length
    if indices:
        yield Exchange([wanted[n] for n in indices], views, indices)


def _why_not(block: Wanted) -> ReadResult:
    """Of a block that no ask can be made for; frames are hints of a peer."""
    if len(block.key) != KEY_BYTES:
        return ReadResult.MISSING
    return ReadResult.WRONG_SIZE if 0 <= block.frame <= MAX_NUMBER else ReadResult.OUT_OF_RANGE
