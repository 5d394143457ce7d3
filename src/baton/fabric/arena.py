"""The block store's memory: one sealed memfd of fixed-size frames, and how it is read.

    page 0         magic, version, epoch, num_frames, frame_bytes, hash of the kv_format
    then           one 64-byte header a frame: generation u64, num_bytes u64, key 32 B, digest 16 B
    page-aligned   num_frames frames of frame_bytes each, page-aligned

The writer maps it for writing and then seals it, so that nobody, itself included, can map it for
writing again, and nobody can shrink it under a reader. It dies with the last process that has it
open; no name is left behind.

A frame's header is a sequence lock: the generation is odd while the frame is written. Python
gives no memory fences, so generation checks only make a mismatch early and cheap to name; what
makes a read right is that the digest of the *copy* is the one from the commit record.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import mmap
import os
import struct
from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from baton.errors import BatonError, ConfigError
from baton.fabric.digest import copier, copy_and_digest, gather_and_digest, num_bytes_of
from baton.fabric.transport import Bytes, ReadableBlock, ReadResult, Wanted, WritableBlock
from baton.types import KvFormat

logger = logging.getLogger(__name__)

MAGIC: Final = b"BATONKV\0"
VERSION: Final = 1
KEY_BYTES: Final = 32
PAGE_BYTES: Final = 4096

_HEADER = struct.Struct("<8sQQQQ32s")  # magic, version, epoch, num_frames, frame_bytes, kv_format
_U64, _EPOCH_AT = struct.Struct("<Q"), 16
_FRAME_HEADER = struct.Struct("<QQ32s16s")  # generation, num_bytes, key, digest
FRAME_HEADERS: Final = np.dtype(
    [("generation", "<u8"), ("num_bytes", "<u8"), ("key", "<u8", (4,)), ("digest", "<u8", (2,))]
)
"""The same, for whoever reads whole pages of headers."""
# From <linux/fcntl.h>; spelled out, so that this module can be imported on other systems.
_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034
_SEAL, _SHRINK, _GROW, _FUTURE_WRITE = 0x1, 0x2, 0x4, 0x10
_SEALS = _SEAL | _SHRINK | _GROW | _FUTURE_WRITE


class ArenaRefused(BatonError):
    """A descriptor from a peer that is not an arena which can be read safely."""


class StaleEpoch(BatonError):
    """An arena of another epoch than the one asked for."""


def kv_format_hash(kv_format: KvFormat) -> bytes:
    """32 bytes that are equal for equal formats."""
    return hashlib.sha256(msgspec.msgpack.encode(kv_format)).digest()


class Geometry(msgspec.Struct, frozen=True):
    """Where things lie in an arena; also what its first page says of itself."""

    epoch: int
    num_frames: int
    frame_bytes: int
    kv_format_hash: bytes

    @property
    def stride(self) -> int:
        """Bytes from one frame to the next."""
        return _round_up(self.frame_bytes)

    @property
    def frames_at(self) -> int:
        """Offset of frame 0."""
        return PAGE_BYTES + _round_up(self.num_frames * _FRAME_HEADER.size)

    @property
    def total_bytes(self) -> int:
        return self.frames_at + self.num_frames * self.stride

    def header_at(self, frame: int) -> int:
        return PAGE_BYTES + frame * _FRAME_HEADER.size

    def frame_at(self, frame: int) -> int:
        return self.frames_at + frame * self.stride


class Arena:
    """A worker's own block store, for writing. Call `create`.

    Only one thread writes (the fabric thread). `fd` is the descriptor to hand to readers.
    """

    def __init__(self, fd: int, memory: mmap.mmap, geometry: Geometry) -> None:
        self.fd = fd
        self.geometry = geometry
        self._memory = memory
        self._bytes: Bytes = np.frombuffer(memory, dtype=np.uint8)
        self._frames_at, self._stride = geometry.frames_at, geometry.stride  # to ask but once

    @classmethod
    def create(cls, num_frames: int, frame_bytes: int, epoch: int, kv_format: KvFormat) -> Arena:
        """An empty store. Memory is taken from the system as frames are first written.

        epoch: 0 to 2**64 - 1. frame_bytes: the longest block that a frame can take.

        Raises:
            ConfigError: not on Linux, or the system does not give that much memory.
        """
        if not hasattr(os, "memfd_create"):
            raise ConfigError("the block store needs Linux (memfd_create); run Baton there")
        geometry = Geometry(epoch, num_frames, frame_bytes, kv_format_hash(kv_format))
        fd = -1
        try:
            fd = os.memfd_create("baton-store", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, geometry.total_bytes)
            memory = mmap.mmap(fd, geometry.total_bytes)
            _HEADER.pack_into(
                memory, 0, MAGIC, VERSION, epoch, num_frames, frame_bytes, geometry.kv_format_hash
            )
            fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)
        except (OSError, OverflowError, ValueError) as error:
            if fd >= 0:
                os.close(fd)
            raise ConfigError(
                f"cannot make a block store of {geometry.total_bytes} bytes: {error}"
            ) from error
        logger.info("store num_frames=%d digest=%s", num_frames, copier().name)
        return cls(fd, memory, geometry)

    def write(self, frame: int, key: bytes, source: ReadableBlock) -> bytes:
        """Copy `source` into `frame` under `key`; returns the 16-byte digest of what is stored.

        Raises:
            ValueError: no such frame, a key that is not 32 bytes, or a source over frame_bytes.
        """
        data: Bytes = np.frombuffer(source, dtype=np.uint8)
        if not 0 <= frame < self.geometry.num_frames:
            raise ValueError(f"frame {frame} of {self.geometry.num_frames}")
        if len(key) != KEY_BYTES or data.size > self.geometry.frame_bytes:
            raise ValueError(f"key of {len(key)} bytes, block of {data.size}")
        generation = self.invalidate(frame)
        start = self._frames_at + frame * self._stride
        digest = copy_and_digest(self._bytes[start : start + data.size], data)
        header_at = self.geometry.header_at(frame)
        _FRAME_HEADER.pack_into(self._memory, header_at, generation, data.size, key, digest)
        _U64.pack_into(self._memory, header_at, generation + 1)
        return digest

    def invalidate(self, frame: int) -> int:
        """Make `frame` unreadable until it is written again; returns its generation, odd."""
        header_at = self.geometry.header_at(frame)
        generation: int = _U64.unpack_from(self._memory, header_at)[0]
        generation += 1 + generation % 2
        _U64.pack_into(self._memory, header_at, generation)
        return generation

    def close(self) -> None:
        """Unmap and close. Readers who have it mapped may finish."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            del self._bytes
            self._memory.close()


