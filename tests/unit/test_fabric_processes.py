"""A worker's store in one process, read from another: the whole way, and sudden deaths."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

import baton
from baton.core.lease import verify_mac
from baton.fabric.shm import ShmTransport
from baton.fabric.transport import ReadResult, Wanted
from baton.types import Grant, KvFormat

KV_FORMAT = KvFormat(16, "float32", 2, 2, 8, 300_000)
NUM_BLOCKS = 4

# What it prints first: the grant and the digests, in hexadecimal msgpack. Then it obeys a line
# at a time: "flip FRAME", "reuse FRAME", "churn FRAME", "stop"; and says "done".
WRITER = """
import sys
from pathlib import Path
import msgspec
from baton.core.lease import LeaseTable
from baton.core.store_index import StoreIndex
from baton.fabric.arena import Arena
from baton.fabric.descriptors import DescriptorServer
from baton.types import KvFormat

epoch, num_blocks = int(sys.argv[2]), int(sys.argv[3])
kv_format = msgspec.json.decode(sys.argv[4], type=KvFormat)
arena = Arena.create(num_blocks, kv_format.block_bytes, epoch, kv_format)
index = StoreIndex(num_blocks)
secret = b"secret of this epoch"
leases = LeaseTable("p0", epoch, secret, index)
grant = leases.mint("an-id-nobody-guesses", "tenant", 30.0, now=0.0)
assert index.reserve(num_blocks)
digests = []
for n in range(num_blocks):
    key = bytes([n]) * 32
    begun = index.begin(key)
    assert begun.write and begun.frame == n and leases.cover(grant.grant_id, key)
    digests.append(arena.write(n, key, bytes([n + 1]) * kv_format.block_bytes))
    index.seal(key, digests[-1])
server = DescriptorServer(Path(sys.argv[1]), "p0", arena, secret)
print(msgspec.msgpack.encode((grant, digests)).hex(), flush=True)
for line in sys.stdin:
    word, _, frame = line.strip().partition(" ")
    if word == "flip":
        at = arena.geometry.frame_at(int(frame)) + 123_456
        arena._memory[at] ^= 0x10
    elif word == "reuse":
        arena.write(int(frame), b"another key".ljust(32), b"other tokens")
    elif word == "churn":
        for turn in range(1000):
            value = 99 if turn % 2 == 0 else int(frame) + 1
            arena.write(int(frame), bytes([int(frame)]) * 32, bytes([value]) * 300_000)
    elif word == "stop":
        break
    print("done", flush=True)
