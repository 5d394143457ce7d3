"""NIXL: a verified fetch beside a bare NIXL READ of the same blocks, and beside a copy of them.

The bare READ is one transfer of all blocks into registered memory, with lists prepared before:
no keys, no digests, nothing checked. Store and serving process are one process and its child; the
reader is this process.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

from baton.core.lease import LeaseTable
from baton.core.store_index import StoreIndex
from baton.errors import ConfigError
from baton.fabric.arena import Arena
from baton.fabric.digest import copier
from baton.fabric.nixl import NixlStore, NixlTransport
from baton.fabric.nixl.agent import check_installed
from baton.fabric.nixl.door import Doors
from baton.fabric.nixl.peer import Peer
from baton.fabric.transport import ReadResult, Wanted
from baton.types import KvFormat
from parts.fabric import Missing, Row, interleaved, middle

TOTAL_BYTES = 128 << 20
BLOCK_KIB = (32, 512)
TARGET = "≥ 0.9"


class Ends:
    """A store full of random blocks, a pool, and a reader of that store."""

    def __init__(self, runtime_dir: Path, block_bytes: int) -> None:
        num_blocks = TOTAL_BYTES // block_bytes
        kv_format = KvFormat(16, "bfloat16", 1, 1, 1, block_bytes)
        rng = np.random.default_rng(0)
        self.source = rng.integers(0, 256, (num_blocks, block_bytes), dtype=np.uint8)
        self.pool = np.zeros_like(self.source)
        self.frames = rng.permutation(num_blocks).astype(np.int32)
        self.arena = Arena.create(num_blocks, block_bytes, 1, kv_format)
        keys = [index.to_bytes(32, "big") for index in range(num_blocks)]
        digests = [
            self.arena.write(int(frame), key, block)
            for frame, key, block in zip(self.frames, keys, self.source, strict=True)
        ]
        secret = b"s" * 32
        self.store = NixlStore(runtime_dir, "p0", self.arena, secret)
        self.transport = NixlTransport(Doors(runtime_dir), kv_format)
        self.grant = LeaseTable("p0", 1, secret, StoreIndex(0)).mint("g", "", 3600.0, 0.0)
        self.wanted = [
            Wanted(key, int(frame), digest, place)
            for key, frame, digest, place in zip(keys, self.frames, digests, self.pool, strict=True)
        ]
        self.fetch()
        (self.peer,) = self.transport._peers.values()
        self.places = np.arange(num_blocks, dtype=np.int32)
        self.pool_list = _registered(self.peer, self.pool)

    def fetch(self) -> None:
        results = self.transport.fetch(self.grant, self.wanted, time.monotonic() + 60)
        assert all(result is ReadResult.OK for result in results), set(results)

    def read_bare(self) -> None:
        agent = self.peer._agent
        handle = agent.make_prepped_xfer(
            "READ", self.pool_list, self.places, self.peer._remote_frames, self.frames
        )
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        assert state == "DONE"
        handle.release()

    def copy(self) -> None:
        for place, block in zip(self.pool, self.source, strict=True):
            np.copyto(place, block)

    def close(self) -> None:
        self.pool_list.release()
        self.transport.close()
        self.store.stop()
        self.arena.close()


def _registered(peer: Peer, pool: np.ndarray) -> object:  # type: ignore[type-arg]
    agent, (num_blocks, block_bytes) = peer._agent, pool.shape
    agent.register_memory([(pool.ctypes.data, pool.nbytes, 0, "")], "DRAM")
    return peer._prepared("", pool.ctypes.data, block_bytes, block_bytes, num_blocks)


def measure(rounds: int) -> list[Row]:
    try:
        check_installed()
    except ConfigError as error:
        raise Missing(str(error)) from error
    rows = [Row(f"copies run on: {copier().name}", 1)]
    for block_kib in BLOCK_KIB:
        with tempfile.TemporaryDirectory(prefix="baton-fabric-") as name:
            ends = Ends(Path(name) / "run", block_kib << 10)
            try:
                rows += _rows(ends, block_kib, rounds)
            finally:
                ends.close()
    return rows


def _rows(ends: Ends, block_kib: int, rounds: int) -> list[Row]:
    seconds = interleaved({"copy": ends.copy, "bare": ends.read_bare, "fetch": ends.fetch}, rounds)
    assert np.array_equal(ends.pool, ends.source)
    size = f"blocks of {block_kib} KiB"
    copy_speed, copy_range = middle(TOTAL_BYTES / seconds["copy"] / 1e9)
    bare_speed, bare_range = middle(TOTAL_BYTES / seconds["bare"] / 1e9)
    ratio, ratio_range = middle(seconds["bare"] / seconds["fetch"])
    fetch_speed, _ = middle(TOTAL_BYTES / seconds["fetch"] / 1e9)
    of_copy, of_copy_range = middle(seconds["copy"] / seconds["fetch"])
    return [
        Row(f"{size}: numpy copy", copy_speed, "GB/s", note=copy_range),
        Row(f"{size}: bare NIXL READ", bare_speed, "GB/s", note=bare_range),
        Row(
            f"{size}: nixl ÷ bare NIXL READ",
            ratio,
            "",
            TARGET,
            f"{ratio_range}; {fetch_speed:.1f} GB/s",
        ),
        Row(f"{size}: nixl ÷ copy", of_copy, note=of_copy_range),
    ]
