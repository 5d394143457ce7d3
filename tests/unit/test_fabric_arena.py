"""The arena alone, within one process: seals, headers, and every way that a read can fail."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Iterator

import numpy as np
import pytest
import xxhash
from unit.copiers import COPIERS

from baton.errors import ConfigError
from baton.fabric import arena as arena_module
from baton.fabric import digest as digest_module
from baton.fabric.arena import MAGIC, PAGE_BYTES, Arena, ArenaRefused, MappedArena, StaleEpoch
from baton.fabric.digest import Copier
from baton.fabric.transport import ReadResult, Wanted
from baton.types import KvFormat

KV_FORMAT = KvFormat(16, "float32", 2, 2, 8, 6000)
FRAME_BYTES = 6000  # not a whole number of pages
KEY, OTHER = b"k" * 32, b"o" * 32
EPOCH = (1 << 64) - 5


def block(seed: int, num_bytes: int = FRAME_BYTES) -> bytes:
    return np.random.default_rng(seed).bytes(num_bytes)


@pytest.fixture(autouse=True, params=[COPIERS[0], COPIERS[-1]], ids=lambda body: body.name)
def body(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Copier:
    """The body that copies: every test is run with two, Python's and a native one."""
    made: Copier = request.param
    monkeypatch.setattr(digest_module, "copier", lambda: made)
    return made


@pytest.fixture
def arena() -> Iterator[Arena]:
    before = len(os.listdir("/proc/self/fd"))
    made = Arena.create(3, FRAME_BYTES, EPOCH, KV_FORMAT)
    yield made
    made.close()
    made.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def mapped(arena: Arena) -> Iterator[MappedArena]:
    reader = MappedArena(arena.fd, EPOCH)
    yield reader
    reader.close()
    reader.close()


def read(
    mapped: MappedArena, frame: int, key: bytes, digest: bytes, size: int = FRAME_BYTES
) -> tuple[ReadResult, bytes]:
    destination = bytearray(size)
    return mapped.read(frame, key, digest, destination), bytes(destination)


def poke(arena: Arena, offset: int, data: bytes) -> None:
    arena._memory[offset : offset + len(data)] = data


def test_round_trip(arena: Arena, mapped: MappedArena) -> None:
    for frame in range(3):
        digest = arena.write(frame, KEY, block(frame))
        assert digest == xxhash.xxh3_128_digest(block(frame))
        assert read(mapped, frame, KEY, digest) == (ReadResult.OK, block(frame))
    assert mapped.geometry == arena.geometry


@pytest.mark.parametrize("num_bytes", [1, 4096, 262_144, 262_145, 1_000_003])
def test_blocks_of_several_pieces(num_bytes: int) -> None:
    arena = Arena.create(2, 1_000_003, 1, KV_FORMAT)
    mapped = MappedArena(arena.fd, 1)
    data = np.frombuffer(block(1, num_bytes), dtype=np.uint8)
    digest = arena.write(1, KEY, data)
    destination = np.zeros(num_bytes, dtype=np.uint8)
    assert mapped.read(1, KEY, digest, destination) is ReadResult.OK
    assert np.array_equal(destination, data)
    mapped.close()
    arena.close()


def test_other_dtypes_are_taken_as_bytes(arena: Arena, mapped: MappedArena) -> None:
    data = np.arange(1500, dtype=np.float32)
    digest = arena.write(0, KEY, data)  # type: ignore[arg-type]
    destination = np.zeros((2, 750), dtype=np.float32)
    assert mapped.read(0, KEY, digest, destination) is ReadResult.OK  # type: ignore[arg-type]
    assert np.array_equal(destination.ravel(), data)


def test_what_was_never_written_is_missing(mapped: MappedArena) -> None:
    assert read(mapped, 0, KEY, b"d" * 16)[0] is ReadResult.MISSING
    assert read(mapped, 0, bytes(32), b"d" * 16)[0] is not ReadResult.OK


def test_another_key_is_missing(arena: Arena, mapped: MappedArena) -> None:
    digest = arena.write(0, KEY, block(0))
    assert read(mapped, 0, OTHER, digest)[0] is ReadResult.MISSING
    assert read(mapped, 1, KEY, digest)[0] is ReadResult.MISSING
    assert read(mapped, 0, KEY[:-1], digest)[0] is ReadResult.MISSING
    arena.write(0, OTHER, block(1))
    assert read(mapped, 0, KEY, digest)[0] is ReadResult.MISSING


def test_an_invalidated_frame_is_missing_until_written(arena: Arena, mapped: MappedArena) -> None:
    digest = arena.write(0, KEY, block(0))
    first = arena.invalidate(0)
    assert arena.invalidate(0) > first
    assert read(mapped, 0, KEY, digest)[0] is ReadResult.MISSING
    arena.write(0, KEY, block(0))
    assert read(mapped, 0, KEY, digest)[0] is ReadResult.OK


@pytest.mark.parametrize("frame", [-1, 3, 1 << 70])
def test_a_frame_number_out_of_range(mapped: MappedArena, frame: int) -> None:
    assert read(mapped, frame, KEY, b"d" * 16)[0] is ReadResult.OUT_OF_RANGE


