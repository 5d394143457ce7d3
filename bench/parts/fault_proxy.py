"""A TCP proxy that does to a connection what bad networks and bad peers do to it.

    with FaultProxy(target, down=[Flip(at=1000), Throttle(125_000)]) as proxy:
        ...                                     # connect to proxy.address
        assert proxy.hits["Flip"] == 1

`up` is from who connects to the target, `down` the way back. `at` counts the bytes of that
direction of one connection, from 0; faults of one direction apply in the order given. A fault that
is never reached does nothing, so look at `hits`, which counts each kind as it strikes.

As a program, for measurements, it is a process of its own and prints its port:

    python -m parts.fault_proxy 127.0.0.1:9000 --down '[{"type": "Throttle", "bytes_per_s": 125e6}]'
"""

from __future__ import annotations

import argparse
import contextlib
import select
import socket
import struct
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from types import TracebackType

import msgspec

CHUNK_BYTES = 64 << 10
QUEUE_BYTES = 256 << 10


class Fault(msgspec.Struct, frozen=True, tag=True):
    """What happens to one direction."""


class Delay(Fault, frozen=True):
    """Every byte arrives so much later; just as many arrive in a second."""

    seconds: float


class Throttle(Fault, frozen=True):
    """No more than so many bytes a second, evenly."""

    bytes_per_s: float


class Freeze(Fault, frozen=True):
    """After `at` bytes nothing more comes, and nothing ends."""

    at: int


class Cut(Fault, frozen=True):
    """After `at` bytes the connection is reset, for both ends."""

    at: int


class Truncate(Fault, frozen=True):
    """After `at` bytes the connection ends in good order, for both ends."""

    at: int


class Flip(Fault, frozen=True):
    """One bit of byte `at` is the other one."""

    at: int
    bit: int = 0


class Duplicate(Fault, frozen=True):
    """`num_bytes` from `at` on come twice."""

    at: int
    num_bytes: int


class Reorder(Fault, frozen=True):
    """`num_bytes` from `at` on change places with the `num_then` that follow them."""

    at: int
    num_bytes: int
    num_then: int


class Replay(Fault, frozen=True):
    """Whatever is said first, `data` comes instead, and nothing else."""

    data: bytes


AnyFault = Delay | Throttle | Freeze | Cut | Truncate | Flip | Duplicate | Reorder | Replay


class _Ended(Exception):
    """The connection is over; with `is_reset`, abruptly. `data` still goes through."""

    def __init__(self, data: bytes, is_reset: bool) -> None:
        super().__init__()
        self.data = data
        self.is_reset = is_reset


class _Script:
    """One fault on its way through one direction: takes what comes, gives what goes on."""

    def __init__(self, fault: AnyFault, hits: Counter[str]) -> None:
        self._fault = fault
        self._hits = hits
        self._taken = 0
        self._held = bytearray()
        self._is_done = False

    @property
    def is_frozen(self) -> bool:
        return self._is_done and isinstance(self._fault, Freeze)

    def feed(self, data: bytes) -> bytes:
        fault, start = self._fault, self._taken
        self._taken += len(data)
        match fault:
            case Freeze(at) | Cut(at) | Truncate(at):
                if self._taken < at or not data:
                    return data
                data = data[: max(0, at - start)]
                self._hit()
                if not isinstance(fault, Freeze):
                    raise _Ended(data, is_reset=isinstance(fault, Cut))
                return data
            case Flip(at, bit) if start <= at < self._taken:
                self._hit()
                flipped = bytearray(data)
                flipped[at - start] ^= 1 << bit
                return bytes(flipped)
            case Duplicate(at, num_bytes):
                return self._rearrange(data, start, at, num_bytes)
            case Reorder(at, num_bytes, num_then):
                return self._rearrange(data, start, at, num_bytes + num_then)
            case Replay(replayed):
                first = not self._is_done
                if first:
                    self._hit()
                return replayed if first else b""
        return data

    def _rearrange(self, data: bytes, start: int, at: int, num_bytes: int) -> bytes:
        """Hold bytes from `at` on until there are `num_bytes`, then let them go as they should."""
        if self._is_done or self._taken <= at:
            return data
        before = data[: max(0, at - start)]
        self._held += data[len(before) :]
        if len(self._held) < num_bytes:
            return before
        self._hit()
        held, fault = bytes(self._held), self._fault
        if isinstance(fault, Reorder):
            first, then = held[: fault.num_bytes], held[fault.num_bytes : num_bytes]
            return before + then + first + held[num_bytes:]
        return before + held[:num_bytes] + held

    def _hit(self) -> None:
        if not self._is_done:
            self._hits[type(self._fault).__name__] += 1
        self._is_done = True


