"""TCP transport and its server, both ends in this process; tests/faults has what lies between."""

from __future__ import annotations

import contextlib
import itertools
import random
import socket
import threading
import time

import msgspec
import numpy as np
import pytest
from tcp_ends import (
    EPOCH,
    GRANT_ID,
    SECRET,
    Make,
    Store,
    num_connections,
    until,
)

from baton.core.lease import LeaseTable
from baton.core.store_index import StoreIndex
from baton.fabric import tcp, tcp_server
from baton.fabric.exchange import MAX_ASK_BYTES, MIN_ASK_BYTES, Exchange
from baton.fabric.tcp import TcpTransport
from baton.fabric.transport import Peer, ReadResult
from baton.fabric.wire import (
    MAX_MESSAGE_BYTES,
)

pytest_plugins = ["tcp_fixtures"]

OK = ReadResult.OK
STREAMS = (1, 2, 4)


# What is right


@pytest.mark.parametrize(
    ("num_blocks", "block_bytes", "num_streams"),
    [
        *itertools.product([1], [2], STREAMS),
        *itertools.product([600], [96], STREAMS),
        *itertools.product([40], [300_000], STREAMS),
        *itertools.product([5], [2 << 20], STREAMS),  # with several, a block is more than an ask
        (3, MAX_ASK_BYTES + 2, 1),  # and here more than any
    ],
)
def test_right_bytes(
    make: Make,
    stack: contextlib.ExitStack,
    num_blocks: int,
    block_bytes: int,
    num_streams: int,
) -> None:
    store = make(num_blocks=num_blocks, block_bytes=block_bytes)
    reader = stack.enter_context(contextlib.closing(store.transport(num_streams=num_streams)))
    wanted = [
        store.wanted(n, destination=np.zeros(block_bytes, np.uint8)) for n in range(num_blocks)
    ]
    random.Random(0).shuffle(wanted)
    assert set(store.fetch(reader, wanted)) == {OK}
    assert num_connections(store) <= num_streams
    assert store.works(reader)


