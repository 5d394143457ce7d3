"""Sources that die, freeze, wake and start again; and readers that die in the middle of a read."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from nixl_ends import (
    KV_FORMAT,
    NUM_BLOCKS,
    SOURCE_DIR,
    TESTS_DIR,
    Fetched,
    Writer,
    fetch,
    wait_until,
)

from baton.fabric.nixl import NixlTransport
from baton.fabric.nixl import transport as transport_module
from baton.fabric.nixl.door import Doors
from baton.fabric.transport import ReadResult

UNREACHABLE = [ReadResult.UNREACHABLE] * NUM_BLOCKS
TIMED_OUT = [ReadResult.TIMED_OUT] * NUM_BLOCKS


@pytest.fixture(params=["all", "tcp"])
def tls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What UCX may use: everything (memory of the other process), or TCP, as between hosts."""
    monkeypatch.setenv("UCX_TLS", request.param)
    return str(request.param)


@pytest.fixture
def tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")


@pytest.fixture
def new_writer(tmp_path: Path) -> Iterator[Callable[..., Writer]]:
    made: list[Writer] = []

    def make(epoch: int = 1, source: str = "p0") -> Writer:
        made.append(Writer(tmp_path / "run", epoch, source))
        return made[-1]

    yield make
    for writer in made:
        writer.close()


@pytest.fixture
def writer(new_writer: Callable[..., Writer]) -> Writer:
    return new_writer()


@pytest.fixture
def transport(tmp_path: Path) -> Iterator[NixlTransport]:
    made = NixlTransport(Doors(tmp_path / "run"), KV_FORMAT)
    yield made
    made.close()


def bytes_of_one(transport: NixlTransport) -> int:
    """What one fetch may keep in quarantine."""
    return sum(peer.stuck_in.num_bytes for peer in transport._peers.values() if peer.stuck_in)


def test_killed_in_the_middle_of_fetching(
    tls: str, writer: Writer, transport: NixlTransport
) -> None:
    fetched: list[Fetched] = []
    stopping = threading.Event()

    def go_on() -> None:
        while not stopping.is_set():
            fetched.append(fetch(transport, writer))

    thread = threading.Thread(target=go_on)
    thread.start()
    wait_until(lambda: len(fetched) >= 3)
    writer.kill()
    killed = time.monotonic()
    wait_until(lambda: fetched[-1].results == UNREACHABLE)
    assert time.monotonic() - killed < 1.0
    stopping.set()
    thread.join()
    assert fetched[0].num_right == NUM_BLOCKS
    assert max(each.elapsed_s for each in fetched) < 1.0
    assert transport.quarantined_bytes == 0


def test_killed_before_the_first_fetch(writer: Writer, transport: NixlTransport) -> None:
    writer.kill()
    fetched = fetch(transport, writer)
    assert fetched.results == UNREACHABLE and fetched.elapsed_s < 0.5


def test_frozen_before_it_was_reached(writer: Writer, transport: NixlTransport) -> None:
    writer.freeze()
    fetched = fetch(transport, writer, seconds=0.3)
    assert fetched.results == TIMED_OUT and fetched.elapsed_s < 0.6
    assert transport.quarantined_bytes == 0, "nothing was asked of NIXL"


@pytest.mark.usefixtures("tcp")
def test_frozen_then_killed(
    new_writer: Callable[..., Writer], writer: Writer, transport: NixlTransport
) -> None:
    other = new_writer(source="p1")
    assert fetch(transport, writer).num_right == NUM_BLOCKS
    writer.freeze()
    fetched = fetch(transport, writer, seconds=0.3)
    assert fetched.results == TIMED_OUT and 0.29 < fetched.elapsed_s < 0.6
    assert transport.quarantined_bytes == bytes_of_one(transport) > 0
    for _ in range(3):
        again = fetch(transport, writer, seconds=5.0)
        assert again.results == UNREACHABLE and again.elapsed_s < 0.1, "at once"
        assert fetch(transport, other).num_right == NUM_BLOCKS, "others are none the worse"
    transport.rest()
    assert transport.quarantined_bytes > 0
    writer.kill_all()
    wait_until(lambda: transport.rest() is None and transport.quarantined_bytes == 0, seconds=1.0)
    assert len(transport._free) == transport._num_stagings
    assert fetch(transport, writer).results == UNREACHABLE


@pytest.mark.usefixtures("tcp")
def test_frozen_then_woken(writer: Writer, transport: NixlTransport) -> None:
    assert fetch(transport, writer).num_right == NUM_BLOCKS
    for _ in range(3):
        writer.freeze()
        assert fetch(transport, writer, seconds=0.2).results == TIMED_OUT
        assert transport.quarantined_bytes > 0
        writer.thaw()
        wait_until(lambda: transport.rest() is None and transport.quarantined_bytes == 0)
        assert fetch(transport, writer).num_right == NUM_BLOCKS
    assert transport._num_stagings == 1