class _Direction:
    """Bytes on their way from one socket to the other, each chunk with the time it is due."""

    def __init__(
        self,
        source: socket.socket,
        sink: socket.socket,
        faults: Sequence[AnyFault],
        hits: Counter[str],
        recorded: bytearray | None,
    ) -> None:
        self.source = source
        self.sink = sink
        self.is_through = False  # the source has ended, and the sink has been told
        self._is_over = False  # the source has ended
        self._recorded = recorded
        self._hits = hits
        self._scripts = [_Script(fault, hits) for fault in faults]
        self._delay_s = sum(f.seconds for f in faults if isinstance(f, Delay))
        self._bytes_per_s = min(
            (f.bytes_per_s for f in faults if isinstance(f, Throttle)), default=0.0
        )
        self._max_queued = QUEUE_BYTES + self._delay_s * (self._bytes_per_s or 1e9)
        self._queue: deque[tuple[float, memoryview]] = deque()
        self._num_queued = 0
        self._free_at = 0.0  # when the link has sent what was given to it

    @property
    def wants_to_read(self) -> bool:
        is_frozen = any(script.is_frozen for script in self._scripts)
        return not self._is_over and not is_frozen and self._num_queued < self._max_queued

    @property
    def due(self) -> float | None:
        return self._queue[0][0] if self._queue else None

    def take(self) -> None:
        """Read what has come and pass it through the script; raises `_Ended` if that ends it."""
        data = self.source.recv(CHUNK_BYTES)
        if not data:
            self._is_over = True
            return
        if self._recorded is not None:
            self._recorded += data
        try:
            for script in self._scripts:
                data = script.feed(data)
        except _Ended as end:
            self._flush(end.data)
            raise
        now = time.monotonic()
        if self._bytes_per_s:
            self._free_at = max(now, self._free_at) + len(data) / self._bytes_per_s
            self._hits["Throttle"] += 1
        if self._delay_s:
            self._hits["Delay"] += 1
        if data:
            self._queue.append((max(now, self._free_at) + self._delay_s, memoryview(data)))
            self._num_queued += len(data)

    def give(self) -> None:
        """Send what is due; at the end, end."""
        while self._queue and self._queue[0][0] <= time.monotonic():
            at, data = self._queue[0]
            try:
                sent = self.sink.send(data)
            except BlockingIOError:
                return
            self._num_queued -= sent
            if sent < len(data):
                self._queue[0] = (at, data[sent:])
                return
            self._queue.popleft()
        if self._is_over and not self._queue and not self.is_through:
            self.is_through = True
            with contextlib.suppress(OSError):
                self.sink.shutdown(socket.SHUT_WR)

    def _flush(self, data: bytes) -> None:
        """Send all that is left, and `data`, while the sink takes it."""
        self.sink.settimeout(1.0)
        with contextlib.suppress(OSError):
            for _, queued in self._queue:
                self.sink.sendall(queued)
            self.sink.sendall(data)


class _Connection(threading.Thread):
    """Both directions of one connection, on a thread of its own."""

    def __init__(self, proxy: FaultProxy, client: socket.socket, server: socket.socket) -> None:
        super().__init__(name="fault-proxy")
        self._sockets = (client, server)
        self._wake, self._woken = socket.socketpair()
        self.recorded = (bytearray(), bytearray())
        up, down = self.recorded if proxy.records else (None, None)
        self._ways = (
            _Direction(client, server, proxy.up, proxy.hits, up),
            _Direction(server, client, proxy.down, proxy.hits, down),
        )
        for sock in self._sockets:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setblocking(False)

    def run(self) -> None:
        try:
            while not all(way.is_through for way in self._ways) and self._turn():
                pass
        except _Ended as end:
            if end.is_reset:
                for sock in self._sockets:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except OSError:
            pass  # an end has gone
        finally:
            for sock in (*self._sockets, self._woken):
                sock.close()

    def stop(self) -> None:
        self._wake.close()
        self.join()

    def _turn(self) -> bool:
        now = time.monotonic()
        dues = [(way, way.due) for way in self._ways if way.due is not None]
        writing = [way.sink for way, due in dues if due <= now]
        later = [due - now for _, due in dues if due > now]
        reading = [way.source for way in self._ways if way.wants_to_read]
        ready, _, _ = select.select(
            [*reading, self._woken], writing, [], min(later) if later else None
        )
        if self._woken in ready:
            return False
        for way in self._ways:
            if way.source in ready:
                way.take()
            way.give()
        return True


class FaultProxy:
    """Listens on a free port of 127.0.0.1 until `close`.

    A connection gets the `up` and `down` of the moment at which it is made. records: keep what
    was taken, see `recorded`.
    """

    def __init__(
        self,
        target: tuple[str, int],
        down: Sequence[AnyFault] = (),
        up: Sequence[AnyFault] = (),
        records: bool = False,
    ) -> None:
        self.target = target
        self.records = records
        self.down = list(down)
        self.up = list(up)
        self.hits: Counter[str] = Counter()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self._connections: list[_Connection] = []
        self._thread = threading.Thread(target=self._run, name="fault-proxy-accept")
        self._thread.start()

    @property
    def recorded(self) -> list[tuple[bytes, bytes]]:
        """Of each connection so far: the bytes taken up and down, before any fault."""
        return [(bytes(c.recorded[0]), bytes(c.recorded[1])) for c in self._connections]

    def _run(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self.target, 1.0)
            except OSError:
                client.close()
                continue
            connection = _Connection(self, client, server)
            self._connections.append(connection)
            connection.start()

    def close(self) -> None:
        """End everything. Idempotent."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._listener.close()
        self._thread.join()
        self.drop()

    def drop(self) -> None:
        """End every connection there is; the next ones get the faults of their own moment."""
        while self._connections:
            self._connections.pop().stop()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("target", metavar="HOST:PORT")
    parser.add_argument("--up", default="[]", metavar="JSON")
    parser.add_argument("--down", default="[]", metavar="JSON")
    args = parser.parse_args()
    host, _, port = args.target.rpartition(":")
    up, down = (msgspec.json.decode(text, type=list[AnyFault]) for text in (args.up, args.down))
    with FaultProxy((host, int(port)), down, up) as proxy:
        print(proxy.address[1], flush=True)
        sys.stdin.read()  # until whoever started it has gone
    return 0


if __name__ == "__main__":
    sys.exit(main())