def test_the_length_must_be_the_stored_one(arena: Arena, mapped: MappedArena) -> None:
    digest = arena.write(0, KEY, block(0, 100))
    assert read(mapped, 0, KEY, digest, 100)[0] is ReadResult.OK
    assert read(mapped, 0, KEY, digest, 99)[0] is ReadResult.WRONG_SIZE
    assert read(mapped, 0, KEY, digest, 101)[0] is ReadResult.WRONG_SIZE


def test_a_header_that_promises_more_than_a_frame(arena: Arena, mapped: MappedArena) -> None:
    digest = arena.write(0, KEY, block(0))
    poke(arena, arena.geometry.header_at(0) + 8, struct.pack("<Q", FRAME_BYTES + 1))
    assert read(mapped, 0, KEY, digest, FRAME_BYTES + 1)[0] is ReadResult.WRONG_SIZE


@pytest.mark.parametrize("at", [0, 3000, FRAME_BYTES - 1])
def test_a_flipped_bit_is_corrupt(arena: Arena, mapped: MappedArena, at: int) -> None:
    digest = arena.write(1, KEY, block(0))
    offset = arena.geometry.frame_at(1) + at
    poke(arena, offset, bytes([block(0)[at] ^ 1]))
    assert read(mapped, 1, KEY, digest)[0] is ReadResult.CORRUPT


@pytest.mark.parametrize("digest", [b"", b"d" * 16, b"d" * 32])
def test_another_digest_is_corrupt(arena: Arena, mapped: MappedArena, digest: bytes) -> None:
    arena.write(0, KEY, block(0))
    assert read(mapped, 0, KEY, digest)[0] is ReadResult.CORRUPT


@pytest.mark.parametrize("key", [KEY, OTHER], ids=["same key", "other key"])
def test_a_frame_reused_during_the_copy_is_missing(
    arena: Arena, mapped: MappedArena, monkeypatch: pytest.MonkeyPatch, key: bytes
) -> None:
    digest = arena.write(0, KEY, block(0))
    copy = arena_module.gather_and_digest

    def reuse_then_copy(*pieces: object) -> list[bytes]:
        arena.write(0, key, block(0))  # the same bytes even: only the generation tells
        return copy(*pieces)  # type: ignore[arg-type]

    monkeypatch.setattr(arena_module, "gather_and_digest", reuse_then_copy)
    assert read(mapped, 0, KEY, digest)[0] is ReadResult.MISSING


@pytest.mark.parametrize(
    ("place", "expected"),
    [(PAGE_BYTES, ReadResult.MISSING), (0, ReadResult.STALE_EPOCH)],
    ids=["the frame's header", "the epoch"],
)
def test_what_the_copy_itself_overwrites_is_seen_after_it(
    arena: Arena, mapped: MappedArena, place: int, expected: ReadResult
) -> None:
    digest = arena.write(0, KEY, block(0, 300))
    destination = arena._bytes[place : place + 300]
    assert mapped.read(0, KEY, digest, destination) is expected


def test_it_is_the_copy_that_is_digested(arena: Arena, mapped: MappedArena) -> None:
    """The destination is the frame itself, a little further on, so the source changes meanwhile."""
    digest = arena.write(0, KEY, block(0))
    start = arena.geometry.frame_at(0) + 32
    destination = arena._bytes[start : start + FRAME_BYTES]
    assert mapped.read(0, KEY, digest, destination) is ReadResult.CORRUPT
    assert destination.tobytes() != block(0)


def test_many_blocks_at_once_have_a_result_each(arena: Arena, mapped: MappedArena) -> None:
    digests = [arena.write(n, KEY, block(n)) for n in range(3)]
    poke(arena, arena.geometry.frame_at(1) + 5, b"\0\1\2")
    places = [bytearray(FRAME_BYTES) for _ in range(6)]
    frames, keys = (2, 1, 7, 0, 0, 0), (KEY, KEY, KEY, OTHER, KEY, KEY)
    places[4] = bytearray(10)
    wanted = [
        Wanted(key, frame, digests[frame % 7 % 3], place)
        for key, frame, place in zip(keys, frames, places, strict=True)
    ]
    expected = ["ok", "corrupt", "out_of_range", "missing", "wrong_size", "ok"]
    assert mapped.read_all(wanted) == expected
    assert (places[0], places[5]) == (block(2), block(0))
    assert places[2] == places[3] == bytes(FRAME_BYTES)
    assert mapped.read_all([]) == []


