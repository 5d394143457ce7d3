"""Reading blocks from another worker's store over TCP, straight into their destinations.

    fetch ──► asks of 1 to 32 MiB ─┬──► stream 1: ask, ask │ blocks, End, blocks, End
               (one queue)         └──► stream 2: …

Each stream takes the next ask from the queue as it goes, and has one more ask at the source than
the one whose answer it is reading, so that neither end waits for the other. What has come is
digested while the kernel receives what follows, and a block is good if its digest is that of the
commit record: nothing else that the source says makes it good. With a codec the encoded block is
checked against the digest that came with it, then decoded.

Connections are kept between fetches, for one start (epoch) of a worker. One on which anything went
wrong, or the deadline passed, is closed: what is late meets nobody, and only a fetch's own
threads, which have ended when it returns, ever write to a destination. Blocks that were whole
before that are good; the others get `timed_out` or `unreachable`.
"""

from __future__ import annotations

import errno
import logging
import select
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Final

from baton.fabric.arena import kv_format_hash
from baton.fabric.exchange import Exchange, ask_bytes, exchanges
from baton.fabric.stream import Stream
from baton.fabric.transport import Peer, ReadResult, Wanted
from baton.fabric.wire import MAX_BLOCKS, MAX_MESSAGE_BYTES, RAW, Codec, Malformed
from baton.types import Grant, KvFormat

logger = logging.getLogger(__name__)

CONNECT_S: Final = 1.0
NUM_STREAMS: Final = 2
_NUM_AHEAD: Final = 2

Resolve = Callable[[str], Peer | None]
"""Where a worker id listens, if that is known. Called on the thread that fetches."""