class MappedArena:
    """Another worker's block store, mapped read-only from a descriptor that it handed over.

    The descriptor stays the caller's and may be closed at once. Nothing in the memory is trusted
    before it is checked.

    Raises:
        ArenaRefused: not a memfd with all seals, or its header and size do not fit.
        StaleEpoch: its epoch is not `expected_epoch`.
    """

    def __init__(self, fd: int, expected_epoch: int) -> None:
        self.geometry = _validated(fd, expected_epoch)
        try:
            self._memory = mmap.mmap(fd, self.geometry.total_bytes, prot=mmap.PROT_READ)
        except OSError as error:
            raise ArenaRefused(f"cannot map the arena: {error}") from error
        self._bytes: Bytes = np.frombuffer(self._memory, dtype=np.uint8)
        self._headers: npt.NDArray[np.void] = np.frombuffer(
            self._memory, FRAME_HEADERS, self.geometry.num_frames, PAGE_BYTES
        )
        self._frames_at, self._stride = self.geometry.frames_at, self.geometry.stride

    def read(self, frame: int, key: bytes, digest: bytes, destination: WritableBlock) -> ReadResult:
        """`read_all` of one block."""
        return self.read_all((Wanted(key, frame, digest, destination),))[0]

    def read_all(self, wanted: Sequence[Wanted]) -> list[ReadResult]:
        """Copy each block to its destination, if its frame holds its key whole and the copy has
        its digest; one result for each, in order.

        All are copied in one call, between the checks before and those after. After anything but
        OK a destination's content is garbage.
        """
        memory, geometry = self._memory, self.geometry
        results: list[ReadResult] = []
        copied: list[tuple[int, Wanted, int, int]] = []  # where in `results`, generation before
        starts, sizes, destinations = [], [], []
        for index, block in enumerate(wanted):
            if not 0 <= block.frame < geometry.num_frames:
                results.append(ReadResult.OUT_OF_RANGE)
                continue
            header_at = geometry.header_at(block.frame)
            generation, num_bytes, key, _ = _FRAME_HEADER.unpack_from(memory, header_at)
            if generation % 2 or key != block.key:
                results.append(ReadResult.MISSING)
                continue
            destination = block.destination
            if num_bytes != num_bytes_of(destination) or num_bytes > geometry.frame_bytes:
                results.append(ReadResult.WRONG_SIZE)
                continue
            results.append(ReadResult.OK)
            copied.append((index, block, header_at, generation))
            starts.append(self._frames_at + block.frame * self._stride)
            sizes.append(num_bytes)
            destinations.append(destination)
        digests = gather_and_digest(self._bytes, starts, sizes, destinations)
        (epoch,) = _U64.unpack_from(memory, _EPOCH_AT)
        for (index, block, header_at, generation), digest in zip(copied, digests, strict=True):
            if _U64.unpack_from(memory, header_at)[0] != generation:
                results[index] = ReadResult.MISSING
            elif epoch != geometry.epoch:
                results[index] = ReadResult.STALE_EPOCH
            elif digest != block.digest:
                results[index] = ReadResult.CORRUPT
        return results

    def header(self, frame: int) -> tuple[int, int, bytes, bytes]:
        """What stands over `frame`: generation (odd while it is written), num_bytes, key, digest.

        frame: 0 to num_frames - 1.
        """
        return _FRAME_HEADER.unpack_from(self._memory, PAGE_BYTES + frame * _FRAME_HEADER.size)

    def headers(self, frames: npt.NDArray[np.int64]) -> npt.NDArray[np.void]:
        """What stands over each of these frames: [len(frames)] of `FRAME_HEADERS`, a copy."""
        return self._headers[frames]

    @property
    def memory(self) -> Bytes:
        """All of it, read-only and not a copy. Let go of it before `close`."""
        return self._bytes

    def starts_at(self, frames: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where frames begin in `memory`."""
        return self._frames_at + frames * self._stride

    def stored(self, frame: int, num_bytes: int) -> memoryview:
        """The first `num_bytes` of `frame` itself, not a copy. Let go of it before `close`."""
        start = self._frames_at + frame * self._stride
        return self._bytes[start : start + num_bytes].data

    def close(self) -> None:
        """Unmap."""
        if not self._memory.closed:
            del self._bytes, self._headers
            self._memory.close()


def first_bytes(geometry: Geometry) -> bytes:
    """What the first page of an arena of this geometry begins with."""
    return _HEADER.pack(
        MAGIC,
        VERSION,
        geometry.epoch,
        geometry.num_frames,
        geometry.frame_bytes,
        geometry.kv_format_hash,
    )


def _validated(fd: int, expected_epoch: int) -> Geometry:
    try:
        seals = fcntl.fcntl(fd, _F_GET_SEALS)
        size = os.fstat(fd).st_size
        header = os.pread(fd, _HEADER.size, 0)
    except OSError as error:
        raise ArenaRefused(f"not a memfd: {error}") from error
    if seals & _SEALS != _SEALS:
        raise ArenaRefused(f"not sealed: {seals:#x}")
    if len(header) != _HEADER.size:
        raise ArenaRefused(f"{size} bytes are too few")
    magic, version, epoch, num_frames, frame_bytes, hash_ = _HEADER.unpack(header)
    if magic != MAGIC or version != VERSION:
        raise ArenaRefused(f"not an arena of version {VERSION}")
    geometry = Geometry(epoch, num_frames, frame_bytes, hash_)
    if geometry.total_bytes != size:
        raise ArenaRefused(f"{size} bytes do not hold {num_frames} frames of {frame_bytes}")
    if epoch != expected_epoch:
        raise StaleEpoch(f"epoch {epoch}, wanted {expected_epoch}")
    return geometry


def _round_up(num_bytes: int) -> int:
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
