"""Shared memory: blocks of a store to a pool on the same host, and from pool to pool.

Every block of the store is fetched to another place in the pool, in a random order; all cases
move the same blocks between the same places. Reader and writer are one process here, with a
mapping each, so the bytes take the way that they take between two.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch

from baton.core.lease import LeaseTable
from baton.core.store_index import StoreIndex
from baton.fabric import digest
from baton.fabric.arena import Arena
from baton.fabric.descriptors import DescriptorServer
from baton.fabric.shm import ShmTransport
from baton.fabric.transport import ReadResult, Wanted
from baton.types import Grant, KvFormat
from parts.fabric import Row, interleaved, middle

TOTAL_BYTES = 256 << 20
BLOCK_KIB = (32, 512)
"""Of a small model, and of one of 0.5 B parameters."""
TARGET = "≥ 0.8"


class Ends:
    """A store full of random blocks, a pool, and a reader of that store."""

    def __init__(self, runtime_dir: Path, block_bytes: int) -> None:
        num_blocks = TOTAL_BYTES // block_bytes
        kv_format = KvFormat(16, "bfloat16", 1, 1, 1, block_bytes)
        secret = b"s" * 32
        rng = np.random.default_rng(0)
        self.frames = rng.permutation(num_blocks).tolist()
        self.source = torch.empty((num_blocks, block_bytes), dtype=torch.uint8).numpy()
        self.source[:] = rng.integers(0, 256, self.source.shape, dtype=np.uint8)
        self.pool = torch.zeros((num_blocks, block_bytes), dtype=torch.uint8).numpy()
        self.arena = Arena.create(num_blocks, block_bytes, 1, kv_format)
        self.keys = [index.to_bytes(32) for index in range(num_blocks)]
        self.digests = self.write()
        self.server = DescriptorServer(runtime_dir, "p0", self.arena, secret)
        self.transport = ShmTransport(runtime_dir, kv_format)
        self.grant: Grant = LeaseTable("p0", 1, secret, StoreIndex(0)).mint("g", "", 3600.0, 0.0)
        self.wanted = [
            Wanted(key, frame, digest_, place)
            for key, frame, digest_, place in zip(
                self.keys, self.frames, self.digests, self.pool, strict=True
            )
        ]
        start, stride = self.arena.geometry.frames_at, self.arena.geometry.stride
        stored = self.arena._bytes[start:].reshape(num_blocks, stride)[:, :block_bytes]
        self.pairs = [(self.pool[n], stored[frame]) for n, frame in enumerate(self.frames)]

    def write(self) -> list[bytes]:
        """Pool to store."""
        return [
            self.arena.write(frame, key, block)
            for frame, key, block in zip(self.frames, self.keys, self.source, strict=True)
        ]

    def copy(self) -> None:
        """The same blocks as `fetch`, without a question asked."""
        for place, block in self.pairs:
            np.copyto(place, block)

    def fetch(self) -> None:
        """Store to pool."""
        results = self.transport.fetch(self.grant, self.wanted, time.monotonic() + 60)
        assert all(result is ReadResult.OK for result in results), set(results)

    def fetch_with(self, body: digest.Copier) -> None:
        with running_on(body):
            self.fetch()

    def fetch_first(self) -> None:
        """As after a pause: the store must be mapped, and each page found, again."""
        self.transport.rest()
        self.fetch()

    def pool_to_pool(self) -> None:
        self.write()
        self.fetch()

    def close(self) -> None:
        self.transport.close()
        self.server.stop()
        self.pairs.clear()
        self.arena.close()


def measure(rounds: int) -> list[Row]:
    rows = []
    for block_kib in BLOCK_KIB:
        with tempfile.TemporaryDirectory(prefix="baton-fabric-") as name:
            ends = Ends(Path(name) / "run", block_kib << 10)
            try:
                rows += _rows(ends, block_kib, rounds)
            finally:
                ends.close()
    return rows


def _rows(ends: Ends, block_kib: int, rounds: int) -> list[Row]:
    cases: dict[str, Callable[[], object]] = {
        "copy": ends.copy,
        "store to pool": ends.fetch,
        "store to pool, first after a pause": ends.fetch_first,
        "pool to store": ends.write,
        "pool to pool": ends.pool_to_pool,
    }
    bodies: list[digest.Copier] = [digest.PythonCopier("asked for")]
    bodies += [found for isa in digest.ISAS if (found := digest.find_copier(isa)) is not None]
    for body in bodies:
        if body is not digest.copier():
            cases[f"store to pool, {body.name}"] = partial(ends.fetch_with, body)
    seconds = interleaved(cases, rounds)
    assert np.array_equal(ends.pool, ends.source)
    copy = seconds["copy"]
    speed, spread = middle(TOTAL_BYTES / copy / 1e9)
    size = f"blocks of {block_kib} KiB"
    note = f"{spread}; the others run on: {digest.copier().name}"
    rows = [Row(f"{size}: numpy copy", speed, "GB/s", note=note)]
    for name in list(cases)[1:]:
        value, spread = middle(copy / seconds[name])
        speed, _ = middle(TOTAL_BYTES / seconds[name] / 1e9)
        target = TARGET if name == "store to pool" else ""
        rows.append(Row(f"{size}: {name} ÷ copy", value, "", target, f"{spread}; {speed:.1f} GB/s"))
    return rows


@contextmanager
def running_on(body: digest.Copier) -> Iterator[None]:
    """Copy with `body` meanwhile."""
    best = digest.copier
    digest.copier = lambda: body  # type: ignore[assignment]
    try:
        yield
    finally:
        digest.copier = best
