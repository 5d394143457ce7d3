"""Copies and their digests, by every body that this machine has, against the `xxhash` package."""

from __future__ import annotations

import _ctypes
import ctypes
import logging
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash
from unit.copiers import COPIERS

import baton
from baton.fabric import digest
from baton.fabric.arena import Arena
from baton.fabric.digest import (
    ISAS,
    Copier,
    NativeCopier,
    copier,
    copy_and_digest,
    find_copier,
    gather_and_digest,
)
from baton.types import KvFormat

EDGES = (1, 16, 240, 241, 255, 256, 1023, 1024, 1025, 4096, 5120, 5121, 65_600)


@pytest.fixture(params=COPIERS, ids=lambda body: body.name)
def body(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Copier:
    """The body that copies in this test."""
    made: Copier = request.param
    monkeypatch.setattr(digest, "copier", lambda: made)
    return made


def noise(num_bytes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)


def aligned(num_bytes: int) -> np.ndarray:
    """Zeros that begin where a cache line does."""
    memory = np.zeros(num_bytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + num_bytes]


def reference(data: np.ndarray) -> bytes:
    return xxhash.xxh3_128_digest(data.tobytes())


def test_the_native_library_is_here_where_it_can_be_built() -> None:
    """So that a broken build is a failure, and not a suite that tests half of what it should."""
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler here")
    assert find_copier("portable") is not None
    flags = Path("/proc/cpuinfo").read_text().split()
    for isa, needed in (("avx2", {"avx2"}), ("avx512", {"avx512f", "avx512bw", "avx512dq"})):
        assert (find_copier(isa) is not None) == (needed <= set(flags)), isa


def test_the_best_instruction_set_is_chosen() -> None:
    found = [body for body in COPIERS if isinstance(body, NativeCopier)]
    assert [body.isa for body in found] == [isa for isa in ISAS if find_copier(isa)]
    assert copier() is (found[0] if found else copier())
    assert find_copier("other") is None


def test_bits_are_the_packages_for_every_short_length(body: Copier) -> None:
    source = noise(2048)
    for num_bytes in range(1, 2049):
        destination = np.zeros(num_bytes, np.uint8)
        assert copy_and_digest(destination, source[:num_bytes]) == reference(source[:num_bytes])
        assert np.array_equal(destination, source[:num_bytes])


def test_bits_are_the_packages_for_long_lengths_anywhere_in_memory(body: Copier) -> None:
    rng = random.Random(1)
    source, memory = noise(1 << 21), aligned(1 << 21)
    lengths = [rng.randrange(1, 1 << 20) for _ in range(60)]
    lengths += [1024 * n + more for n in (2, 3, 5, 100, 1000) for more in (-64, -1, 0, 1, 64)]
    for num_bytes in lengths:
        start = rng.choice((0, rng.randrange(4096)))
        end = start + num_bytes
        data, destination = source[rng.randrange(4096) :][:num_bytes], memory[start:end]
        memory[:] = 7
        assert copy_and_digest(destination, data) == reference(data), num_bytes
        assert np.array_equal(destination, data)
        assert (memory[:start] == 7).all() and (memory[end:] == 7).all(), "it wrote beyond"


@pytest.mark.parametrize("num_bytes", [241, 700, 4096])
def test_every_alignment(body: Copier, num_bytes: int) -> None:
    source, memory = noise(num_bytes + 64), aligned(num_bytes + 64)
    for at in range(64):
        data, destination = source[63 - at :][:num_bytes], memory[at : at + num_bytes]
        memory[:] = 7
        assert copy_and_digest(destination, data) == reference(data), at
        assert np.array_equal(destination, data)
        assert (memory[:at] == 7).all() and (memory[at + num_bytes :] == 7).all()


def test_many_in_one_call(body: Copier) -> None:
    """Of all lengths, in any order, from one memory; each to its own kind of place."""
    memory = noise(1 << 20)
    memory.flags.writeable = False
    sizes = [*EDGES[::-1], *EDGES]
    for only_long in (True, False):
        wanted = [size for size in sizes if size > 240 or not only_long]
        starts = [(7919 * n) % (memory.size - size) for n, size in enumerate(wanted)]
        kinds = (bytearray, lambda size: np.zeros(size, np.uint8), lambda size: aligned(size))
        places = [kinds[n % 3](size) for n, size in enumerate(wanted)]
        pieces = [memory[at : at + size] for at, size in zip(starts, wanted, strict=True)]
        assert gather_and_digest(memory, starts, wanted, places) == [reference(p) for p in pieces]
        assert [bytes(place) for place in places] == [p.tobytes() for p in pieces]
    assert gather_and_digest(memory, [], [], []) == []


def test_one_changed_byte_changes_the_digest(body: Copier) -> None:
    data = noise(3000)
    whole = reference(data)
    for at in range(0, 3000, 7):
        data[at] ^= 1
        assert copy_and_digest(np.zeros(3000, np.uint8), data) != whole, at
        data[at] ^= 1


@pytest.mark.parametrize("shift", [1, 32, 64, 4096])
@pytest.mark.parametrize("num_bytes", [1000, 65_536, 65_600])
def test_it_is_the_copy_that_is_digested(body: Copier, shift: int, num_bytes: int) -> None:
    """The source changes while it is copied: the copy lies over it, a little further on.

    What was read once and stored is digested; what is read twice is not the same twice.
    """
    memory = aligned(num_bytes + shift)
    memory[:] = noise(memory.size)
    destination = memory[shift:]
    found = copy_and_digest(destination, memory[:num_bytes])
    assert found == reference(destination)


def test_calls_release_the_gil() -> None:
    keeps_it = 0x4  # FUNCFLAG_PYTHONAPI in ctypes
    kinds = dict(digest._Table._fields_)
    assert not kinds["copy"]._flags_ & keeps_it
    assert ctypes.PYFUNCTYPE(None)._flags_ & keeps_it


@pytest.mark.parametrize(
    ("start", "size"),
    [(-1, 300), (1, 1000), (701, 300), (1 << 62, 300), (0, 1001), (900, -300), (1200, -300)],
)
def test_nothing_is_read_beyond_the_memory(body: Copier, start: int, size: int) -> None:
    destination = bytearray(abs(size))
    with pytest.raises(ValueError, match="of 1000"):
        gather_and_digest(noise(1000), [start], [size], [destination])
    assert destination == bytes(abs(size))


@pytest.mark.parametrize("size", [1, 100, 1000])
def test_nothing_is_written_beyond_a_destination(body: Copier, size: int) -> None:
    memory = bytearray(size)
    for place in (memory[:-1], memoryview(memory)[:-1], np.zeros(size - 1, np.uint8)):
        with pytest.raises(ValueError, match=r"small|bytes to copy"):
            gather_and_digest(noise(1000), [0], [size], [place])
    assert memory == bytes(size)


@pytest.mark.parametrize("size", [0, 299, 301])
def test_unlike_lengths_are_refused(body: Copier, size: int) -> None:
    destination = bytearray(size)
    with pytest.raises(ValueError, match="length"):
        copy_and_digest(destination, noise(300))
    assert destination == bytes(size)


@pytest.mark.parametrize("size", [100, 1000])
def test_what_cannot_be_written_or_has_gaps_is_refused(body: Copier, size: int) -> None:
    fixed = np.zeros(size, np.uint8)
    fixed.flags.writeable = False
    for destination in (fixed, memoryview(bytes(size)), np.zeros((size, 2), np.uint8)[:, 0]):
        with pytest.raises((TypeError, ValueError, BufferError)):
            copy_and_digest(destination, noise(size))
    with pytest.raises(ValueError, match="gaps"):
        copy_and_digest(bytearray(size), noise(2 * size)[::2])
    with pytest.raises(ValueError, match="gaps"):
        gather_and_digest(noise(2 * size)[::2], [0], [size], [bytearray(size)])


# Where there is no library, or a wrong one


@pytest.fixture
def chosen_anew() -> Iterator[None]:
    """The body is chosen again in this test, and once more after it."""
    for choice in (find_copier, copier):
        choice.cache_clear()
    yield
    for choice in (find_copier, copier):
        choice.cache_clear()


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen_anew: None) -> Path:
    """Where the library would be; nothing is there."""
    path = tmp_path / "_digest.so"
    monkeypatch.setattr(digest, "_LIBRARY", path)
    return path


