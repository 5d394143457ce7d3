"""Many blocks through a stream: sent from where they lie, received where they belong.

    native   csrc/digest/socket.h: one call for all blocks, which releases the GIL and digests what
             has come while the kernel receives what follows; for connections without TLS
    python   piece by piece; with TLS, or without the library

Limits and errors are those of `Stream`, and so is who may use it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from ctypes import addressof, byref, c_char, c_int64
from typing import Final

import numpy as np
import numpy.typing as npt
import xxhash

from baton.fabric.digest import (
    DIGEST_BYTES,
    SHORTEST,
    NativeCopier,
    copier,
    each_digest,
)
from baton.fabric.stream import PIECE_BYTES, Stream
from baton.fabric.transport import Bytes

_Integers = npt.NDArray[np.int64]

_first_of = c_char.from_buffer
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
        body.native.baton_send(
            stream.descriptor, pieces.ctypes.data, len(pieces), _nanoseconds(limit)
        )
    )


def receive_digested(
    stream: Stream, blocks: Sequence[memoryview], digests: list[bytes], limit: float
) -> None:
    """Fill the blocks in turn, and add the XXH3-128 of each to `digests`; after an error, of those
    that had come whole.

    blocks: flat, writable, and not empty.
    """
    body = copier()
    if not isinstance(body, NativeCopier) or stream.descriptor is None:
        for digest in _piece_by_piece(stream, blocks, limit):
            digests.append(digest)  # noqa: PERF402 - one by one: those before an error stay
        return
    count = len(blocks)
    pieces = np.empty((count, 2), np.uint64)
    pieces[:, 0] = [addressof(_first_of(block)) for block in blocks]
    pieces[:, 1] = [block.nbytes for block in blocks]
    found: Bytes = np.empty(DIGEST_BYTES * count, np.uint8)
    num_full = c_int64()
    code = body.native.baton_receive(
        body.table,
        stream.descriptor,
        pieces.ctypes.data,
        count,
        _nanoseconds(limit),
        byref(stream.low_water),
        found.ctypes.data,
        byref(num_full),
    )
    digests += each_digest(found)[: num_full.value]
    if count and int(pieces[:, 1].min()) < SHORTEST:
        for index, block in enumerate(blocks[: num_full.value], len(digests) - num_full.value):
            if block.nbytes < SHORTEST:
                digests[index] = xxhash.xxh3_128_digest(block)
    _check(code)


def _nanoseconds(limit: float) -> int:
    return int(1e9 * min(limit, _NEVER_S))


def _check(code: int) -> None:
    if code:
        raise OSError(code, os.strerror(code))


def _piece_by_piece(stream: Stream, blocks: Sequence[memoryview], limit: float) -> Iterator[bytes]:
    pieces: list[memoryview] = []
    is_last: list[bool] = []  # of its block
    for block in blocks:
        for start in range(0, block.nbytes, PIECE_BYTES):
            pieces.append(block[start : start + PIECE_BYTES])
            is_last.append(start + PIECE_BYTES >= block.nbytes)
    state: xxhash.xxh3_128 | None = None
    for number in stream.fill(pieces, limit):
        if is_last[number] and state is None:
            yield xxhash.xxh3_128_digest(pieces[number])
            continue
        state = state or xxhash.xxh3_128()
        state.update(pieces[number])
        if is_last[number]:
            yield state.digest()
            state = None
