"""A connection with deadlines, plain or TLS: what both ends of `tcp` read and write through.

The socket never blocks; waiting is `poll`, for as long as the caller's limit leaves. A `limit` is
an instant of `time.monotonic()`. One thread uses a stream; `shut_down` alone may come from another.

Every method that moves bytes raises TimeoutError after its limit, another OSError (`ssl.SSLError`
is one) when the connection broke or was closed, and `Malformed` for a message of a length that
none has. After any of them the stream is fit to be closed and for nothing else.
"""

from __future__ import annotations

import contextlib
import math
import select
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from ctypes import c_int32
from typing import Final

from baton.fabric.wire import LENGTH, decode_length

Buffer = bytes | memoryview

PIECE_BYTES: Final = 256 << 10
"""How much is received at a time: what has just come is digested out of the cache. Long enough
for a digest to release the GIL, and for the kernel to be filling its buffer meanwhile."""

_MSG_MORE: Final = getattr(socket, "MSG_MORE", 0)
_MAX_VECTOR: Final = 64
_SEND_BYTES: Final = 1 << 20


class Stream:
    """One connected socket, which it owns from now on.

    tls: wraps the socket; `handshake` must come before anything else. low_water: how many bytes
    must have come before a plain socket counts as readable; who sets that says so here.

    Raises:
        OSError: the connection is already gone. The socket is closed then.
    """

    def __init__(
        self, sock: socket.socket, tls: ssl.SSLContext | None = None, server_side: bool = False
    ) -> None:
        try:
            sock.setblocking(False)
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if tls is not None:
                sock = tls.wrap_socket(
                    sock,
                    server_side=server_side,
                    do_handshake_on_connect=False,
                    suppress_ragged_eofs=False,
                )
        except OSError:
            sock.close()
            raise
        self._socket = sock
        self._tls = sock if isinstance(sock, ssl.SSLSocket) else None
        self.low_water = c_int32(1)
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(sock, select.POLLIN)
        self._writable.register(sock, select.POLLOUT)

    def handshake(self, limit: float) -> None:
        """Agree on keys and check the peer's certificate; nothing without TLS."""
        if self._tls is None:
            return
        while True:
            try:
                return self._tls.do_handshake()
            except ssl.SSLWantReadError:
                _wait(self._readable, limit)
            except ssl.SSLWantWriteError:
                _wait(self._writable, limit)

    @property
    def descriptor(self) -> int | None:
        """The socket's, for who knows how to use it; None with TLS."""
        return self._socket.fileno() if self._tls is None else None

    def send(self, buffers: Sequence[Buffer], limit: float, more: bool = False) -> None:
        """Send all of them, in order, straight from where they lie. more: at once comes more."""
        rest = [memoryview(buffer) for buffer in buffers]
        per_call = _per_call(rest, _SEND_BYTES)
        flags = _MSG_MORE if more else 0
        first = 0
        while first < len(rest):
            _check(limit)
            try:
                if self._tls is None:
                    sent = self._socket.sendmsg(rest[first : first + per_call], (), flags)
                else:
                    sent = self._tls.send(rest[first])
            except (BlockingIOError, ssl.SSLWantWriteError):
                _wait(self._writable, limit)
            except ssl.SSLWantReadError:
                _wait(self._readable, limit)
            else:
                first = _advance(rest, first, sent)

    def fill(self, buffers: Sequence[memoryview], limit: float) -> Iterator[int]:
        """Receive into each of them in turn; yields their indices, each as soon as it is full.

        Buffers of at most `PIECE_BYTES` are best: what has just come is then in the cache.
        """
        rest = list(buffers)
        left = sum(buffer.nbytes for buffer in rest)
        per_call = _per_call(rest, PIECE_BYTES)
        first = 0
        while first < len(rest):
            received = self._receive(rest[first : first + per_call], left, limit)
            left -= received
            before, first = first, _advance(rest, first, received)
            yield from range(before, first)

    def receive_message(self, limit: float) -> bytearray:
        """The next message, without its length."""
        length = bytearray(LENGTH.size)
        for _ in self.fill([memoryview(length)], limit):
            pass
        message = bytearray(decode_length(length))
        for _ in self.fill([memoryview(message)], limit):
            pass
        return message

    def wait_readable(self, limit: float) -> None:
        """Wait until something can be read, be it the end."""
        if not (self._tls is not None and self._tls.pending()):
            self._set_low_water(1)
            _wait(self._readable, limit)

    @property
    def is_quiet(self) -> bool:
        """Whether the connection stands and nothing has come that was not asked for."""
        self._set_low_water(1)
        return not (self._tls is not None and self._tls.pending()) and not self._readable.poll(0)

    def shut_down(self) -> None:
        """End the connection both ways, from whichever thread: the stream's user gets an error."""
        with contextlib.suppress(OSError):  # it has ended already
            # Not the method of SSLSocket, which first makes it a plain one for its user.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the socket back. Idempotent."""
        self._socket.close()

    def _receive(self, buffers: Sequence[memoryview], left: int, limit: float) -> int:
        """Some bytes, at least one, into these buffers; `left` more are to come before a turn."""
        while True:
            _check(limit)
            try:
                if self._tls is None:
                    received = self._socket.recvmsg_into(buffers)[0]
                else:
                    received = self._tls.recv_into(buffers[0])
            except BlockingIOError:
                # Woken for every packet, both ends would get in each other's way.
                self._set_low_water(min(left, PIECE_BYTES))
                _wait(self._readable, limit)
            except ssl.SSLWantReadError:
                _wait(self._readable, limit)
            except ssl.SSLWantWriteError:
                _wait(self._writable, limit)
            else:
                if not received:
                    raise ConnectionResetError("the peer closed the connection")
                return received

    def _set_low_water(self, num_bytes: int) -> None:
        if self._tls is None and num_bytes != self.low_water.value:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, num_bytes)
            self.low_water.value = num_bytes


def _check(limit: float) -> float:
    remaining = limit - time.monotonic()
    if remaining <= 0:
        raise TimeoutError("the time is up")
    return remaining


def _wait(poll: select.poll, limit: float) -> None:
    if not poll.poll(math.ceil(1000 * _check(limit))):
        raise TimeoutError("the time is up")


def _per_call(buffers: Sequence[memoryview], num_bytes: int) -> int:
    """How many buffers to hand to the kernel at once, for about `num_bytes`."""
    longest = max((buffer.nbytes for buffer in buffers), default=0)
    return min(_MAX_VECTOR, max(1, num_bytes // max(1, longest)))


def _advance(rest: list[memoryview], first: int, num_bytes: int) -> int:
    """Take `num_bytes` off the front of `rest[first:]`; returns which is now the first."""
    while first < len(rest) and num_bytes >= rest[first].nbytes:
        num_bytes -= rest[first].nbytes
        first += 1
    if num_bytes:
        rest[first] = rest[first][num_bytes:]
    return first