def test_several_streams_share_a_large_fetch(
    make: Make, stack: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make(num_blocks=12, block_bytes=MIN_ASK_BYTES)
    reader = stack.enter_context(contextlib.closing(store.transport(num_streams=3)))
    met = threading.Barrier(3)
    asked: list[str] = []
    ask = Exchange.ask

    def noted(*args: object) -> bytes:
        name = threading.current_thread().name
        if name not in asked:
            met.wait(10.0)  # until all three have taken a part
        asked.append(name)
        return ask(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(Exchange, "ask", noted)
    assert store.works(reader)
    assert len(asked) == 12
    assert len(set(asked)) == 3, "this thread and two helpers"
    assert num_connections(store) == 3


def test_one_result_for_each_block_in_order(store: Store, reader: TcpTransport) -> None:
    held = store.key(0)
    wanted = [
        store.wanted(2),
        store.wanted(0, key=b"u" * 32),
        store.wanted(0, frame=1),
        store.wanted(0, frame=4),
        store.wanted(0, frame=5),
        store.wanted(0, frame=1 << 40),
        store.wanted(0, frame=-1),
        store.wanted(1, digest=b"d" * 16),
        store.wanted(1, destination=bytearray(100)),
        store.wanted(1, destination=bytearray(0)),
        store.wanted(1, key=held[:31]),
        store.wanted(3),
    ]
    assert store.fetch(reader, wanted) == [
        "ok",
        "refused",
        "missing",
        "missing",
        "out_of_range",
        "out_of_range",
        "out_of_range",
        "corrupt",
        "wrong_size",
        "wrong_size",
        "missing",
        "ok",
    ]
    for number in (1, 2, 3, 4, 5, 6, 8):
        assert not any(wanted[number].destination), "nothing came, so nothing was written"
    assert num_connections(store) == 1, "none of this is a reason to part"


def test_a_frame_that_is_being_written_is_missing(store: Store, reader: TcpTransport) -> None:
    store.arena.invalidate(2)
    assert store.fetch(reader) == ["ok", "ok", "missing", "ok"]


def test_a_damaged_frame_is_corrupt(store: Store, reader: TcpTransport) -> None:
    store.arena._memory[store.arena.geometry.frame_at(1) + 12_345] ^= 0x10
    assert store.fetch(reader) == ["ok", "corrupt", "ok", "ok"]


# Who may read


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"tenant": "other"}, "refused"),
        ({"grant_id": "other"}, "refused"),
        ({"mac": bytes(32)}, "refused"),
        ({"mac": b""}, "refused"),
        ({"epoch": EPOCH + 1}, "stale_epoch"),
        ({"source": "p1"}, "unreachable"),
        ({"tenant": "t" * MAX_MESSAGE_BYTES}, "unreachable"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_grant_reads_nothing(
    store: Store, reader: TcpTransport, change: dict[str, object], expected: str
) -> None:
    grant = msgspec.structs.replace(store.grant, **change)
    assert set(store.fetch(reader, grant=grant)) == {expected}
    assert store.works(reader)


@pytest.mark.parametrize(
    ("grant", "expected"),
    [(("p1", EPOCH), "refused"), (("p0", EPOCH + 1), "stale_epoch")],
    ids=["another worker", "another start"],
)
def test_the_server_tells_others_grants_from_its_own(
    store: Store, stack: contextlib.ExitStack, grant: tuple[str, int], expected: str
) -> None:
    """Even if the reader believes that this is where to ask."""
    name, epoch = grant
    other = LeaseTable(name, epoch, SECRET, StoreIndex(0)).mint(GRANT_ID, "tenant", 60.0, 0.0)
    peer = Peer(name, epoch, *store.address)
    reader = stack.enter_context(
        contextlib.closing(TcpTransport(lambda source: peer, store.kv_format))
    )
    assert set(store.fetch(reader, grant=other)) == {expected}


def test_a_lease_that_is_over_reads_nothing(store: Store, reader: TcpTransport) -> None:
    late = store.leases.mint("late", "tenant", 1.0, time.monotonic() - 2.0)
    for number in range(4):
        assert store.leases.cover("late", store.key(number))
    assert set(store.fetch(reader, grant=late)) == {"refused"}
    assert store.leases.renew(GRANT_ID, time.monotonic())
    assert store.works(reader)
    store.leases.release(GRANT_ID)
    assert set(store.fetch(reader)) == {"refused"}


def test_a_key_that_the_grant_does_not_cover(store: Store, reader: TcpTransport) -> None:
    narrow = store.leases.mint("narrow", "tenant", 60.0, time.monotonic())
    assert store.leases.cover("narrow", store.key(2))
    assert store.fetch(reader, grant=narrow) == ["refused", "refused", "ok", "refused"]


def test_another_kv_format_is_not_read(store: Store, stack: contextlib.ExitStack) -> None:
    other = msgspec.structs.replace(store.kv_format, dtype="bfloat16")
    reader = TcpTransport({"p0": store.peer()}.get, other)
    stack.enter_context(contextlib.closing(reader))
    assert set(store.fetch(reader)) == {"wrong_format"}


# Where nobody answers


def test_no_address_is_known(store: Store, stack: contextlib.ExitStack) -> None:
    reader = TcpTransport(lambda source: None, store.kv_format)
    stack.enter_context(contextlib.closing(reader))
    assert set(store.fetch(reader)) == {"unreachable"}


@pytest.mark.parametrize("host", ["127.0.0.1", "no-address", "x" * 300, "a\0b", "::1"])
def test_nobody_listens(store: Store, stack: contextlib.ExitStack, host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    reader = store.transport((host, port))
    stack.enter_context(contextlib.closing(reader))
    assert set(store.fetch(reader, seconds=0.5)) == {"unreachable"}


@pytest.mark.parametrize(("seconds", "expected"), [(0.2, "timed_out"), (5.0, "unreachable")])
def test_a_source_that_takes_no_connection(
    store: Store,
    stack: contextlib.ExitStack,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    expected: str,
) -> None:
    monkeypatch.setattr(tcp, "CONNECT_S", 0.4)
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
    for _ in range(3):  # its backlog is full from now on
        waiting = stack.enter_context(socket.socket())
        waiting.setblocking(False)
        waiting.connect_ex(listener.getsockname())
    reader = stack.enter_context(contextlib.closing(store.transport(listener.getsockname())))
    started = time.monotonic()
    assert set(store.fetch(reader, seconds=seconds)) == {expected}
    assert time.monotonic() - started < 3.0


def test_after_the_deadline_nothing_is_asked(store: Store, reader: TcpTransport) -> None:
    assert set(store.fetch(reader, seconds=0.0)) == {"timed_out"}
    assert num_connections(store) == 0


# Connections


def test_connections_are_kept_until_they_are_closed(store: Store, reader: TcpTransport) -> None:
    for _ in range(3):
        assert store.works(reader)
    assert store.server is not None
    (connection,) = store.server._connections
    assert num_connections(store) == 1
    reader.close()
    until(lambda: num_connections(store) == 0)
    assert store.works(reader)
    assert connection not in store.server._connections


def test_a_connection_that_the_server_closed_is_not_used(
    store: Store, reader: TcpTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp_server, "IDLE_S", 0.05)
    assert store.works(reader)
    until(lambda: num_connections(store) == 0, seconds=0.5)
    assert store.works(reader)


def test_a_restarted_worker_is_another(make: Make, stack: contextlib.ExitStack) -> None:
    old = make()
    peers = {"p0": old.peer()}
    reader = TcpTransport(peers.get, old.kv_format)
    stack.enter_context(contextlib.closing(reader))
    assert old.works(reader)
    old.close()
    new = make(epoch=EPOCH + 1, port=old.address[1])
    assert set(old.fetch(reader)) == {"stale_epoch"}, "the new one says so"
    peers["p0"] = new.peer()
    assert set(old.fetch(reader)) == {"stale_epoch"}, "the address is known to be of the new one"
    assert new.works(reader)
    new.close()
    assert set(new.fetch(reader)) == {"unreachable"}
