"""Descriptor server and shared-memory transport, both ends in this process."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from baton.core.lease import LeaseTable
from baton.core.store_index import StoreIndex
from baton.errors import ConfigError
from baton.fabric import descriptors, shm
from baton.fabric.arena import Arena, Geometry
from baton.fabric.descriptors import (
    MAX_ASK_BYTES,
    MAX_CONNECTIONS,
    MAX_REPLY_BYTES,
    Ask,
    Descriptor,
    DescriptorServer,
    Refusal,
    pack,
)
from baton.fabric.shm import ShmTransport
from baton.fabric.transport import ReadResult, Wanted
from baton.types import Grant, KvFormat

KV_FORMAT = KvFormat(16, "float32", 2, 2, 8, 4096)
SECRET = b"s" * 32
KEY, BLOCK = b"k" * 32, bytes(range(256)) * 16
EPOCH = 9


def mint(source: str = "p0", epoch: int = EPOCH, tenant: str = "t") -> Grant:
    table = LeaseTable(source, epoch, SECRET, StoreIndex(0))
    return table.mint("grant", tenant, 30.0, now=0.0)


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


class Store:
    """A worker's side: an arena with BLOCK in frame 1, and its server."""

    def __init__(self, runtime_dir: Path, epoch: int = EPOCH) -> None:
        self.arena = Arena.create(2, 4096, epoch, KV_FORMAT)
        self.digest = self.arena.write(1, KEY, BLOCK)
        self.server = DescriptorServer(runtime_dir, "p0", self.arena, SECRET)

    def close(self) -> None:
        self.server.stop()
        self.arena.close()

    def fetch(
        self, transport: ShmTransport, grant: Grant, deadline: float | None = None
    ) -> ReadResult:
        destination = bytearray(4096)
        wanted = [Wanted(KEY, 1, self.digest, destination)]
        (result,) = transport.fetch(grant, wanted, soon() if deadline is None else deadline)
        assert (bytes(destination) == BLOCK) == (result is ReadResult.OK)
        return result


@pytest.fixture
def runtime_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def nothing_is_left(runtime_dir: Path) -> Iterator[None]:
    before = sorted(os.listdir("/proc/self/fd"))
    num_threads = threading.active_count()
    yield
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert threading.active_count() == num_threads
    if runtime_dir.exists():
        assert list(runtime_dir.glob("*.kv.sock")) == []


@pytest.fixture
def new_store(runtime_dir: Path) -> Iterator[Callable[[int], Store]]:
    with contextlib.ExitStack() as stack:
        # Closed even if the test fails: a thread left behind would keep the tests from ending.
        yield lambda epoch: stack.enter_context(contextlib.closing(Store(runtime_dir, epoch)))


@pytest.fixture
def store(new_store: Callable[[int], Store]) -> Store:
    return new_store(EPOCH)


@pytest.fixture
def transport(runtime_dir: Path) -> Iterator[ShmTransport]:
    made = ShmTransport(runtime_dir, KV_FORMAT)
    yield made
    made.close()


