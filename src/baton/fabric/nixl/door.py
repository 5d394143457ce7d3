"""The reader's way to a store's door: a connection, one question, and then the word that we wait.

A reader finds a source by its id: at the address that the table of peers has for it, else at its
socket in the runtime directory.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from baton.fabric.descriptors import ASK_TIMEOUT_S, LENGTH, Ask, pack, peer_uid, socket_path
from baton.fabric.nixl.wire import MAX_REPLY_BYTES, Opened, Unreadable, checked_reply
from baton.fabric.transport import ReadResult
from baton.types import Grant

NUDGE_EVERY_S: Final = 0.02


class Doors(msgspec.Struct, frozen=True):
    """How sources are found. address_of: (host, port) of a source, or None if it is on this host.

    tls: what to speak with addresses; the host is the name that the certificate must have.
    """

    runtime_dir: Path
    address_of: Callable[[str], tuple[str, int] | None] = lambda _: None
    tls: ssl.SSLContext | None = None


class Door:
    """An open connection to a store's door. Close it."""

    def __init__(self, connection: socket.socket, opened: Opened) -> None:
        self.opened = opened
        self._connection = connection
        self._nudged_at = 0.0
        connection.setblocking(False)

    def nudge(self, now: float) -> bool:
        """Say, if it was not just said, that we wait. False if the connection has ended."""
        if now - self._nudged_at < NUDGE_EVERY_S:
            return True
        self._nudged_at = now
        try:
            if not self._connection.recv(1):
                return False
        except (BlockingIOError, ssl.SSLWantReadError):
            pass
        except OSError:
            return False
        try:
            self._connection.send(b"\0")
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass  # it has heard enough of us, or nothing at all
        except OSError:
            return False
        return True

    def close(self) -> None:
        self._connection.close()


def knock(doors: Doors, grant: Grant, deadline: float, kv_hash: bytes, frame_bytes: int) -> Door:
    """Ask the source of `grant` how to read its store; takes at most `ASK_TIMEOUT_S`.

    Raises:
        Unreadable: it cannot be found, does not answer in time, refuses, or has another format.
    """
    limit = min(deadline, time.monotonic() + ASK_TIMEOUT_S)
    try:
        with contextlib.ExitStack() as to_close:
            connection = to_close.enter_context(_connect(doors, grant.source, limit))
            connection.settimeout(_remaining(limit))
            connection.sendall(pack(Ask(grant)))
            (length,) = LENGTH.unpack(_receive(connection, LENGTH.size, limit))
            if length > MAX_REPLY_BYTES:
                raise ConnectionAbortedError(f"a reply of {length} bytes")
            reply = _receive(connection, length, limit)
            opened = checked_reply(reply, grant.epoch, kv_hash, frame_bytes)
            to_close.pop_all()
            return Door(connection, opened)
    except TimeoutError as error:
        late = time.monotonic() >= deadline
        result = ReadResult.TIMED_OUT if late else ReadResult.UNREACHABLE
        raise Unreadable(result, "no answer in time") from error
    except OSError as error:
        raise Unreadable(ReadResult.UNREACHABLE, str(error)) from error


def _connect(doors: Doors, source: str, limit: float) -> socket.socket:
    with contextlib.ExitStack() as to_close:
        address = doors.address_of(source)
        if address is None:
            path = socket_path(doors.runtime_dir, source, "nixl")
            if path is None:
                raise Unreadable(ReadResult.REFUSED, "not a worker id")
            connection = to_close.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            connection.settimeout(_remaining(limit))
            connection.connect(str(path))
            if peer_uid(connection) != os.geteuid():
                raise ConnectionRefusedError("the socket belongs to another user")
        else:
            connection = socket.create_connection(address, _remaining(limit))
            to_close.enter_context(connection)
            if doors.tls is not None:
                connection = doors.tls.wrap_socket(connection, server_hostname=address[0])
        to_close.pop_all()
        return connection


def _receive(connection: socket.socket, num_bytes: int, limit: float) -> bytes:
    received = b""
    while len(received) < num_bytes:
        connection.settimeout(_remaining(limit))
        data = connection.recv(num_bytes - len(received))
        if not data:
            raise ConnectionResetError("the source closed the connection")
        received += data
    return received


def _remaining(limit: float) -> float:
    remaining = limit - time.monotonic()
    if remaining <= 0:
        raise TimeoutError
    return remaining
