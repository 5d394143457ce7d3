"""The serving half: a door at which readers learn how to read our arena through NIXL.

`NixlStore` owns a thread, which sleeps when nobody asks, the serving process and the listeners.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from baton.config import is_loopback
from baton.errors import ConfigError
from baton.fabric.arena import Arena
from baton.fabric.descriptors import (
    ASK_TIMEOUT_S,
    LENGTH,
    MAX_ASK_BYTES,
    Refusal,
    decode_ask,
    listen,
    pack,
    peer_uid,
    refusal,
)
from baton.fabric.nixl.agent import check_installed
from baton.fabric.nixl.child import Child
from baton.fabric.nixl.wire import Opened

logger = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 256
START_TIMEOUT_S: Final = 30.0


class Listen(msgspec.Struct, frozen=True):
    """Where readers on other hosts find the door. port 0 takes a free one."""

    host: str
    port: int = 0
    tls: ssl.SSLContext | None = None
    allow_insecure: bool = False


class _Connection:
    """received: of the ask, which must be whole by `limit`; no limit once it is answered."""

    def __init__(self, limit: float) -> None:
        self.received = bytearray()
        self.limit: float | None = limit


class NixlStore:
    """Lets readers read one arena through NIXL. Call `stop` before the arena is closed.

    secret: the one that the worker's `LeaseTable` mints with. tcp: also listen there; `tcp_port`
    is then the port. The constructor returns when the serving process is ready.

    Raises:
        ConfigError: NIXL is missing or does not start, the door cannot be opened, or it would
            stand open to other machines without TLS.
    """

    def __init__(
        self,
        runtime_dir: Path,
        source: str,
        arena: Arena,
        secret: bytes,
        tcp: Listen | None = None,
    ) -> None:
        check_installed()
        self._source = source
        self._geometry = arena.geometry
        self._secret = secret
        self._tls = tcp.tls if tcp else None
        self.tcp_port: int | None = None
        self._unix, self._path = listen(runtime_dir, source, "nixl")
        self._inode = self._path.stat().st_ino
        self._tcp: socket.socket | None = None
        if tcp is not None:
            try:
                self._tcp = _listen_tcp(tcp)
            except ConfigError:
                self._unix.close()
                self._unlink()
                raise
            self.tcp_port = int(self._tcp.getsockname()[1])
        self._child = Child(arena.fd, f"{source}-{arena.geometry.epoch:x}")
        self._connections: dict[socket.socket, _Connection] = {}  # oldest first
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._begun = threading.Event()  # the serving process is ready, or did not start
        self._thread = threading.Thread(target=self._run, name="baton-nixl-door", daemon=False)
        self._thread.start()
        if not self._begun.wait(START_TIMEOUT_S) or self._child.registered is None:
            self.stop()
            raise ConfigError("NIXL does not start: see the serving process's words in the log")

    @property
    def num_starts(self) -> int:
        """Serving processes that were started; more than one means that some have ended."""
        return self._child.num_starts

    def stop(self) -> None:
        """Close the door and end thread and serving process. Idempotent."""
        self._wake_writer.close()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._watch(self._wake_reader, lambda: None)
            self._watch(self._unix, lambda: self._accept(self._unix))
            if (tcp := self._tcp) is not None:
                self._watch(tcp, lambda: self._accept(tcp))
            self._start_child()
            while self._turn():
                pass
        finally:
            self._begun.set()
            for connection in list(self._connections):
                self._drop(connection)
            self._child.stop()
            self._selector.close()
            for listener in (self._unix, self._tcp, self._wake_reader):
                if listener is not None:
                    listener.close()
            self._unlink()

    def _watch(self, source: socket.socket | int, then: Callable[[], None]) -> None:
        self._selector.register(source, selectors.EVENT_READ, then)

    def _turn(self) -> bool:
        limits = [c.limit for c in self._connections.values() if c.limit is not None]
        if self._child.restart_at is not None:
            limits.append(self._child.restart_at)
        timeout = max(0.0, min(limits) - time.monotonic()) if limits else None
        for selected, _ in self._selector.select(timeout):
            if selected.fileobj is self._wake_reader:
                return False
            selected.data()
        now = time.monotonic()
        for connection, state in list(self._connections.items()):
            if state.limit is not None and state.limit <= now:
                self._drop(connection)
        if self._child.restart_at is not None and self._child.restart_at <= now:
            self._start_child()
        return True

    def _start_child(self) -> None:
        output = self._child.start()
        self._watch(output, lambda: self._hear(output))

    def _hear(self, output: int) -> None:
        if not self._child.hear():
            self._selector.unregister(output)
            self._child.bury()
        if self._child.registered or self._child.restart_at:
            self._begun.set()

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
            connection.setblocking(False)
            if listener is self._unix:
                if peer_uid(connection) != os.geteuid():
                    logger.warning("refused a reader of another user")
                    connection.close()
                    return
            elif self._tls is not None:
                connection = self._tls.wrap_socket(
                    connection, server_side=True, do_handshake_on_connect=False
                )
        except OSError as error:
            logger.warning("cannot accept a reader error=%s", error)
            time.sleep(0.05)  # out of descriptors: the listener stays readable, do not spin
            return
        if len(self._connections) >= MAX_CONNECTIONS:
            strangers = (c for c, state in self._connections.items() if state.limit is not None)
            self._drop(next(strangers, next(iter(self._connections))))
        self._connections[connection] = _Connection(time.monotonic() + ASK_TIMEOUT_S)
        self._watch(connection, lambda: self._receive(connection))

    def _receive(self, connection: socket.socket) -> None:
        """Take what has come: a piece of the ask, or the word that somebody waits."""
        state = self._connections.get(connection)
        if state is None:
            return  # dropped in this same turn
        try:
            while data := connection.recv(LENGTH.size + MAX_ASK_BYTES + 1):
                if state.limit is None:
                    self._child.feed()
                else:
                    state.received += data
                    self._answer(connection, state)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        except Exception as error:
            # Whatever a peer sends or does, the door stays up.
            logger.warning("bad ask error=%s", error)
        self._drop(connection)

    def _answer(self, connection: socket.socket, state: _Connection) -> None:
        """Answer the ask once it is whole.

        Raises:
            ConnectionError: it is too long, or there is nothing to answer with.
        """
        received = state.received
        if len(received) < LENGTH.size:
            return
        end = LENGTH.size + int(LENGTH.unpack_from(received)[0])
        if end > LENGTH.size + MAX_ASK_BYTES or len(received) > end:
            raise ConnectionAbortedError(f"an ask of {end} bytes, {len(received)} came")
        if len(received) < end:
            return
        ask = decode_ask(bytes(received[LENGTH.size :]))
        reply: Opened | Refusal | None
        reply = refusal(ask, self._source, self._geometry.epoch, self._secret)
        if reply is None:
            if self._child.registered is None:
                raise ConnectionAbortedError("the serving process is being started")
            reply = Opened(self._geometry, self._child.registered)
        connection.sendall(pack(reply))
        if isinstance(reply, Refusal):
            raise ConnectionRefusedError(reply.reason)
        state.limit = None
        self._child.feed()

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        del self._connections[connection]
        connection.close()

    def _unlink(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_ino == self._inode:  # else it is our successor's
                self._path.unlink()


def _listen_tcp(where: Listen) -> socket.socket:
    if where.tls is None and not where.allow_insecure and not is_loopback(where.host):
        raise ConfigError(
            f"the NIXL door at {where.host} can be reached from other machines, and TLS is not "
            "set: give a certificate and a key, listen on 127.0.0.1, or allow it to be insecure"
        )
    try:
        family = socket.AF_INET6 if ":" in where.host else socket.AF_INET
        listener = socket.create_server((where.host, where.port), family=family)
    except OSError as error:
        raise ConfigError(
            f"the NIXL door cannot listen at {where.host}:{where.port}: {error}"
        ) from error
    listener.setblocking(False)
    return listener