server.stop()
arena.close()
"""


class Writer:
    def __init__(self, runtime_dir: Path, epoch: int = 1) -> None:
        source_dir = str(Path(baton.__file__).parents[1])
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                WRITER,
                str(runtime_dir),
                str(epoch),
                str(NUM_BLOCKS),
                msgspec.json.encode(KV_FORMAT).decode(),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": source_dir},
            text=True,
        )
        self.grant, self.digests = msgspec.msgpack.decode(
            bytes.fromhex(self.read_line()), type=tuple[Grant, list[bytes]]
        )

    def read_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        print(line, file=self.process.stdin, flush=True)
        assert self.read_line() == "done"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)  # it takes its time

    def close(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.communicate("stop\n" if self.process.poll() is None else None, timeout=10)


class Fetched(NamedTuple):
    results: list[ReadResult]
    num_right: int
    elapsed_s: float


def fetch(transport: ShmTransport, writer: Writer, seconds: float = 10.0) -> Fetched:
    blocks = [bytearray(KV_FORMAT.block_bytes) for _ in range(NUM_BLOCKS)]
    wanted = [
        Wanted(bytes([n]) * 32, n, digest, blocks[n]) for n, digest in enumerate(writer.digests)
    ]
    started = time.monotonic()
    results = transport.fetch(writer.grant, wanted, started + seconds)
    elapsed_s = time.monotonic() - started
    num_right = sum(block == bytes([n + 1]) * len(block) for n, block in enumerate(blocks))
    return Fetched(results, num_right, elapsed_s)


@pytest.fixture
def runtime_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def writer(runtime_dir: Path) -> Iterator[Writer]:
    made = Writer(runtime_dir)
    yield made
    made.close()


@pytest.fixture
def transport(runtime_dir: Path) -> Iterator[ShmTransport]:
    made = ShmTransport(runtime_dir, KV_FORMAT)
    yield made
    made.close()


def test_round_trip(writer: Writer, transport: ShmTransport, runtime_dir: Path) -> None:
    fetched = fetch(transport, writer)
    assert fetched.results == [ReadResult.OK] * NUM_BLOCKS
    assert fetched.num_right == NUM_BLOCKS
    assert verify_mac(b"secret of this epoch", writer.grant)
    writer.close()
    assert writer.process.returncode == 0
    assert list(runtime_dir.iterdir()) == []


def test_a_killed_writer(writer: Writer, transport: ShmTransport, runtime_dir: Path) -> None:
    fetch(transport, writer)
    writer.kill()
    assert fetch(transport, writer).num_right == NUM_BLOCKS, "who has it mapped may finish"
    late = ShmTransport(runtime_dir, KV_FORMAT)
    fetched = fetch(late, writer)
    assert fetched.results == [ReadResult.UNREACHABLE] * NUM_BLOCKS
    assert fetched.elapsed_s < 5.0, "half of the time that it was given"
    late.close()


def test_a_frozen_writer(writer: Writer, transport: ShmTransport, runtime_dir: Path) -> None:
    fetch(transport, writer)
    writer.freeze()
    assert fetch(transport, writer).num_right == NUM_BLOCKS
    late = ShmTransport(runtime_dir, KV_FORMAT)
    fetched = fetch(late, writer, seconds=0.3)
    assert fetched.results == [ReadResult.TIMED_OUT] * NUM_BLOCKS
    assert fetched.elapsed_s < 5.0
    late.close()


def test_a_restarted_writer(writer: Writer, transport: ShmTransport, runtime_dir: Path) -> None:
    writer.kill()
    successor = Writer(runtime_dir, epoch=2)
    assert fetch(transport, writer).results == [ReadResult.STALE_EPOCH] * NUM_BLOCKS
    assert fetch(transport, successor).num_right == NUM_BLOCKS
    forged = msgspec.structs.replace(writer.grant, epoch=2)
    other = ShmTransport(runtime_dir, KV_FORMAT)
    assert other.fetch(forged, [Wanted(b"", 0, b"", bytearray(1))], time.monotonic() + 5) == [
        ReadResult.REFUSED
    ]
    successor.close()


def test_a_flipped_bit_and_a_reused_frame(writer: Writer, transport: ShmTransport) -> None:
    assert fetch(transport, writer).num_right == NUM_BLOCKS
    writer.tell("flip 1")
    writer.tell("reuse 2")
    fetched = fetch(transport, writer)
    assert fetched.results == ["ok", "corrupt", "missing", "ok"]
    assert fetched.num_right == 2


def test_a_frame_rewritten_all_the_time_is_never_read_wrong(
    writer: Writer, transport: ShmTransport
) -> None:
    """Frame 3 gets wrong bytes, under the very key that is asked for, and right ones, in turns."""
    assert writer.process.stdin is not None
    assert fetch(transport, writer).num_right == NUM_BLOCKS
    seen = set()
    for _ in range(20):  # rounds; on a busy machine the two may miss each other in some
        print("churn 3", file=writer.process.stdin, flush=True)
        for _ in range(300):
            fetched = fetch(transport, writer)
            seen.add(fetched.results[3])
            assert fetched.results[:3] == ["ok"] * 3
            assert fetched.num_right >= fetched.results.count(ReadResult.OK)
        assert writer.read_line() == "done"
        assert fetch(transport, writer).num_right == NUM_BLOCKS
        if seen > {ReadResult.OK}:
            break
    assert seen > {ReadResult.OK}, "writer and reader never met"
