"""Serves the blocks of one store to readers over TCP.

    listener thread: accept ──► one thread a connection, at most `MAX_CONNECTIONS`:

      handshake ──► wait for an ask ──► receive it ──► check ──► send what it may read ──┐
                        ▲   `IDLE_S`        `ASK_S`                   `SEND_S`           │
                        └────────────────────────────────────────────────────────────────┘

A new connection has `ASK_S` for its handshake and first ask. Whoever is slower than these limits,
or says what the protocol does not have, is cut off; the others do not notice. When all places are
taken, the connection that has been idle for longest makes room; if none is idle, the new one is
closed.

`tcp_answers` says what is checked before anything is sent.
"""

from __future__ import annotations

import logging
import select
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from typing import Final

from baton.errors import ConfigError
from baton.fabric.arena import Arena
from baton.fabric.stream import Stream
from baton.fabric.tcp_answers import Allows, Answers
from baton.fabric.wire import Codec, Malformed
from baton.types import KvFormat

logger = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 64
ASK_S: Final = 1.0
IDLE_S: Final = 30.0
SEND_S: Final = 10.0


class TcpServer:
    """Listens from its creation to `stop`, on threads of its own, which sleep when idle.

    host: an address or a name of this machine. port: 0 takes any free one; `address` tells which.
    secret: the one that the worker's `LeaseTable` mints with. tls: from `tls.server_context`;
    None is for one machine, or a network where all are trusted. codecs: what may be asked for
    beside `raw`, by name.

    Raises:
        ConfigError: it cannot listen there.
    """

    def __init__(
        self,
        host: str,
        port: int,
        source: str,
        arena: Arena,
        kv_format: KvFormat,
        secret: bytes,
        allows: Allows,
        tls: ssl.SSLContext | None = None,
        codecs: Mapping[str, Codec] | None = None,
    ) -> None:
        self._answers = Answers(source, arena, kv_format, secret, allows, codecs or {})
        self._tls = tls
        self._listener = _listen(host, port)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._lock = threading.Lock()  # over the connections, each of which takes itself out
        self._connections: dict[_Connection, threading.Thread] = {}
        self._thread = threading.Thread(target=self._run, name="baton-tcp", daemon=False)
        self._thread.start()

    def stop(self) -> None:
        """Stop listening, cut every connection and end the threads. Idempotent."""
        self._wake_writer.close()
        self._thread.join()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._wake_reader, select.POLLIN)
        try:
            while True:
                ready = [fd for fd, _ in poll.poll()]
                if self._wake_reader.fileno() in ready:
                    return
                self._accept()
        finally:
            self._listener.close()
            self._wake_reader.close()
            with self._lock:
                threads = list(self._connections.values())
                for connection in self._connections:
                    connection.stream.shut_down()
            for thread in threads:
                thread.join()
            self._answers.close()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return  # it has left already
        except OSError as error:
            logger.warning("cannot accept a reader error=%s", error)
            time.sleep(0.05)  # out of descriptors: the listener stays readable, do not spin
            return
        try:
            stream = Stream(sock, self._tls, server_side=True)
        except OSError:
            return
        with self._lock:
            if not self._has_room():
                logger.warning("no place for another reader num=%d", MAX_CONNECTIONS)
                stream.close()
                return
            connection = _Connection(stream)
            thread = threading.Thread(
                target=self._serve, args=(connection,), name="baton-tcp-reader", daemon=False
            )
            self._connections[connection] = thread
            thread.start()

    def _has_room(self) -> bool:
        """Whether there is a place for one more, made by cutting an idle connection if need be."""
        staying = [c for c in self._connections if not c.is_cut]
        if len(staying) < MAX_CONNECTIONS:
            return True
        idle = [(c.idle_since, n) for n, c in enumerate(staying) if c.idle_since is not None]
        if not idle:
            return False
        longest = staying[min(idle)[1]]
        longest.is_cut = True
        longest.stream.shut_down()
        return True

    def _serve(self, connection: _Connection) -> None:
        try:
            self._converse(connection)
        except ConnectionError as error:
            logger.debug("a reader has left error=%r", str(error))
        except (OSError, Malformed) as error:  # logged as text: its frames have views of the store
            logger.warning("cut off a reader error=%r", str(error))
        except Exception:
            logger.exception("cut off a reader")  # whatever it is, the others are served
        finally:
            with self._lock:
                del self._connections[connection]
                connection.stream.close()

    def _converse(self, connection: _Connection) -> None:
        stream = connection.stream
        limit = time.monotonic() + ASK_S
        stream.handshake(limit)
        while True:
            ask = stream.receive_message(limit)
            self._answers.answer(ask, stream, SEND_S)
            connection.idle_since = time.monotonic()
            try:
                stream.wait_readable(connection.idle_since + IDLE_S)
            except TimeoutError:
                return
            connection.idle_since = None
            limit = time.monotonic() + ASK_S


class _Connection:
    """A reader. idle_since: an instant while it has no ask before us, after its first."""

    __slots__ = ("idle_since", "is_cut", "stream")

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.idle_since: float | None = None
        self.is_cut = False


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.create_server(address, family=family, backlog=MAX_CONNECTIONS)
    except OSError as error:
        raise ConfigError(
            f"fabric.tcp_host, fabric.tcp_port: cannot listen on {host}:{port}: {error}; "
            "give an address of this machine and a free port, or port 0"
        ) from error
    listener.setblocking(False)
    return listener
