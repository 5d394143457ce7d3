"""Many blocks through a stream: sent from where they lie, received where they belong.

    native   csrc/digest/socket.h: one call for all blocks, which releases the GIL and digests what
             has come while the kernel receives what follows; for connections without TLS
    python   piece by piece; with TLS, or without the library

Limits and errors are those of `Stream`, and so is who may use it.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from ctypes import byref, c_int64
from typing import Final

import numpy as np
import numpy.typing as npt
import xxhash

from baton.fabric.digest import (
    DIGEST_BYTES,
    SHORTEST,
    NativeCopier,
    address_of,
    copier,
    each_digest,
)
from baton.fabric.stream import PIECE_BYTES, Stream
from baton.fabric.transport import Bytes

_Integers = npt.NDArray[np.int64]

_NEVER_S: Final = 1e9
"""An instant so late that its nanoseconds still fit into 64 bits."""


def send_pieces(
    stream: Stream, memory: Bytes, starts: _Integers, num_bytes: _Integers, limit: float
) -> None:
    """Send pieces of flat `memory`, from each start so many bytes, in order. They are within it."""
    body = copier()
    if not isinstance(body, NativeCopier) or stream.descriptor is None:
        slices = zip(starts.tolist(), num_bytes.tolist(), strict=True)
        stream.send([memory[start : start + length].data for start, length in slices], limit)
        return
    pieces = np.empty((len(starts), 2), np.int64)
    pieces[:, 0] = starts + memory.ctypes.data
    pieces[:, 1] = num_bytes
    _check(
        body.library.baton_send(
            stream.descriptor, pieces.ctypes.data, len(pieces), _nanoseconds(limit)
        )
    )


def receive_digested(
    stream: Stream, blocks: Sequence[memoryview], limit: float
) -> Iterator[tuple[int, bytes]]:
    """Fill the blocks in turn; yields the index and the XXH3-128 of each that is full.

    blocks: flat, writable, and not empty. After an error those that had come whole have been
    yielded.
    """
    body = copier()
    if not isinstance(body, NativeCopier) or stream.descriptor is None:
        yield from _piece_by_piece(stream, blocks, limit)
        return
    pieces = array("Q")
    for block in blocks:
        pieces.extend((address_of(block, block.nbytes), block.nbytes))
    digests = bytearray(DIGEST_BYTES * max(1, len(blocks)))
    num_full = c_int64()
    error = body.library.baton_receive(
        body.table,
        stream.descriptor,
        pieces.buffer_info()[0],
        len(blocks),
        _nanoseconds(limit),
        byref(stream.low_water),
        address_of(digests, len(digests)),
        byref(num_full),
    )
    for index, digest in enumerate(each_digest(digests)[: num_full.value]):
        block = blocks[index]
        yield index, digest if block.nbytes >= SHORTEST else xxhash.xxh3_128_digest(block)
    _check(error)


def _nanoseconds(limit: float) -> int:
    return int(1e9 * min(limit, _NEVER_S))


def _check(error: int) -> None:
    if error:
        raise OSError(error, os.strerror(error))


def _piece_by_piece(
    stream: Stream, blocks: Sequence[memoryview], limit: float
) -> Iterator[tuple[int, bytes]]:
    pieces: list[memoryview] = []
    last_of: list[int | None] = []  # for each piece: the index of the block that it completes
    for index, block in enumerate(blocks):
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
