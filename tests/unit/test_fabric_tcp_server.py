"""The TCP server against readers who are slow, silent, too many or talk nonsense."""

from __future__ import annotations

import contextlib
import socket
import struct
import time

import msgspec
import pytest
from tcp_ends import (
    BLOCK_BYTES,
    SECRET,
    Make,
    Store,
    ask_of,
    num_connections,
    until,
)

from baton.errors import ConfigError
from baton.fabric import tcp_server
from baton.fabric.tcp import TcpTransport
from baton.fabric.tcp_server import TcpServer
from baton.fabric.transport import ReadResult
from baton.fabric.wire import (
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    Refusal,
    decode_answer,
    decode_ask,
    pack,
)

pytest_plugins = ["tcp_fixtures"]

OK = ReadResult.OK


# The server against its readers


def connect(store: Store) -> socket.socket:
    return socket.create_connection(store.address, 5.0)


def closes(connection: socket.socket) -> bool:
    """Whether the server ends it, saying nothing more."""
    try:
        return connection.recv(1 << 16) == b""
    except ConnectionResetError:
        return True


def test_silent_readers_are_cut_off_and_block_nobody(
    store: Store, reader: TcpTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp_server, "ASK_S", 0.3)
    ask = ask_of(store)
    silent = [connect(store) for _ in range(8)]
    for number, connection in enumerate(silent):
        connection.sendall(ask[:number])
    assert store.works(reader)
    started = time.monotonic()
    assert all(closes(connection) for connection in silent)
    assert time.monotonic() - started < 2.0, "one after the other it takes 2.4 s"
    for connection in silent:
        connection.close()


def test_an_ask_in_dribs_is_cut_off(
    store: Store, reader: TcpTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second ask of a connection too: the time runs from its first byte."""
    ask = ask_of(store)
    with connect(store) as connection:
        connection.sendall(ask)
        num_bytes = 0
        while num_bytes < 4 * BLOCK_BYTES:
            num_bytes += len(connection.recv(1 << 20))
        monkeypatch.setattr(tcp_server, "ASK_S", 0.3)
        started = time.monotonic()
        num_sent = 0
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for byte in ask:
                num_sent += connection.send(bytes([byte]))
                time.sleep(0.02)
        assert time.monotonic() - started > 0.2
        assert num_sent < len(ask)
    assert store.works(reader)


def test_a_byte_at_a_time_is_an_ask(store: Store) -> None:
    with connect(store) as connection:
        for byte in ask_of(store):
            connection.send(bytes([byte]))
        assert connection.recv(4096)


def test_a_reader_that_does_not_read_is_cut_off(
    make: Make, stack: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp_server, "SEND_S", 0.3)
    store = make(num_blocks=4, block_bytes=8 << 20)
    reader = stack.enter_context(contextlib.closing(store.transport()))
    with connect(store) as connection:
        connection.sendall(ask_of(store))
        until(lambda: num_connections(store) == 1)
        assert store.works(reader)
        reader.close()
        until(lambda: num_connections(store) == 0)


def test_no_more_connections_than_there_are_places(
    store: Store, reader: TcpTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Idle ones make room, the one that was idle for longest first; busy ones do not."""
    monkeypatch.setattr(tcp_server, "MAX_CONNECTIONS", 3)
    assert store.works(reader)
    silent = [connect(store) for _ in range(2)]
    until(lambda: num_connections(store) == 3)
    silent.append(connect(store))
    until(lambda: not next(iter(reader._idle.values()))[0].is_quiet)
    until(lambda: num_connections(store) == 3)
    with connect(store) as one_too_many:
        assert closes(one_too_many)
    assert store.fetch(reader, seconds=2.0) == ["unreachable"] * 4
    silent.pop().close()
    until(lambda: num_connections(store) == 2)
    assert store.works(reader)
    for connection in silent:
        connection.close()


def test_stopping_cuts_whoever_is_there(make: Make, stack: contextlib.ExitStack) -> None:
    store = make(num_blocks=4, block_bytes=8 << 20)
    reader = stack.enter_context(contextlib.closing(store.transport()))
    assert store.works(reader)
    with connect(store) as silent, connect(store) as greedy:
        greedy.sendall(ask_of(store))
        until(lambda: num_connections(store) >= 3)
        started = time.monotonic()
        store.close()
        assert time.monotonic() - started < tcp_server.SEND_S / 2
        assert closes(silent)
    assert set(store.fetch(reader)) == {"unreachable"}


def test_garbage_is_answered_by_an_end(store: Store, reader: TcpTransport) -> None:
    good = ask_of(store)
    for malformed in (
        b"\xff" * 8,
        bytes(4),
        struct.pack(">I", MAX_MESSAGE_BYTES + 1),
        struct.pack(">I", 5000) + b"\x91" * 5000,
        pack(Refusal(bytes(16), "refused")),
        good[:4] + b"\x00" + good[5:],
        b"GET / HTTP/1.1\r\n\r\n",
    ):
        with connect(store) as connection:
            connection.sendall(malformed)
            assert closes(connection), malformed[:20]
    assert store.works(reader)


def test_a_length_that_is_too_long_is_not_waited_for(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp_server, "ASK_S", 60.0)
    started = time.monotonic()
    with connect(store) as connection:
        connection.sendall(struct.pack(">I", MAX_MESSAGE_BYTES + 1))
        assert closes(connection)
    assert time.monotonic() - started < 30.0


def test_another_protocol_is_refused(store: Store) -> None:
    ask = msgspec.structs.replace(decode_ask(ask_of(store)[4:]), protocol=PROTOCOL_VERSION + 1)
    with connect(store) as connection:
        connection.sendall(pack(ask))
        assert decode_answer(connection.recv(4096)[4:]) == Refusal(ask.ask_id, "refused")


def test_a_port_that_is_taken_is_told(store: Store) -> None:
    for host, port in (store.address, ("203.0.113.1", 0), ("no such host", 0)):
        with pytest.raises(ConfigError, match=r"fabric\.tcp_port: cannot listen"):
            TcpServer(host, port, "p0", store.arena, store.kv_format, SECRET, store.leases.allows)