class TcpTransport:
    """A `Transport` over TCP. Used by one thread; has `num_streams` - 1 helpers of its own.

    kv_format: ours; a store of another format answers WRONG_FORMAT. tls: from
    `tls.client_context`; None speaks plain TCP. num_streams: the most connections of one fetch.
    codecs: what may be asked for beside `raw`, by name.
    """

    def __init__(
        self,
        resolve: Resolve,
        kv_format: KvFormat,
        tls: ssl.SSLContext | None = None,
        num_streams: int = NUM_STREAMS,
        codecs: Mapping[str, Codec] | None = None,
    ) -> None:
        self._resolve = resolve
        self._kv_format = kv_format
        self._kv_format_hash = kv_format_hash(kv_format)
        self._block_bytes = kv_format.block_bytes
        self._tls = tls
        self._num_streams = num_streams
        self._codecs = codecs or {}
        self._idle: dict[tuple[str, int], list[Stream]] = {}
        self._helpers: ThreadPoolExecutor | None = None

    def fetch(
        self, grant: Grant, wanted: Sequence[Wanted], deadline: float, codec: str = RAW
    ) -> list[ReadResult]:
        """See `Transport.fetch`. Takes at most `CONNECT_S` to reach a source that is silent."""
        if time.monotonic() >= deadline:
            return [ReadResult.TIMED_OUT] * len(wanted)
        if codec != RAW and codec not in self._codecs:
            return [ReadResult.CODEC] * len(wanted)
        peer = self._resolve(grant.source)
        if peer is None or peer.epoch != grant.epoch:
            result = ReadResult.UNREACHABLE if peer is None else ReadResult.STALE_EPOCH
            _log(grant, result, "no address is known for it")
            return [result] * len(wanted)
        fetch = _Fetch(grant, peer, wanted, deadline, codec, self._num_streams, self._block_bytes)
        self._run_all(fetch)
        return fetch.results()

    def close(self) -> None:
        """Close every connection, and end the helpers."""
        for streams in self._idle.values():
            for stream in streams:
                stream.close()
        self._idle.clear()
        if self._helpers is not None:
            self._helpers.shutdown()
            self._helpers = None

    def _run_all(self, fetch: _Fetch) -> None:
        self._idle.setdefault(fetch.at, [])  # before the helpers look
        num_helpers = min(self._num_streams, fetch.num_asks // _NUM_AHEAD) - 1
        helping = []
        try:
            for _ in range(num_helpers):
                if self._helpers is None:
                    self._helpers = ThreadPoolExecutor(self._num_streams - 1, "baton-tcp-fetch")
                helping.append(self._helpers.submit(self._run, fetch))
            self._run(fetch)
        finally:
            wait(helping)
        for helper in helping:
            helper.result()

    def _run(self, fetch: _Fetch) -> None:
        """Put asks over one stream until the queue is empty, or the stream fails."""
        stream: Stream | None = None
        try:
            if (first := fetch.next()) is not None:
                stream = self._take(fetch)
                self._converse(fetch, stream, first)
                self._idle[fetch.at].append(stream)
                stream = None
        except (OSError, Malformed) as error:
            fetch.fail(error)
        finally:
            if stream is not None:
                stream.close()

    def _converse(self, fetch: _Fetch, stream: Stream, first: Exchange) -> None:
        codec = None if fetch.codec == RAW else self._codecs[fetch.codec]
        asked: deque[Exchange] = deque()
        following: Exchange | None = first
        while True:
            while following is not None:
                ask = following.ask(fetch.grant, self._kv_format_hash, fetch.codec)
                if len(ask) > MAX_MESSAGE_BYTES:
                    raise Malformed(f"an ask of {len(ask)} bytes")  # for a grant like a book
                stream.send([ask], fetch.deadline)
                asked.append(following)
                following = fetch.next() if len(asked) < _NUM_AHEAD else None
            if not asked:
                return
            asked.popleft().receive(stream, fetch.deadline, self._kv_format, codec)
            following = fetch.next()

    def _take(self, fetch: _Fetch) -> Stream:
        """A connection to the source: one that is idle and still stands, or a new one."""
        idle = self._idle[fetch.at]
        while idle:
            try:
                stream = idle.pop()
            except IndexError:  # a helper was faster
                break
            if stream.is_quiet:
                return stream
            stream.close()
        limit = min(fetch.deadline, time.monotonic() + CONNECT_S)
        return connect(fetch.peer, self._tls, limit)


class _Fetch:
    """The asks of one fetch, made as streams take them, and why a stream failed, if one did."""

    def __init__(
        self,
        grant: Grant,
        peer: Peer,
        wanted: Sequence[Wanted],
        deadline: float,
        codec: str,
        num_streams: int,
        block_bytes: int,
    ) -> None:
        self.grant = grant
        self.peer = peer
        self.deadline = deadline
        self.codec = codec
        self.at = (grant.source, grant.epoch)
        num_bytes = len(wanted) * block_bytes
        most = ask_bytes(num_bytes, num_streams, codec != RAW)
        self.num_asks = max(num_bytes // most, len(wanted) // MAX_BLOCKS)
        self._results: list[ReadResult | None] = [None] * len(wanted)
        self._rest = exchanges(wanted, self._results, most)
        self._taken: list[Exchange] = []
        self._lock = threading.Lock()  # over the two
        self._failure = ReadResult.UNREACHABLE

    def next(self) -> Exchange | None:
        """The next ask, for whichever stream is first; None when there is no more."""
        with self._lock:
            exchange = next(self._rest, None)
            if exchange is not None:
                self._taken.append(exchange)
            return exchange

    def fail(self, error: Exception) -> None:
        late = isinstance(error, TimeoutError) and time.monotonic() >= self.deadline
        self._failure = ReadResult.TIMED_OUT if late else ReadResult.UNREACHABLE
        _log(self.grant, self._failure, str(error))

    def results(self) -> list[ReadResult]:
        """One for each block, in order; no stream is at work any more."""
        for exchange in self._taken:
            for index, result in zip(exchange.indices, exchange.results, strict=True):
                self._results[index] = result
        for _ in self._rest:  # not asked for; but some could not have been
            pass
        return [result or self._failure for result in self._results]


def connect(peer: Peer, tls: ssl.SSLContext | None, limit: float) -> Stream:
    """A connection to where `peer` listens, by the instant `limit`, with its handshake behind it.

    Raises:
        OSError: (TimeoutError after `limit`) it cannot be reached, or is none of ours.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            peer.host, peer.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )[0]
    except ValueError as error:
        raise OSError(f"not an address: {error}") from error
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        code = sock.connect_ex(address)
        if code == errno.EINPROGRESS:
            poll = select.poll()
            poll.register(sock, select.POLLOUT)
            if not poll.poll(max(0.0, 1000 * (limit - time.monotonic()))):
                raise TimeoutError("no connection in time")
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, "cannot connect")
    except BaseException:
        sock.close()
        raise
    stream = Stream(sock, tls)
    try:
        stream.handshake(limit)
    except BaseException:
        stream.close()
        raise
    return stream


def _log(grant: Grant, result: ReadResult, reason: str) -> None:
    logger.warning(
        "blocks not read source=%r epoch=%d result=%s reason=%r",
        grant.source,
        grant.epoch,
        result,
        reason,
    )