def test_a_write_that_ends_half_way_is_missing(
    arena: Arena, mapped: MappedArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = arena.write(0, KEY, block(0))

    def die(destination: object, source: object) -> bytes:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(arena_module, "copy_and_digest", die)
        arena.write(0, KEY, block(0))
    assert read(mapped, 0, KEY, digest)[0] is ReadResult.MISSING


def test_an_epoch_that_changes_is_stale(arena: Arena, mapped: MappedArena) -> None:
    digest = arena.write(0, KEY, block(0))
    poke(arena, 16, struct.pack("<Q", 1))
    assert read(mapped, 0, KEY, digest)[0] is ReadResult.STALE_EPOCH


def test_another_epoch_is_not_mapped(arena: Arena) -> None:
    with pytest.raises(StaleEpoch):
        MappedArena(arena.fd, EPOCH - 1)


@pytest.mark.parametrize(
    ("frame", "key", "num_bytes"),
    [(3, KEY, 1), (-1, KEY, 1), (0, b"short", 1), (0, KEY, FRAME_BYTES + 1)],
)
def test_writes_out_of_bounds_are_refused(
    arena: Arena, frame: int, key: bytes, num_bytes: int
) -> None:
    with pytest.raises(ValueError, match="of"):
        arena.write(frame, key, bytes(num_bytes))


# Seals


def test_nobody_else_can_write_shrink_or_grow(arena: Arena) -> None:
    arena.write(0, KEY, block(0))
    size = arena.geometry.total_bytes
    for open_again in (os.dup, lambda fd: os.open(f"/proc/self/fd/{fd}", os.O_RDWR)):
        fd = open_again(arena.fd)
        try:
            with pytest.raises(PermissionError):
                mmap.mmap(fd, size)
            for attempt in (
                lambda fd=fd: os.ftruncate(fd, size - PAGE_BYTES),
                lambda fd=fd: os.ftruncate(fd, size + PAGE_BYTES),
                lambda fd=fd: os.pwrite(fd, b"x", 0),
                lambda fd=fd: fcntl.fcntl(fd, 1033, 0),  # add seals
            ):
                with pytest.raises(OSError) as refused:
                    attempt()
                assert refused.value.errno in (errno.EPERM, errno.EINVAL)
        finally:
            os.close(fd)


def test_a_reader_cannot_make_its_mapping_writable(mapped: MappedArena) -> None:
    assert not mapped._bytes.flags.writeable
    with pytest.raises(TypeError):
        mapped._memory[0] = 1
    # mprotect, which Python does not offer: 0x3 is PROT_READ | PROT_WRITE.
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.c_void_p(mapped._bytes.ctypes.data)
    assert libc.mprotect(address, ctypes.c_size_t(PAGE_BYTES), 0x3) == -1
    assert ctypes.get_errno() == errno.EACCES


def sealed(content: bytes, seals: int = 0x17) -> int:
    fd = os.memfd_create("forged", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    fcntl.fcntl(fd, 1033, seals)
    return fd


def header(magic: bytes = MAGIC, num_frames: int = 1, frame_bytes: int = 8) -> bytes:
    return struct.pack("<8sQQQQ32s", magic, 1, EPOCH, num_frames, frame_bytes, bytes(32))


GOOD = header().ljust(3 * PAGE_BYTES, b"\0")


def test_the_forger_of_these_tests_can_make_a_good_one() -> None:
    fd = sealed(GOOD)
    MappedArena(fd, EPOCH).close()
    os.close(fd)


@pytest.mark.parametrize(
    ("content", "seals"),
    [
        (GOOD, 0x7),  # others could write
        (GOOD, 0x15),  # it could be shrunk under the reader
        (b"", 0x17),
        (header()[:-1], 0x17),
        (header(), 0x17),
        (header(magic=b"whatever").ljust(3 * PAGE_BYTES, b"\0"), 0x17),
        (GOOD[:-1], 0x17),
        (GOOD + b"\0", 0x17),
        (header(num_frames=2).ljust(3 * PAGE_BYTES, b"\0"), 0x17),
        (header(num_frames=(1 << 64) - 1).ljust(3 * PAGE_BYTES, b"\0"), 0x17),
        (header(frame_bytes=(1 << 64) - 1).ljust(3 * PAGE_BYTES, b"\0"), 0x17),
    ],
    ids=[
        "writable",
        "shrinkable",
        "empty",
        "header cut short",
        "header only",
        "other magic",
        "a byte too few",
        "a byte too many",
        "more frames than there are",
        "huge number of frames",
        "huge frames",
    ],
)
def test_forged_arenas_are_refused(content: bytes, seals: int) -> None:
    fd = sealed(content, seals)
    try:
        with pytest.raises(ArenaRefused):
            MappedArena(fd, EPOCH)
    finally:
        os.close(fd)


def test_what_is_no_memfd_is_refused(tmp_path: object) -> None:
    fd = os.open(f"{tmp_path}/file", os.O_RDWR | os.O_CREAT)
    os.write(fd, GOOD)
    reader, writer = os.pipe()
    try:
        for candidate in (fd, reader):
            with pytest.raises(ArenaRefused):
                MappedArena(candidate, EPOCH)
    finally:
        for used in (fd, reader, writer):
            os.close(used)


def test_other_systems_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(ConfigError, match="Linux"):
        Arena.create(1, 8, 1, KV_FORMAT)


def test_a_size_that_the_system_refuses_is_a_config_error() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match="block store"):
        Arena.create(1 << 40, 1 << 40, 1, KV_FORMAT)
    assert len(os.listdir("/proc/self/fd")) == before
