"""Which way to a source a worker takes: that it is on this host is proved, not believed."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from baton.config import load_config
from baton.core.lease import LeaseTable
from baton.core.store_index import StoreIndex
from baton.engine.inbox import Wire
from baton.fabric.arena import Arena
from baton.fabric.descriptors import DescriptorServer
from baton.fabric.transport import ReadResult, Transport, Wanted
from baton.rpc.messages import Address
from baton.types import Grant, KvFormat
from baton.worker.ways import Ways

KV_FORMAT = KvFormat(16, "float32", 2, 2, 8, 4096)
SECRET = b"s" * 32
KEY = b"k" * 32
EPOCH = 9
NOBODY = Address("p0", EPOCH, "127.0.0.1", 9)  # where nothing listens


def mint(epoch: int = EPOCH) -> Grant:
    return LeaseTable("p0", epoch, SECRET, StoreIndex(0)).mint("grant", "t", 30.0, now=0.0)


class Here:
    """A worker p0 on this host, with a block in frame 1."""

    def __init__(self, runtime_dir: Path, epoch: int = EPOCH) -> None:
        self.arena = Arena.create(2, 4096, epoch, KV_FORMAT)
        self.digest = self.arena.write(1, KEY, bytes(4096))
        self.server = DescriptorServer(runtime_dir, "p0", self.arena, SECRET)

    def close(self) -> None:
        self.server.stop()
        self.arena.close()


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def runtime_dir(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir(mode=0o700)
    return tmp_path / "run"


class Reader:
    """Another worker; `said` is what it logs of its choices, `wires` what it tells the engine."""

    def __init__(self, runtime_dir: Path, *, knows: Address | None = NOBODY, **fields: str) -> None:
        self.wires: list[Wire] = []
        config = load_config(None, {f"fabric.{field}": value for field, value in fields.items()})
        self.ways = Ways(config, runtime_dir, KV_FORMAT, self.wires.append)
        self.ways.peers = {knows.worker_id: knows} if knows else {}
        self.way: Transport = self.ways.to("p0")

    def fetch(self, digest: bytes = b"d" * 16, grant: Grant | None = None) -> ReadResult:
        wanted = [Wanted(KEY, 1, digest, np.empty(4096, np.uint8))]
        (result,) = self.way.fetch(grant or mint(), wanted, time.monotonic() + 5)
        return result


def choices(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Name and reason of each choice so far."""
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("transport ")]
    words = [line.partition("name=")[2].partition(" reason=") for line in lines]
    return [(name, reason) for name, _, reason in words]


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def test_shared_memory_on_this_host(
    runtime_dir: Path, stack: contextlib.ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    here = stack.enter_context(contextlib.closing(Here(runtime_dir)))
    reader = Reader(runtime_dir)
    stack.callback(reader.way.close)
    assert reader.fetch(here.digest) is ReadResult.OK
    assert choices(caplog) == [("shm", "it is on this host: its store came over a Unix socket")]
    assert reader.wires == []
    assert reader.ways.counters["blocks_by_shm"] == 1
    assert reader.ways.names(mint(), KV_FORMAT) == ["shm", "tcp"]


def test_a_socket_that_is_left_over_proves_nothing(
    runtime_dir: Path, stack: contextlib.ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(runtime_dir / "p0.kv.sock"))
    reader = Reader(runtime_dir)
    stack.callback(reader.way.close)
    assert reader.fetch() is ReadResult.UNREACHABLE
    ((name, reason),) = choices(caplog)
    assert name == "tcp" and reason.startswith("it is not on this host: ")
    assert reader.wires == [Wire("p0")]
    assert reader.ways.counters["blocks_by_tcp"] == 0
    assert reader.ways.names(mint(), KV_FORMAT) == ["tcp"]


def test_nor_does_another_start_of_a_worker_with_its_name(
    runtime_dir: Path, stack: contextlib.ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    stack.enter_context(contextlib.closing(Here(runtime_dir, EPOCH + 1)))
    reader = Reader(runtime_dir)
    stack.callback(reader.way.close)
    assert reader.fetch() is ReadResult.UNREACHABLE, "by tcp, where nobody is"
    assert [name for name, _ in choices(caplog)] == ["tcp"]


def test_a_worker_without_an_address_can_only_be_here(
    runtime_dir: Path, stack: contextlib.ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    reader = Reader(runtime_dir, knows=None)
    stack.callback(reader.way.close)
    assert reader.fetch() is ReadResult.UNREACHABLE
    here = stack.enter_context(contextlib.closing(Here(runtime_dir)))
    assert reader.fetch(here.digest) is ReadResult.OK, "chosen again"
    assert choices(caplog) == [("shm", "it serves this host alone")] * 2


def test_a_worker_that_has_moved_is_looked_for_elsewhere(
    runtime_dir: Path, stack: contextlib.ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    here = Here(runtime_dir)
    reader = Reader(runtime_dir)
    stack.callback(reader.way.close)
    assert reader.fetch(here.digest) is ReadResult.OK
    here.close()
    assert reader.fetch(here.digest) is ReadResult.OK, "what is mapped can still be read"
    reader.ways.peers = {"p0": Address("p0", EPOCH + 1, "127.0.0.1", 9)}
    for _ in range(2):
        assert reader.fetch(grant=mint(EPOCH + 1)) is ReadResult.UNREACHABLE
    assert [name for name, _ in choices(caplog)] == ["shm", "tcp"]


def test_what_is_configured_is_not_questioned(
    runtime_dir: Path, stack: contextlib.ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    stack.enter_context(contextlib.closing(Here(runtime_dir)))
    reader = Reader(runtime_dir, transport="tcp")
    stack.callback(reader.way.close)
    assert reader.fetch() is ReadResult.UNREACHABLE
    assert choices(caplog) == [("tcp", "fabric.transport says so")]


def test_the_address_is_the_gateways_word(runtime_dir: Path, stack: contextlib.ExitStack) -> None:
    """A grant of a worker that nobody has told of leads nowhere, whatever stands in it."""
    reader = Reader(runtime_dir, knows=Address("p1", EPOCH, "127.0.0.1", 9), transport="tcp")
    stack.callback(reader.way.close)
    assert reader.fetch() is ReadResult.UNREACHABLE
    assert reader.ways._tcp_peer("p0") is None
    assert reader.ways._nixl_address("p1") is None, "it has no door there"


def test_that_a_source_is_unlike_is_told_once_with_the_reasons(
    runtime_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ways = Reader(runtime_dir).ways
    other = KvFormat(32, "float32", 2, 2, 8, 8192)
    for source, kv_format in (("p0", other), ("p0", None), ("p0", other), ("p1", other)):
        ways.to(source, kv_format).close()
    told = [message for message in caplog.messages if "unlike ours" in message]
    assert [message.split()[2] for message in told] == ["source=p0", "source=p1"]
    assert "raw" in told[0] and "no prefix is lent" in told[0]