def test_round_trip_and_one_mapping(
    store: Store, transport: ShmTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store.fetch(transport, mint()) is ReadResult.OK
    monkeypatch.setattr(shm, "_ask", None)  # the second fetch needs no socket
    assert store.fetch(transport, mint()) is ReadResult.OK


@pytest.mark.parametrize("max_batch_bytes", [1, 8192, 4 << 20])
def test_one_result_for_each_block_in_order(
    store: Store, transport: ShmTransport, monkeypatch: pytest.MonkeyPatch, max_batch_bytes: int
) -> None:
    monkeypatch.setattr(shm, "MAX_BATCH_BYTES", max_batch_bytes)

    def wanted(key: bytes, frame: int, digest: bytes, size: int = 4096) -> Wanted:
        return Wanted(key, frame, digest, bytearray(size))

    results = transport.fetch(
        mint(),
        [
            wanted(KEY, 1, store.digest),
            wanted(KEY, 0, store.digest),
            wanted(KEY, 1, b"d" * 16),
            wanted(KEY, 2, store.digest),
            wanted(KEY, 1, store.digest, 100),
            wanted(KEY, 1, store.digest),
        ],
        soon(),
    )
    assert results == ["ok", "missing", "corrupt", "out_of_range", "wrong_size", "ok"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"tenant": "other"}, "refused"),
        ({"grant_id": "other"}, "refused"),
        ({"mac": bytes(32)}, "refused"),
        ({"epoch": EPOCH + 1}, "stale_epoch"),
        ({"source": "p1"}, "unreachable"),
        ({"source": "../p0"}, "refused"),
        ({"source": "p0\n"}, "refused"),
        ({"source": "p0\0"}, "refused"),
        ({"source": ""}, "refused"),
        ({"source": "x" * 65}, "refused"),
        ({"tenant": "t" * MAX_ASK_BYTES}, "unreachable"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_grant_reads_nothing(
    store: Store, transport: ShmTransport, change: dict[str, object], expected: str
) -> None:
    grant = msgspec.structs.replace(mint(), **change)
    assert store.fetch(transport, grant) == expected
    assert store.fetch(transport, mint()) is ReadResult.OK


def test_a_grant_for_another_worker_is_refused(
    store: Store, runtime_dir: Path, transport: ShmTransport
) -> None:
    (runtime_dir / "p1.kv.sock").symlink_to("p0.kv.sock")
    assert store.fetch(transport, mint(source="p1")) is ReadResult.REFUSED
    (runtime_dir / "p1.kv.sock").unlink()


def test_another_kv_format_is_not_read(store: Store, runtime_dir: Path) -> None:
    other = ShmTransport(runtime_dir, msgspec.structs.replace(KV_FORMAT, dtype="bfloat16"))
    assert store.fetch(other, mint()) is ReadResult.WRONG_FORMAT
    other.close()


def test_a_restarted_worker_needs_a_new_mapping(
    runtime_dir: Path, transport: ShmTransport, new_store: Callable[[int], Store]
) -> None:
    old = new_store(EPOCH)
    assert old.fetch(transport, mint()) is ReadResult.OK
    old.close()
    assert old.fetch(transport, mint()) is ReadResult.OK, "what is mapped may still be read"
    new = new_store(EPOCH + 1)
    assert old.fetch(ShmTransport(runtime_dir, KV_FORMAT), mint()) is ReadResult.STALE_EPOCH
    assert new.fetch(transport, mint(epoch=EPOCH + 1)) is ReadResult.OK
    transport.close()
    assert old.fetch(transport, mint()) is ReadResult.STALE_EPOCH
    new.close()
    assert new.fetch(transport, mint(epoch=EPOCH + 1)) is ReadResult.UNREACHABLE


def test_mappings_of_old_epochs_are_dropped(
    transport: ShmTransport, new_store: Callable[[int], Store]
) -> None:
    for epoch in range(1, 5):
        store = new_store(epoch)
        assert store.fetch(transport, mint(epoch=epoch)) is ReadResult.OK
        store.close()
    assert list(transport._arenas) == [("p0", 3), ("p0", 4)]


def test_the_deadline_holds(store: Store, transport: ShmTransport) -> None:
    assert store.fetch(transport, mint(), deadline=time.monotonic()) is ReadResult.TIMED_OUT
    assert transport._arenas == {}


def test_the_deadline_holds_between_batches(
    store: Store, transport: ShmTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store.fetch(transport, mint()) is ReadResult.OK
    monkeypatch.setattr(shm, "MAX_BATCH_BYTES", 4096)  # one block
    clock = iter([0.0, 0.0, 1.0, 2.0])
    monkeypatch.setattr(shm, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    wanted = [Wanted(KEY, 1, store.digest, bytearray(4096)) for _ in range(3)]
    assert transport.fetch(mint(), wanted, 1.0) == ["ok", "timed_out", "timed_out"]


# A source that misbehaves


@contextlib.contextmanager
def fake_source(runtime_dir: Path, answer: bytes | None, fds: list[int]) -> Iterator[None]:
    runtime_dir.mkdir(mode=0o700, exist_ok=True)
    path = runtime_dir / "p0.kv.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    done = threading.Event()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 16)
            if answer is None:
                done.wait(10)
            elif answer:
                socket.send_fds(connection, [answer], fds)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        listener.close()
        path.unlink()


GOOD_ANSWER = pack(Descriptor(Geometry(EPOCH, 1, 1, bytes(32))))
LONG_ANSWER = msgspec.msgpack.encode(
    {"type": "Refusal", "reason": "stale_epoch", "unknown": bytes(MAX_REPLY_BYTES)}
)
LONG_ANSWER = struct.pack(">I", len(LONG_ANSWER)) + LONG_ANSWER


@pytest.mark.parametrize(
    ("answer", "num_fds"),
    [
        (b"", 0),
        (b"\0\0", 0),
        (b"\xff\xff\xff\xff", 1),
        (b"\0\0\0\0", 1),
        (b"\0\0\0\x05hello", 1),
        (GOOD_ANSWER, 0),
        (GOOD_ANSWER[:-1], 1),
        (GOOD_ANSWER, 1),
        (GOOD_ANSWER, 3),
        (pack(mint()), 1),
        (LONG_ANSWER, 0),
        (pack(Refusal("ok")), 1),  # type: ignore[arg-type]
    ],
    ids=[
        "nothing",
        "half a length",
        "huge",
        "empty",
        "no msgpack",
        "no descriptor",
        "cut",
        "no arena",
        "too many descriptors",
        "other schema",
        "too long",
        "refusal that says ok",
    ],
)
def test_a_source_that_answers_garbage(
    runtime_dir: Path, transport: ShmTransport, answer: bytes, num_fds: int
) -> None:
    with (
        open(__file__, "rb") as file,
        fake_source(runtime_dir, answer, [file.fileno()] * num_fds),
    ):
        results = transport.fetch(mint(), [Wanted(KEY, 1, b"", bytearray(1))] * 2, soon())
    assert results == ["unreachable"] * 2


@pytest.mark.parametrize(("seconds", "expected"), [(0.2, "timed_out"), (30, "unreachable")])
def test_a_source_that_is_frozen(
    runtime_dir: Path,
    transport: ShmTransport,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    expected: str,
) -> None:
    monkeypatch.setattr(shm, "ASK_TIMEOUT_S", 0.4)
    with fake_source(runtime_dir, None, []):
        started = time.monotonic()
        results = transport.fetch(mint(), [Wanted(KEY, 1, b"", bytearray(1))], soon(seconds))
        assert results == [expected]
        assert time.monotonic() - started < 15.0


@pytest.mark.parametrize(("seconds", "expected"), [(0.2, "timed_out"), (20, "unreachable")])
def test_a_source_with_a_full_backlog_is_waited_for_in_time(
    runtime_dir: Path, transport: ShmTransport, seconds: float, expected: str
) -> None:
    """Frozen: the room in the backlog never comes. Busy: it does, and then the source answers."""
    runtime_dir.mkdir(mode=0o700)
    path = runtime_dir / "p0.kv.sock"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(path))
        listener.listen(0)
        first.connect(str(path))

        def serve() -> None:
            for _ in range(2):
                listener.accept()[0].close()

        timer = threading.Timer(0.4, serve)
        started = time.monotonic()
        if expected == "unreachable":
            timer.start()
        results = transport.fetch(mint(), [Wanted(KEY, 1, b"", bytearray(1))], soon(seconds))
        elapsed_s = time.monotonic() - started
        assert results == [expected]
        assert elapsed_s >= (0.4 if expected == "unreachable" else 0.9 * seconds)
        if expected == "timed_out":
            timer.start()
            with socket.socket(socket.AF_UNIX) as second:
                second.connect(str(path))
        timer.join()
    path.unlink()


# The server against its peers


def ask(runtime_dir: Path, data: bytes, close_writing: bool = True) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(runtime_dir / "p0.kv.sock"))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(data)
            if close_writing:
                connection.shutdown(socket.SHUT_WR)
        try:
            reply, fds, _, _ = socket.recv_fds(connection, 8192, 4)
        except ConnectionResetError:
            return b""
        for fd in fds:
            os.close(fd)
        return reply


def test_garbage_on_the_socket(store: Store, runtime_dir: Path, transport: ShmTransport) -> None:
    rng = random.Random(5)
    good = pack(Ask(mint()))
    assert len(ask(runtime_dir, good, close_writing=False)) > 40
    refusal = pack(Refusal("refused"))
    stale = pack(Refusal("stale_epoch"))
    for n in range(3000):
        data = bytearray(good)
        if n % 3 == 0:
            data = bytearray(rng.randbytes(rng.randrange(200)))
        elif n % 3 == 1:
            del data[rng.randrange(len(data)) :]
        else:
            at = rng.randrange(len(data))
            data[at] ^= 1 << rng.randrange(8)
        reply = ask(runtime_dir, bytes(data))
        if reply not in (b"", refusal, stale):
            # The only fields that may differ unseen are not covered: ttl_s, the names of others.
            asked = msgspec.msgpack.decode(bytes(data[4:]), type=Ask)
            assert msgspec.structs.replace(asked.grant, ttl_s=30.0) == mint()
    for malformed in (
        b"\xff" * 8,
        struct.pack(">I", MAX_ASK_BYTES + 1),
        b"\0" * (4 * MAX_ASK_BYTES),
        struct.pack(">I", 5000) + b"\x91" * 5000,
        good + b"x",
    ):
        assert ask(runtime_dir, malformed) == b""
    assert store.fetch(transport, mint()) is ReadResult.OK


def test_an_ask_that_will_be_too_long_is_not_waited_for(
    store: Store, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descriptors, "ASK_TIMEOUT_S", 60.0)
    started = time.monotonic()
    data = struct.pack(">I", MAX_ASK_BYTES + 1)
    assert ask(runtime_dir, data, close_writing=False) == b""
    assert time.monotonic() - started < 30.0


def test_a_byte_at_a_time(store: Store, runtime_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(runtime_dir / "p0.kv.sock"))
        for byte in pack(Ask(mint(tenant="x"))):
            connection.send(bytes([byte]))
        assert connection.recv(4096)


def test_silent_readers_are_dropped_and_block_nobody(
    store: Store, runtime_dir: Path, transport: ShmTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descriptors, "ASK_TIMEOUT_S", 0.3)
    silent = [socket.socket(socket.AF_UNIX) for _ in range(MAX_CONNECTIONS + 8)]
    for connection in silent:
        # Without a timeout yet: with one, a full backlog is an error and not a wait.
        connection.connect(str(runtime_dir / "p0.kv.sock"))
        connection.settimeout(5)
    assert store.fetch(transport, mint()) is ReadResult.OK
    assert len(store.server._connections) <= MAX_CONNECTIONS
    for connection in silent:
        assert connection.recv(1) == b"", "closed by the server"
        connection.close()
    assert store.server._connections == {}


def test_readers_of_another_user_are_refused(
    store: Store, transport: ShmTransport, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descriptors, "peer_uid", lambda connection: os.geteuid() + 1)
    assert ask(runtime_dir, pack(Ask(mint()))) == b""
    assert store.fetch(transport, mint()) is ReadResult.UNREACHABLE


def test_a_source_of_another_user_is_not_asked(
    store: Store, transport: ShmTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shm, "peer_uid", lambda connection: os.geteuid() + 1)
    assert store.fetch(transport, mint()) is ReadResult.UNREACHABLE


def test_the_server_stops_with_readers_connected(store: Store, runtime_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(runtime_dir / "p0.kv.sock"))
        store.server.stop()
        store.server.stop()
    assert not (runtime_dir / "p0.kv.sock").exists()


def test_a_late_stop_leaves_the_successors_socket(
    transport: ShmTransport, new_store: Callable[[int], Store]
) -> None:
    old, new = new_store(EPOCH), new_store(EPOCH + 1)
    old.close()
    assert new.fetch(transport, mint(epoch=EPOCH + 1)) is ReadResult.OK


@pytest.mark.parametrize("wrong", ["open to others", "a file", "a link", "too long", "source"])
def test_an_unsafe_runtime_directory_is_refused(tmp_path: Path, wrong: str) -> None:
    path, source = tmp_path / "run", "p0"
    if wrong == "open to others":
        path.mkdir(mode=0o755)
    elif wrong == "a file":
        path.touch()
    elif wrong == "a link":
        (tmp_path / "real").mkdir(mode=0o700)
        path.symlink_to("real")
    elif wrong == "too long":
        path = tmp_path / ("x" * 120)
    else:
        source = "../p0"
    arena = Arena.create(1, 8, 1, KV_FORMAT)
    with pytest.raises(ConfigError):
        DescriptorServer(path, source, arena, SECRET)
    arena.close()
