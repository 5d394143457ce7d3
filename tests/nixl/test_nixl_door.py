"""The door of a store against readers that misbehave, and readers against doors that lie."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from nixl_ends import wait_until

from baton.core.lease import LeaseTable
from baton.core.store_index import StoreIndex
from baton.errors import ConfigError
from baton.fabric.arena import Arena, Geometry
from baton.fabric.descriptors import ASK_TIMEOUT_S, MAX_ASK_BYTES, Ask, Refusal, pack
from baton.fabric.nixl import NixlStore, NixlTransport, agent
from baton.fabric.nixl import door as door_module
from baton.fabric.nixl import store as store_module
from baton.fabric.nixl.door import NUDGE_EVERY_S, Doors, knock
from baton.fabric.nixl.peer import Peer
from baton.fabric.nixl.staging import Staging
from baton.fabric.nixl.store import Listen
from baton.fabric.nixl.wire import MAX_REPLY_BYTES, Opened, Registered, Unreadable, checked_reply
from baton.fabric.transport import ReadResult, Wanted
from baton.types import Grant, KvFormat

KV_FORMAT = KvFormat(16, "float32", 2, 2, 8, 4096)
SECRET = b"s" * 32
KEY, BLOCK = b"k" * 32, bytes(range(256)) * 16
EPOCH = 9


def mint(source: str = "p0", epoch: int = EPOCH) -> Grant:
    return LeaseTable(source, epoch, SECRET, StoreIndex(0)).mint("grant", "t", 30.0, now=0.0)


class Store:
    """An arena with BLOCK in frame 1, and its door, in this process."""

    def __init__(self, runtime_dir: Path, tcp: Listen | None = None) -> None:
        self.arena = Arena.create(2, 4096, EPOCH, KV_FORMAT)
        self.digest = self.arena.write(1, KEY, BLOCK)
        self.path = runtime_dir / "p0.nixl.sock"
        self.store = NixlStore(runtime_dir, "p0", self.arena, SECRET, tcp)

    def fetch(self, transport: NixlTransport, grant: Grant | None = None) -> ReadResult:
        destination = bytearray(4096)
        wanted = [Wanted(KEY, 1, self.digest, destination)]
        (result,) = transport.fetch(grant or mint(), wanted, time.monotonic() + 5)
        assert (bytes(destination) == BLOCK) == (result is ReadResult.OK)
        return result

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(5)
        connection.connect(str(self.path))
        return connection

    def close(self) -> None:
        self.store.stop()
        self.arena.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with contextlib.closing(Store(tmp_path_factory.mktemp("dir") / "run")) as made:
        yield made


@pytest.fixture
def doors(store: Store) -> Doors:
    return Doors(store.path.parent)


@pytest.fixture
def transport(doors: Doors) -> Iterator[NixlTransport]:
    with contextlib.closing(NixlTransport(doors, KV_FORMAT)) as made:
        yield made


# Stores


def test_a_frame_that_is_being_written(store: Store, transport: NixlTransport) -> None:
    store.arena.invalidate(1)
    assert store.fetch(transport) is ReadResult.MISSING
    store.arena.write(1, KEY, BLOCK)
    assert store.fetch(transport) is ReadResult.OK


def between(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Have `act` done when frames have been read, and before their headers are read again."""
    read_pages = Peer.read_pages

    def act_then_read(
        self: Peer, staging: Staging, after: bool, pages: npt.NDArray[np.int32], deadline: float
    ) -> None:
        if after:
            act()
        read_pages(self, staging, after, pages, deadline)

    monkeypatch.setattr(Peer, "read_pages", act_then_read)


