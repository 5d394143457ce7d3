"""One ask of a reader, and the reading of its answer into the blocks' destinations.

A destination is written to only for a block that the source said is ok, and has exactly the
length that was asked for; what it holds counts only after OK.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import xxhash

from baton.fabric.stream import PIECE_BYTES, Stream
from baton.fabric.transport import Bytes, ReadResult, Wanted
from baton.fabric.wire import (
    ASK_ID_BYTES,
    MAX_BLOCKS,
    PROTOCOL_VERSION,
    Ask,
    AskedBlock,
    Blocks,
    Codec,
    Malformed,
    Refusal,
    decode_answer,
    decode_end,
    pack,
)
from baton.types import Grant, KvFormat

MIN_ASK_BYTES: Final = 1 << 20
MAX_ASK_BYTES: Final = 4 << 20
"""About how many bytes of blocks to ask for at once."""

_RESULTS: Final = {str(result): result for result in ReadResult}


class Exchange:
    """An ask for some of the blocks of a fetch.

    wanted: 1 to `MAX_BLOCKS`. destinations: theirs, as `view_of` gives them. results: one for
    each, None until it is known.
    """

    def __init__(self, wanted: Sequence[Wanted], destinations: Sequence[memoryview]) -> None:
        self.results: list[ReadResult | None] = [None] * len(wanted)
        self._wanted = wanted
        self._destinations = destinations
        self._ask_id = os.urandom(ASK_ID_BYTES)

    def ask(self, grant: Grant, kv_format_hash: bytes, codec: str) -> bytes:
        """The message to send."""
        blocks = tuple(
            AskedBlock(block.key, block.frame, destination.nbytes, block.num_tokens)
            for block, destination in zip(self._wanted, self._destinations, strict=True)
        )
        return pack(Ask(PROTOCOL_VERSION, self._ask_id, kv_format_hash, codec, grant, blocks))

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
            self.results = [_RESULTS[answer.reason]] * len(self._wanted)
        elif codec is None:
            self._receive_stored(stream, answer, limit)
        else:
            self._receive_encoded(stream, answer, limit, kv_format, codec)

    def _receive_stored(self, stream: Stream, answer: Blocks, limit: float) -> None:
        destinations = self._destinations
        coming = self._coming(answer, [destination.nbytes for destination in destinations])
        for index, digest in _digested(stream, coming, [destinations[n] for n in coming], limit):
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
        digests = dict(_digested(stream, coming, [row.data for row in encoded], limit))
        end = decode_end(stream.receive_message(limit))
        self._check_id(end.ask_id)
        if len(end.digests) != len(coming):
            raise Malformed(f"{len(end.digests)} digests of {len(coming)} blocks")
        for index, row, digest in zip(coming, encoded, end.digests, strict=True):
            if index in end.changed:
                result = ReadResult.MISSING
            elif index in end.corrupt or digests[index] != digest:
                result = ReadResult.CORRUPT
            else:
                result = self._decode(index, row, kv_format, codec)
            self.results[index] = result

    def _decode(self, index: int, row: Bytes, kv_format: KvFormat, codec: Codec) -> ReadResult:
        try:
            codec.decode(kv_format, row, self._wanted[index].destination)
        except ValueError:
            return ReadResult.CORRUPT
        return ReadResult.OK

    def _coming(self, answer: Blocks, lengths: list[int]) -> list[int]:
        """Indices of the blocks whose bytes follow; the others have their results then."""
        if len(answer.states) != len(self._wanted):
            raise Malformed(f"{len(answer.states)} states of {len(self._wanted)} blocks")
        coming = []
        for index, ((result, num_bytes), length) in enumerate(
            zip(answer.states, lengths, strict=True)
        ):
            if num_bytes != (length if result == "ok" else 0):
                raise Malformed(f"a block that is {result} with {num_bytes} bytes of {length}")
            if result == "ok":
                coming.append(index)
        # Not before the whole answer is known to make sense.
        for index, (result, _) in enumerate(answer.states):
            if result != "ok":
                self.results[index] = _RESULTS[result]
        return coming

    def _check_id(self, ask_id: bytes) -> None:
        if ask_id != self._ask_id:
            raise Malformed("an answer to another ask")


def view_of(block: Wanted) -> memoryview:
    """The destination of `block` as bytes, one after the other; empty as it is."""
    view = memoryview(block.destination)  # type: ignore[arg-type]  # an array is a buffer, too
    return view.cast("B") if view.nbytes else view


def split(lengths: Sequence[int], num_streams: int) -> list[tuple[int, int]]:
    """From which block to which (exclusive) each ask goes: some for each stream, if it is much.

    lengths: of all blocks, in bytes. An ask has a block at least, and at most `MAX_BLOCKS`.
    """
    most = min(max(MIN_ASK_BYTES, sum(lengths) // (4 * num_streams)), MAX_ASK_BYTES)
    asks = []
    start = num_bytes = 0
    for index, length in enumerate(lengths):
        if index > start and (num_bytes + length > most or index - start == MAX_BLOCKS):
            asks.append((start, index))
            start, num_bytes = index, 0
        num_bytes += length
    if start < len(lengths):
        asks.append((start, len(lengths)))
    return asks


def _digested(
    stream: Stream, indices: Sequence[int], blocks: Sequence[memoryview], limit: float
) -> Iterator[tuple[int, bytes]]:
    """Fill the blocks in turn; yields the index and the XXH3-128 of each as it is full."""
    pieces: list[memoryview] = []
    last_of: list[int | None] = []  # for each piece: the index of the block that it completes
    for index, block in zip(indices, blocks, strict=True):
        if block.nbytes <= PIECE_BYTES:
            pieces.append(block)
            last_of.append(index)
            continue
        for start in range(0, block.nbytes, PIECE_BYTES):
            pieces.append(block[start : start + PIECE_BYTES])
            last_of.append(None)
        last_of[-1] = index
    state: xxhash.xxh3_128 | None = None
    for number in stream.fill(pieces, limit):
        index_or_none = last_of[number]
        if index_or_none is not None and state is None:
            yield index_or_none, xxhash.xxh3_128_digest(pieces[number])
            continue
        state = state or xxhash.xxh3_128()
        state.update(pieces[number])
        if index_or_none is not None:
            yield index_or_none, state.digest()
            state = None