def works() -> None:
    destination = bytearray(5000)
    assert copy_and_digest(destination, noise(5000)) == reference(noise(5000))
    assert destination == noise(5000).tobytes()


def test_without_the_library_python_copies(library: Path) -> None:
    assert copier().name.startswith("python (the native library is not installed")
    works()


def test_a_broken_library_is_named_and_python_copies(library: Path) -> None:
    library.write_bytes(b"this is no library")
    assert copier().name.startswith("python (the native library cannot be loaded")
    works()


def test_another_library_is_named_and_python_copies(library: Path) -> None:
    library.symlink_to(_ctypes.__file__)
    assert "baton_copier" in copier().name
    works()


def test_a_library_of_another_version_is_not_used(
    monkeypatch: pytest.MonkeyPatch, chosen_anew: None
) -> None:
    if not digest._LIBRARY.exists():
        pytest.skip("no library here")
    version = digest._VERSION
    monkeypatch.setattr(digest, "_VERSION", 0)
    assert f"has version {version}, not 0" in copier().name
    works()


def test_the_log_says_which_body_copies(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "baton.fabric"):
        Arena.create(1, 8, 1, KvFormat(16, "float32", 1, 1, 8, 8)).close()
    assert f"digest={copier().name}" in caplog.text


def test_it_works_without_torch() -> None:
    script = (
        "import sys, baton.fabric.shm as _, baton.fabric.digest as d\n"
        "d.copy_and_digest(bytearray(5000), __import__('numpy').zeros(5000, 'u1'))\n"
        "assert 'torch' not in sys.modules\n"
        "print(d.copier().name)"
    )
    source_dir = str(Path(baton.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": source_dir}
    said = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60
    )
    assert said.stdout.strip() == copier().name, said.stderr