def test_an_arena_whose_frame_is_rewritten_meanwhile(
    store: Store, transport: NixlTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same bytes even, under the same key: only the generation tells."""
    between(monkeypatch, lambda: store.arena.write(1, KEY, BLOCK))
    block = bytearray(4096)
    results = transport.fetch(mint(), [Wanted(KEY, 1, store.digest, block)], time.monotonic() + 5)
    assert results == [ReadResult.MISSING]


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_arena_whose_first_page_changes(
    store: Store, transport: NixlTransport, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    assert store.fetch(transport) is ReadResult.OK
    memory = store.arena._memory

    def change() -> None:
        memory[16:24] = struct.pack("<Q", EPOCH + 1)

    if when == "before":
        change()
    else:
        between(monkeypatch, change)
    try:
        asked = b"another".ljust(32) if when == "before" else KEY
        wanted = [Wanted(asked, 1, store.digest, bytearray(4096))]
        results = transport.fetch(mint(), wanted, time.monotonic() + 5)
        assert results == [ReadResult.STALE_EPOCH]
    finally:
        memory[16:24] = struct.pack("<Q", EPOCH)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff",
        struct.pack(">I", MAX_ASK_BYTES + 1) + b"x" * 100,
        struct.pack(">I", 3) + b"\x93\xc1",
        struct.pack(">I", 1) + b"\xc1",
        pack(Ask(mint()))[:-1] + b"\xc1",
        pack(Ask(mint())) + b"more than one ask",
        pack(Ask(mint(source="p1"))),
        pack(Ask(mint(), protocol=2)),
        pack(Ask(msgspec.structs.replace(mint(), mac=b""))),
        b"",
    ],
    ids=lambda data: data[:12].hex() or "nothing",
)
def test_a_bad_ask_ends_its_connection_only(
    store: Store, transport: NixlTransport, data: bytes
) -> None:
    with store.connect() as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(4096):
                answer += piece
        assert b"Opened" not in answer
    assert store.fetch(transport) is ReadResult.OK


def test_an_ask_that_is_too_long_is_not_waited_for(store: Store) -> None:
    with store.connect() as connection:
        started = time.monotonic()
        connection.sendall(struct.pack(">I", MAX_ASK_BYTES + 1))
        assert connection.recv(1) == b""
        assert time.monotonic() - started < ASK_TIMEOUT_S / 2


def test_an_ask_that_does_not_come_is_not_waited_for(store: Store) -> None:
    with store.connect() as silent, store.connect() as slow:
        slow.sendall(pack(Ask(mint()))[:20])
        started = time.monotonic()
        for connection in (silent, slow):
            assert connection.recv(1) == b""
        assert ASK_TIMEOUT_S / 2 < time.monotonic() - started < ASK_TIMEOUT_S + 1


def test_a_crowd_at_the_door_does_not_push_readers_out(
    store: Store, transport: NixlTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "MAX_CONNECTIONS", 8)
    assert store.fetch(transport) is ReadResult.OK
    (peer,) = transport._peers.values()
    with contextlib.ExitStack() as crowd:
        for _ in range(30):
            crowd.enter_context(store.connect())
        wait_until(lambda: len(store.store._connections) == 8)
        assert peer.door.nudge(time.monotonic() + 1)
        assert store.fetch(transport) is ReadResult.OK


def test_readers_of_other_users_are_not_answered(
    store: Store, transport: NixlTransport, doors: Doors, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "peer_uid", lambda _: os.geteuid() + 1)
        assert store.fetch(transport) is ReadResult.UNREACHABLE
    with monkeypatch.context() as patch:
        patch.setattr(door_module, "peer_uid", lambda _: os.geteuid() + 1)
        assert store.fetch(transport) is ReadResult.UNREACHABLE
    assert store.fetch(transport) is ReadResult.OK


def test_a_store_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arena = Arena.create(1, 4096, 1, KV_FORMAT)

    def start_and_stop(source: str = "p0", tcp: Listen | None = None) -> None:
        NixlStore(tmp_path / "run", source, arena, SECRET, tcp).stop()

    with pytest.raises(ConfigError, match="worker id"):
        start_and_stop("../p0")
    with pytest.raises(ConfigError, match="TLS"):
        start_and_stop(tcp=Listen("0.0.0.0"))
    with pytest.raises(ConfigError, match="listen at"):
        start_and_stop(tcp=Listen("192.0.2.1", allow_insecure=True))
    monkeypatch.setenv("UCX_TLS", "nothing")
    with pytest.raises(ConfigError, match="does not start"):
        start_and_stop()
    monkeypatch.setattr(agent, "PACKAGE", "no_such_package")
    for start in (start_and_stop, agent.check_installed):
        with pytest.raises(ConfigError, match="nixl-cu13"):
            start()
    assert list((tmp_path / "run").iterdir()) == []
    arena.close()


# Readers


class LiesAtTheDoor:
    """Answers every ask with the same bytes, then passes on to a store that somebody waits, or
    hangs up if there is none."""

    def __init__(self, runtime_dir: Path, answer: bytes, store: Store | None = None) -> None:
        runtime_dir.mkdir(mode=0o700, exist_ok=True)
        self.store = store
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(runtime_dir / "p0.nixl.sock"))
        self.listener.listen()
        self.answer = answer
        self.connections: list[socket.socket] = []
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                self.connections.append(connection)
                connection.recv(1 << 16)
                connection.sendall(self.answer)
                if self.store is None:
                    connection.shutdown(socket.SHUT_WR)
                else:
                    while connection.recv(4096):
                        self.store.store._child.feed()

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        for each in (self.listener, *self.connections):
            each.close()


def honest(store: Store) -> Opened:
    door = knock(
        Doors(store.path.parent),
        mint(),
        time.monotonic() + 5,
        store.arena.geometry.kv_format_hash,
        4096,
    )
    door.close()
    return door.opened


def geometry(**change: object) -> Callable[[Opened], Opened]:
    return lambda opened: msgspec.structs.replace(
        opened, geometry=msgspec.structs.replace(opened.geometry, **change)
    )


def registered(**change: object) -> Callable[[Opened], Opened]:
    return lambda opened: msgspec.structs.replace(
        opened, registered=msgspec.structs.replace(opened.registered, **change)
    )


@pytest.mark.parametrize(
    ("lie", "expected"),
    [
        (geometry(), "ok"),
        (geometry(epoch=8), "stale_epoch"),
        (geometry(kv_format_hash=bytes(32)), "wrong_format"),
        (geometry(frame_bytes=8192), "wrong_format"),
        (geometry(frame_bytes=-1), "wrong_format"),
        (geometry(num_frames=1), "out_of_range"),
        (geometry(num_frames=3), "unreachable"),  # beyond what was registered
        (geometry(num_frames=0), "unreachable"),
        (geometry(num_frames=-1), "unreachable"),
        (geometry(num_frames=1 << 31), "unreachable"),
        (geometry(num_frames=1 << 63), "unreachable"),
        (registered(address=0), "unreachable"),
        (registered(address=-4096), "unreachable"),
        (registered(address=1 << 63), "unreachable"),
        (registered(agent="another"), "unreachable"),
        (registered(metadata=b""), "unreachable"),
        (registered(metadata=b"garbage"), "unreachable"),
        (lambda opened: Refusal("refused"), "refused"),
        (lambda opened: Refusal("stale_epoch"), "stale_epoch"),
        (lambda opened: opened.registered, "unreachable"),
    ],
)
def test_a_door_that_lies(
    store: Store, tmp_path: Path, lie: Callable[[Opened], msgspec.Struct], expected: str
) -> None:
    answer = pack(lie(honest(store)))
    with (
        contextlib.closing(LiesAtTheDoor(tmp_path / "run", answer, store)),
        contextlib.closing(NixlTransport(Doors(tmp_path / "run"), KV_FORMAT)) as transport,
    ):
        assert store.fetch(transport) == expected


GOOD = Opened(Geometry(EPOCH, 2, 4096, b"h" * 32), Registered("a", 1 << 40, b"metadata"))


@pytest.mark.parametrize(
    ("lie", "expected"),
    [
        (geometry(epoch=8), "stale_epoch"),
        (geometry(kv_format_hash=b"H" * 32), "wrong_format"),
        (geometry(frame_bytes=4095), "wrong_format"),
        (geometry(num_frames=0), "unreachable"),
        (geometry(num_frames=1 << 31), "unreachable"),
        (registered(address=0), "unreachable"),
        (registered(address=-4096), "unreachable"),
        (registered(address=(1 << 40) + 1), "unreachable"),
        (registered(address=(1 << 63) - 4096), "unreachable"),
    ],
)
def test_what_nixl_never_sees(lie: Callable[[Opened], Opened], expected: str) -> None:
    def check(opened: Opened) -> Opened:
        data = msgspec.msgpack.Encoder().encode(opened)
        return checked_reply(data, EPOCH, b"h" * 32, 4096)

    assert check(GOOD) == GOOD
    with pytest.raises(Unreadable) as refused:
        check(lie(GOOD))
    assert refused.value.result == expected


@pytest.mark.parametrize("by", [-4096, 1, 4096])
def test_an_address_that_is_not_the_arenas(store: Store, tmp_path: Path, by: int) -> None:
    opened = honest(store)
    lie = registered(address=opened.registered.address + by)(opened)
    with (
        contextlib.closing(LiesAtTheDoor(tmp_path / "run", pack(lie), store)),
        contextlib.closing(NixlTransport(Doors(tmp_path / "run"), KV_FORMAT)) as transport,
    ):
        assert store.fetch(transport) is ReadResult.UNREACHABLE


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_metadata_that_are_cut_short(store: Store, tmp_path: Path, share: float) -> None:
    opened = honest(store)
    metadata = opened.registered.metadata
    lie = registered(metadata=metadata[: int(len(metadata) * share)])(opened)
    with (
        contextlib.closing(LiesAtTheDoor(tmp_path / "run", pack(lie), store)),
        contextlib.closing(NixlTransport(Doors(tmp_path / "run"), KV_FORMAT)) as transport,
    ):
        assert store.fetch(transport) is ReadResult.UNREACHABLE


@pytest.mark.parametrize(
    "answer",
    [b"", b"\0", struct.pack(">I", 5) + b"four", b"\0" * 9],
    ids=["nothing", "a byte", "cut short", "empty"],
)
def test_answers_that_are_none(tmp_path: Path, answer: bytes) -> None:
    with (
        contextlib.closing(LiesAtTheDoor(tmp_path / "run", answer)),
        pytest.raises(Unreadable) as refused,
    ):
        knock(Doors(tmp_path / "run"), mint(), time.monotonic() + 5, b"", 4096)
    assert refused.value.result is ReadResult.UNREACHABLE


def test_an_answer_that_is_too_long_is_not_waited_for(store: Store, tmp_path: Path) -> None:
    answer = struct.pack(">I", MAX_REPLY_BYTES + 1)
    started = time.monotonic()
    with (
        contextlib.closing(LiesAtTheDoor(tmp_path / "run", answer, store)),
        pytest.raises(Unreadable) as refused,
    ):
        knock(Doors(tmp_path / "run"), mint(), started + 5, b"", 4096)
    assert refused.value.result is ReadResult.UNREACHABLE
    assert time.monotonic() - started < ASK_TIMEOUT_S / 2


def test_who_waits_learns_that_the_door_has_closed(store: Store, tmp_path: Path) -> None:
    answer = pack(honest(store))
    with contextlib.closing(LiesAtTheDoor(tmp_path / "run", answer)):
        door = knock(
            Doors(tmp_path / "run"),
            mint(),
            time.monotonic() + 5,
            store.arena.geometry.kv_format_hash,
            4096,
        )
        turns = itertools.count(1)
        wait_until(lambda: not door.nudge(next(turns) * NUDGE_EVERY_S))
        door.close()


# Readers on other hosts


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    path = tmp_path / "both.pem"
    key_path = tmp_path / "key.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=store "
        f"-addext subjectAltName=IP:127.0.0.1 -keyout {key_path} -out {path}"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    path.write_bytes(path.read_bytes() + key_path.read_bytes())
    return path


def test_through_a_door_with_tls(tmp_path: Path, certificate: Path) -> None:
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(certificate)
    theirs = ssl.create_default_context(cafile=str(certificate))
    with contextlib.closing(Store(tmp_path / "run", Listen("127.0.0.1", tls=ours))) as store:
        port = store.store.tcp_port
        assert port is not None
        nowhere = tmp_path / "nowhere"
        doors = Doors(nowhere, lambda _: ("127.0.0.1", port), theirs)
        with contextlib.closing(NixlTransport(doors, KV_FORMAT)) as transport:
            assert store.fetch(transport) is ReadResult.OK
            (peer,) = transport._peers.values()
            assert peer.door.nudge(time.monotonic() + 1) and peer.door.nudge(time.monotonic() + 2)
            wrong = msgspec.structs.replace(mint(), mac=bytes(32))
            transport.forget("p0")
            assert store.fetch(transport, wrong) is ReadResult.REFUSED
        for tls in (None, ssl.create_default_context()):
            stranger = Doors(nowhere, lambda _: ("127.0.0.1", port), tls)
            with contextlib.closing(NixlTransport(stranger, KV_FORMAT)) as transport:
                assert store.fetch(transport) is ReadResult.UNREACHABLE
        with socket.create_connection(("127.0.0.1", port)) as garbage:
            garbage.sendall(b"GET / HTTP/1.1\r\n\r\n")
            garbage.settimeout(5)
            with contextlib.suppress(ConnectionResetError):
                while garbage.recv(4096):
                    pass
        with contextlib.closing(NixlTransport(doors, KV_FORMAT)) as transport:
            assert store.fetch(transport) is ReadResult.OK


def test_an_address_where_nobody_is(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = int(taken.getsockname()[1])
    doors = Doors(tmp_path, lambda _: ("127.0.0.1", port))
    with pytest.raises(Unreadable) as refused:
        knock(doors, mint(), time.monotonic() + 5, b"", 4096)
    assert refused.value.result is ReadResult.UNREACHABLE


def test_no_descriptor_is_left(store: Store, doors: Doors) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    with contextlib.closing(NixlTransport(doors, KV_FORMAT)) as transport:
        assert store.fetch(transport) is ReadResult.OK
    wait_until(lambda: sorted(os.listdir("/proc/self/fd")) == before)
