"""Copying blocks with their digest, XXH3-128: the one way that bytes enter or leave a store.

    native   csrc/digest, loaded with ctypes: copies and digests in one pass, many blocks a call
    python   numpy and the `xxhash` package, piece by piece; where there is no native library

Both give the same bits. Whichever runs, the digest is that of the copy and not of the source,
which another process may be writing; csrc/digest/digest.h says how that holds in one pass. Both
release the GIL. Nothing here needs torch.
"""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Sequence
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    c_char,
    c_char_p,
    c_int,
    c_int32,
    c_int64,
    c_void_p,
)
from functools import cache
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import xxhash

from baton.fabric.transport import Bytes, WritableBlock

DIGEST_BYTES: Final = 16
ISAS: Final = ("avx512", "avx2", "portable")
"""Instruction sets, best first."""

SHORTEST: Final = 241
"""Bytes; what is shorter the native library does not digest (kShortest in csrc/digest/digest.h)."""

_VERSION: Final = 2  # kDigestVersion there
_LIBRARY = Path(__file__).with_name("_digest.so")
# Large enough to release the GIL for (xxhash does so over 100 kB), small enough that the digest
# reads from cache what the copy has just brought there.
_PIECE_BYTES: Final = 256 << 10


def copy_and_digest(destination: WritableBlock, source: Bytes) -> bytes:
    """Copy flat bytes to as long a `destination`; returns the 16-byte digest of the copy.

    Raises:
        ValueError: the lengths differ.
        TypeError, ValueError: the destination cannot be written, or has gaps.
    """
    if num_bytes_of(destination) != source.size:
        raise ValueError(f"{source.size} bytes to copy to another length")
    return gather_and_digest(source, (0,), (source.size,), (destination,))[0]


def gather_and_digest(
    memory: Bytes,
    starts: Sequence[int],
    sizes: Sequence[int],
    destinations: Sequence[WritableBlock],
) -> list[bytes]:
    """Copy pieces of flat `memory`, from each start so many bytes, to each destination's begin.

    Returns the 16-byte digest of each copy, in order. All are copied in one call.

    Raises:
        ValueError: a piece is not within `memory`, or longer than its destination.
        TypeError, ValueError: a destination cannot be written, or has gaps.
    """
    if not memory.flags.c_contiguous:
        raise ValueError("memory with gaps")
    end = memory.size
    for start, size in zip(starts, sizes, strict=True):
        if not 0 <= start <= start + size <= end:
            raise ValueError(f"{size} bytes from {start} of {end}")
    return copier().gather(memory, starts, sizes, destinations)


def num_bytes_of(block: WritableBlock) -> int:
    """How long a block is, of whatever kind."""
    return memoryview(block).nbytes  # type: ignore[arg-type]  # numpy's buffers have types from 3.12


class Copier(Protocol):
    """A body of `gather_and_digest`, which has checked that the pieces are within the memory.

    `name` is for the log.
    """

    name: str

    def gather(
        self,
        memory: Bytes,
        starts: Sequence[int],
        sizes: Sequence[int],
        destinations: Sequence[WritableBlock],
    ) -> list[bytes]: ...


class PythonCopier:
    """Copies and digests piece by piece. `reason` says why it is not the native library."""

    def __init__(self, reason: str) -> None:
        self.name = f"python ({reason})"

    def gather(
        self,
        memory: Bytes,
        starts: Sequence[int],
        sizes: Sequence[int],
        destinations: Sequence[WritableBlock],
    ) -> list[bytes]:
        digests = []
        for start, size, destination in zip(starts, sizes, destinations, strict=True):
            target: Bytes = np.frombuffer(destination, dtype=np.uint8)[:size]
            if target.size != size:
                raise ValueError(f"{size} bytes to copy to {target.size}")
            state = xxhash.xxh3_128()
            for at in range(0, size, _PIECE_BYTES):
                piece = target[at : at + _PIECE_BYTES]
                np.copyto(piece, memory[start + at : start + at + piece.size])
                state.update(piece.data)
            digests.append(state.digest())
        return digests


class _Table(Structure):
    _fields_ = [
        ("version", c_int64),
        ("isa", c_char_p),
        ("copy", CFUNCTYPE(None, c_void_p, c_int64, c_void_p)),
        ("digest_some", c_void_p),
    ]


class NativeCopier:
    """The functions for one instruction set. What is too short for them the package does.

    native, table: where they come from, for who calls others of it (`bulk`).
    """

    def __init__(self, native: ctypes.CDLL, table: ctypes._Pointer[_Table]) -> None:
        self.native = native
        self.table = table
        self.isa = str(table.contents.isa, "ascii")
        self.name = f"native isa={self.isa}"
        self._copy = table.contents.copy
        self._short = PythonCopier("too short")

    def gather(
        self,
        memory: Bytes,
        starts: Sequence[int],
        sizes: Sequence[int],
        destinations: Sequence[WritableBlock],
    ) -> list[bytes]:
        if min(sizes, default=0) < SHORTEST:
            return self._short.gather(memory, starts, sizes, destinations)
        base = int(memory.ctypes.data)
        copies = array("Q")
        for start, size, destination in zip(starts, sizes, destinations, strict=True):
            copies.extend((address_of(destination, size), base + start, size))
        digests = bytearray(DIGEST_BYTES * len(sizes))
        self._copy(copies.buffer_info()[0], len(sizes), address_of(digests, len(digests)))
        return each_digest(digests)


def each_digest(digests: bytearray | Bytes) -> list[bytes]:
    """Digests that lie one after the other."""
    found = bytes(digests)
    return [found[at : at + DIGEST_BYTES] for at in range(0, len(found), DIGEST_BYTES)]


def address_of(writable: WritableBlock, size: int) -> int:
    """Where a buffer begins, if it can be written, has no gaps and at least `size` (> 0) bytes."""
    # ctypes makes all these checks, of the last byte that is needed.
    last = c_char.from_buffer(writable, size - 1)  # type: ignore[arg-type]  # as above
    return ctypes.addressof(last) - (size - 1)


@cache
def find_copier(isa: str) -> NativeCopier | None:
    """The native body for `isa`, or None if this processor or the installed library has none.

    Raises:
        OSError: the library is there, but cannot be loaded, or is of another version.
    """
    if not _LIBRARY.exists():
        return None
    library = ctypes.CDLL(str(_LIBRARY), mode=os.RTLD_NOW)
    library.baton_copier.restype = POINTER(_Table)
    library.baton_copier.argtypes = [c_char_p]
    found = library.baton_copier(isa.encode())
    if not found:
        return None
    if found.contents.version != _VERSION:
        raise OSError(f"{_LIBRARY.name} has version {found.contents.version}, not {_VERSION}")
    library.baton_send.restype = library.baton_receive.restype = c_int64
    library.baton_send.argtypes = [c_int, c_void_p, c_int64, c_int64]
    library.baton_receive.argtypes = [
        *(POINTER(_Table), c_int, c_void_p, c_int64, c_int64),
        *(POINTER(c_int32), c_void_p, POINTER(c_int64)),
    ]
    return NativeCopier(library, found)


@cache
def copier() -> Copier:
    """The best body here."""
    try:
        for isa in ISAS:
            if (found := find_copier(isa)) is not None:
                return found
    except (OSError, AttributeError) as error:
        return PythonCopier(f"the native library cannot be loaded: {error}")
    return PythonCopier("the native library is not installed, make kernels builds it")