@pytest.mark.usefixtures("tcp")
def test_forgotten_while_frozen_nothing_arrives_late(
    new_writer: Callable[..., Writer], writer: Writer, transport: NixlTransport
) -> None:
    """What the frozen source still sends when it wakes must not reach memory that is in use."""
    other = new_writer(source="p1")
    assert fetch(transport, writer).num_right == NUM_BLOCKS
    assert fetch(transport, other).num_right == NUM_BLOCKS
    writer.freeze()
    assert fetch(transport, writer, seconds=0.2).results == TIMED_OUT
    transport.forget("p0")
    assert transport.quarantined_bytes == 0
    (staging,) = transport._free
    transport._free.clear()
    staging.banks._bytes[:] = 0xAB
    staging.pages[:] = 0xAB
    writer.thaw()
    limit = time.monotonic() + 0.5
    while time.monotonic() < limit:
        assert fetch(transport, other).num_right == NUM_BLOCKS
    assert np.all(staging.banks._bytes == 0xAB) and np.all(staging.pages == 0xAB)
    transport._free.append(staging)


@pytest.mark.usefixtures("tcp")
def test_too_many_overdue_reads(
    new_writer: Callable[..., Writer],
    transport: NixlTransport,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transport_module, "MAX_STAGINGS", 2)
    frozen = [new_writer(source=source) for source in ("p0", "p1")]
    healthy = new_writer(source="p2")
    for writer in frozen:
        assert fetch(transport, writer).num_right == NUM_BLOCKS
        writer.freeze()
        assert fetch(transport, writer, seconds=0.2).results == TIMED_OUT
    fetched = fetch(transport, healthy)
    assert fetched.results == UNREACHABLE and fetched.elapsed_s < 0.5
    assert transport.quarantined_bytes == bytes_of_one(transport)
    transport.forget("p0")
    assert fetch(transport, healthy).num_right == NUM_BLOCKS


def test_started_again_three_times(
    tls: str, new_writer: Callable[..., Writer], transport: NixlTransport
) -> None:
    previous = None
    for epoch in (1, 2, 3):
        writer = new_writer(epoch)
        assert fetch(transport, writer).num_right == NUM_BLOCKS
        if previous is not None:
            assert fetch(transport, previous).results == [ReadResult.STALE_EPOCH] * NUM_BLOCKS
        assert fetch(transport, writer).num_right == NUM_BLOCKS
        writer.kill()
        previous = writer


def test_the_serving_process_is_started_again(
    tls: str, writer: Writer, transport: NixlTransport
) -> None:
    assert fetch(transport, writer).num_right == NUM_BLOCKS
    os.kill(writer.hello.serving_pid, signal.SIGKILL)
    results = fetch(transport, writer).results
    assert set(results) <= {ReadResult.OK, ReadResult.UNREACHABLE}
    wait_until(lambda: fetch(transport, writer).num_right == NUM_BLOCKS)
    assert writer.process.poll() is None
    # Who was not there when it was started again does not even notice.
    os.kill(writer.serving_pid or 0, signal.SIGKILL)
    other = NixlTransport(transport._doors, KV_FORMAT)
    wait_until(lambda: fetch(other, writer).num_right == NUM_BLOCKS)
    other.close()
    assert fetch(transport, writer).num_right == NUM_BLOCKS


READER = """
import sys
from pathlib import Path
from types import SimpleNamespace
import msgspec
from nixl_ends import KV_FORMAT, fetch
from nixl_writer import Hello
from baton.fabric.nixl import NixlTransport
from baton.fabric.nixl.door import Doors

writer = SimpleNamespace(hello=msgspec.json.decode(sys.argv[2], type=Hello), epoch=1)
transport = NixlTransport(Doors(Path(sys.argv[1])), KV_FORMAT)
fetch(transport, writer)
print("going", flush=True)
while True:
    fetch(transport, writer)
"""


def test_readers_killed_in_the_middle_of_reading(
    tls: str, writer: Writer, transport: NixlTransport, tmp_path: Path
) -> None:
    """UCX ends the serving process when a reader dies during a read over TCP; not the worker."""
    import msgspec

    hello = msgspec.json.encode(writer.hello).decode()
    for round_ in range(3):
        reader = subprocess.Popen(
            [sys.executable, "-c", READER, str(tmp_path / "run"), hello],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": f"{SOURCE_DIR}:{TESTS_DIR}"},
        )
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"going\n"
        serving_pid = writer.serving_pid
        assert serving_pid is not None
        os.kill(serving_pid, signal.SIGSTOP)  # so that it is in the middle of it
        time.sleep(0.02 * round_)
        reader.kill()
        reader.wait()
        reader.stdout.close()
        os.kill(serving_pid, signal.SIGCONT)
        wait_until(lambda: fetch(transport, writer).num_right == NUM_BLOCKS, seconds=30.0)
    assert writer.process.poll() is None
    assert (writer.serving_pid != writer.hello.serving_pid) == (tls == "tcp")


def test_nothing_is_left_of_transports(writer: Writer, tmp_path: Path) -> None:
    def one() -> None:
        transport = NixlTransport(Doors(tmp_path / "run"), KV_FORMAT)
        assert fetch(transport, writer).num_right == NUM_BLOCKS
        transport.close()

    one()
    gc.collect()
    before = sorted(os.listdir("/proc/self/fd")), threading.active_count(), resident_bytes()
    for _ in range(20):
        one()
    gc.collect()
    assert sorted(os.listdir("/proc/self/fd")) == before[0]
    assert threading.active_count() == before[1]
    assert resident_bytes() < before[2] + (40 << 20), "20 stagings are 180 MB"


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
