"""How a reader on the same host gets the descriptor of a worker's arena.

    reader                                      DescriptorServer at <runtime_dir>/<source>.kv.sock
      connect ───────────────────────────────────►  same user id, or closed
      u32 length, Ask(grant) ────────────────────►  size, schema, source, epoch, MAC
      ◄──────────── u32 length, Descriptor + the descriptor itself, or Refusal; then closed

Who holds a descriptor can read the whole store until he lets go of it, so this serves one trust
domain only: grants keep out mistakes, the user id keeps out people.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import selectors
import socket
import stat
import struct
import threading
import time
from pathlib import Path
from typing import Final, Literal

import msgspec

from baton.core.lease import verify_mac
from baton.errors import ConfigError
from baton.fabric.arena import Arena, Geometry
from baton.types import Grant

logger = logging.getLogger(__name__)

PROTOCOL_VERSION: Final = 1
LENGTH: Final = struct.Struct(">I")
MAX_ASK_BYTES: Final = 16 << 10
MAX_REPLY_BYTES: Final = 4 << 10
MAX_CONNECTIONS: Final = 64
ASK_TIMEOUT_S: Final = 1.0

_SOURCE = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Ask(msgspec.Struct, frozen=True):
    """reader → server: a grant that the server's worker minted."""

    grant: Grant
    protocol: int = PROTOCOL_VERSION


class Descriptor(msgspec.Struct, frozen=True, tag=True):
    """server → reader: comes with one file descriptor."""

    geometry: Geometry


class Refusal(msgspec.Struct, frozen=True, tag=True):
    """server → reader: no."""

    reason: Literal["refused", "stale_epoch"]


decode_ask = msgspec.msgpack.Decoder(Ask).decode


def refusal(ask: Ask, source: str, epoch: int, secret: bytes) -> Refusal | None:
    """Why the store of `source` in `epoch` does not answer; None if the ask is good.

    secret: the one that the worker's `LeaseTable` mints with. Says nothing about expiry.
    """
    grant = ask.grant
    if ask.protocol != PROTOCOL_VERSION or grant.source != source:
        return Refusal("refused")
    if grant.epoch != epoch:
        return Refusal("stale_epoch")
    if not verify_mac(secret, grant):
        logger.warning("refused a grant with a wrong MAC tenant=%r", grant.tenant)
        return Refusal("refused")
    return None


def socket_path(runtime_dir: Path, source: str, kind: str = "kv") -> Path | None:
    """Where the worker `source` listens; None if that is not the name of a worker."""
    return runtime_dir / f"{source}.{kind}.sock" if _SOURCE.fullmatch(source) else None


def peer_uid(connection: socket.socket) -> int:
    """The user id of the process at the other end of a Unix socket."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int(struct.unpack("iII", credentials)[1])


class DescriptorServer:
    """Hands out one arena's descriptor, on a thread of its own that sleeps when idle.

    secret: the one that the worker's `LeaseTable` mints with. The runtime directory is made with
    mode 0700 if it is not there.

    Raises:
        ConfigError: the source is no worker id, or the directory is not ours alone or its path
            is too long for a socket.
    """

    def __init__(self, runtime_dir: Path, source: str, arena: Arena, secret: bytes) -> None:
        self._source = source
        self._arena = arena
        self._secret = secret
        self._listener, self._path = listen(runtime_dir, source)
        self._inode = self._path.stat().st_ino
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        # Oldest first, and all have the same time limit, so also first to be dropped.
        self._connections: dict[socket.socket, tuple[bytearray, float]] = {}
        self._thread = threading.Thread(target=self._run, name="baton-descriptors", daemon=False)
        self._thread.start()

    def stop(self) -> None:
        """Stop listening and end the thread. Idempotent."""
        self._wake_writer.close()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        finally:
            for connection in list(self._connections):
                self._drop(connection)
            self._selector.close()
            self._listener.close()
            self._wake_reader.close()
            with contextlib.suppress(FileNotFoundError):
                if self._path.stat().st_ino == self._inode:  # else it is our successor's
                    self._path.unlink()

    def _turn(self) -> bool:
        oldest = next(iter(self._connections.values()), None)
        timeout = None if oldest is None else max(0.0, oldest[1] - time.monotonic())
        for selected, _ in self._selector.select(timeout):
            if selected.fileobj is self._wake_reader:
                return False
            if selected.fileobj is self._listener:
                self._accept()
            elif isinstance(selected.fileobj, socket.socket):
                self._receive(selected.fileobj)
        now = time.monotonic()
        for connection in [c for c, (_, limit) in self._connections.items() if limit <= now]:
            self._drop(connection)
        return True

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            logger.warning("cannot accept a reader error=%s", error)
            time.sleep(0.05)  # out of descriptors: the listener stays readable, do not spin
            return
        if peer_uid(connection) != os.geteuid():
            logger.warning("refused a reader of another user")
            connection.close()
            return
        connection.setblocking(False)
        self._connections[connection] = bytearray(), time.monotonic() + ASK_TIMEOUT_S
        self._selector.register(connection, selectors.EVENT_READ)
        if len(self._connections) > MAX_CONNECTIONS:
            self._drop(next(iter(self._connections)))

    def _receive(self, connection: socket.socket) -> None:
        """Take what has come; when the ask is whole, answer it and close."""
        if connection not in self._connections:
            return  # dropped in this same turn
        received, _ = self._connections[connection]
        try:
            data = connection.recv(LENGTH.size + MAX_ASK_BYTES + 1 - len(received))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        received += data
        end = None
        if len(received) >= LENGTH.size:
            end = LENGTH.size + int(LENGTH.unpack_from(received)[0])
        if data and (end is None or len(received) < end <= LENGTH.size + MAX_ASK_BYTES):
            return
        if data and len(received) == end:
            try:
                self._answer(connection, bytes(received[LENGTH.size :]))
            except Exception as error:
                # Whatever a peer sends or does, the server stays up.
                logger.warning("bad ask error=%s", error)
        self._drop(connection)

    def _answer(self, connection: socket.socket, data: bytes) -> None:
        ask = decode_ask(data)
        reply: Descriptor | Refusal | None
        reply = refusal(ask, self._source, self._arena.geometry.epoch, self._secret)
        descriptors: list[int] = []
        if reply is None:
            reply = Descriptor(self._arena.geometry)
            descriptors = [self._arena.fd]
        socket.send_fds(connection, [pack(reply)], descriptors)

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        del self._connections[connection]
        connection.close()


def pack(message: msgspec.Struct) -> bytes:
    """A message with its length before it."""
    data = msgspec.msgpack.encode(message)
    return LENGTH.pack(len(data)) + data


def _claim_runtime_dir(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = path.lstat()
    except OSError as error:
        raise ConfigError(f"runtime_dir {path} cannot be used: {error}") from error
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o077:
        raise ConfigError(f"runtime_dir {path} must be a directory of this user with mode 0700")


def listen(runtime_dir: Path, source: str, kind: str = "kv") -> tuple[socket.socket, Path]:
    """A listener for readers on this host, and where it is. See `DescriptorServer` for errors."""
    path = socket_path(runtime_dir, source, kind)
    if path is None:
        raise ConfigError(f"worker id {source!r} must match {_SOURCE.pattern}")
    _claim_runtime_dir(runtime_dir)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)  # of an earlier start
        listener.bind(str(path))
        listener.listen(MAX_CONNECTIONS)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ConfigError(f"runtime_dir: cannot listen at {path}: {error}") from error
    return listener, path
