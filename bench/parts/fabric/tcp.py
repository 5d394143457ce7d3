"""TCP over loopback: the fabric's verified transfer beside the best plain blocking socket.

Both move the same scattered blocks of one process's memory to the same scattered places of
another's, in the same order. The plain socket (`sendall`, `recv_into` the place) checks nothing;
it is given one stream and two, and also the same number of bytes as one piece of memory, which no
transfer of blocks could be. The best of the four is what the fabric is compared with; every block
of the fabric's is checked against its digest.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import xxhash

from baton.fabric.tcp import TcpTransport
from baton.fabric.tls import TlsFiles, client_context
from baton.fabric.transport import Peer, ReadResult, Wanted
from parts.certificates import make_certificate
from parts.fabric import Missing, Row, interleaved, middle
from parts.fabric.tcp_source import ORDER, blocks_of, frames_of, key_of, kv_format_of, mint
from parts.processes import cpu_s, running

TOTAL_BYTES = 128 << 20
BLOCK_KIB = (32, 512)
"""Of a small model, and of one of 0.5 B parameters."""
TARGET = "≥ 0.9"
NUM_SMALL = 300


class Ends:
    """A pool to receive into, and a process that sends."""

    def __init__(self, block_bytes: int, source: subprocess.Popen[bytes], tls: TlsFiles) -> None:
        assert source.stdout is not None
        plain, fabric, fabric_tls = map(int, source.stdout.readline().split())
        self.block_bytes = block_bytes
        self.num_blocks = TOTAL_BYTES // block_bytes
        self.pid = source.pid
        self.pool = np.zeros((self.num_blocks, block_bytes), np.uint8)
        self.right = blocks_of(self.num_blocks, block_bytes)
        self.grant, _ = mint(self.num_blocks)
        frames = frames_of(self.num_blocks)
        places = np.random.default_rng(2).permutation(self.num_blocks).tolist()
        self.places = [memoryview(self.pool[place]) for place in places]
        self.wanted = [
            Wanted(key_of(n), frames[n], xxhash.xxh3_128_digest(self.right[n]), self.pool[place])
            for n, place in enumerate(places)
        ]
        self.right = self.right[np.argsort(places)]
        self.sockets = [socket.create_connection(("127.0.0.1", plain)) for _ in range(2)]
        kv_format = kv_format_of(block_bytes)

        def transport(port: int, num_streams: int, files: TlsFiles | None) -> TcpTransport:
            peer = Peer("p0", 1, "127.0.0.1", port)
            context = None if files is None else client_context(files)
            return TcpTransport(lambda source: peer, kv_format, context, num_streams)

        self.transports = {
            "tcp, 1 stream": transport(fabric, 1, None),
            "tcp, 2 streams": transport(fabric, 2, None),
            "tcp with TLS, 1 stream": transport(fabric_tls, 1, tls),
            "tcp with TLS, 2 streams": transport(fabric_tls, 2, tls),
        }

    def fetch(self, name: str) -> None:
        results = self.transports[name].fetch(self.grant, self.wanted, time.monotonic() + 60)
        assert all(result is ReadResult.OK for result in results), set(results)

    def fetch_one(self, name: str) -> None:
        results = self.transports[name].fetch(self.grant, self.wanted[:1], time.monotonic() + 60)
        assert results == [ReadResult.OK]

    def fetch_one_anew(self, name: str) -> None:
        self.transports[name].rest()
        self.fetch_one(name)

    def receive(self, num_streams: int, as_one: bool) -> None:
        """By the plain socket."""
        share = self.num_blocks // num_streams

        def stream(number: int) -> None:
            connection, first = self.sockets[number], number * share
            connection.sendall(ORDER.pack(first, first + share, as_one))
            if as_one:
                flat = self.pool.reshape(-1)
                start = first * self.block_bytes
                places = [memoryview(flat[start : start + share * self.block_bytes])]
            else:
                places = self.places[first : first + share]
            for place in places:
                num_bytes = 0
                while num_bytes < place.nbytes:
                    num_bytes += connection.recv_into(place[num_bytes:])

        others = [threading.Thread(target=stream, args=(n,)) for n in range(1, num_streams)]
        for other in others:
            other.start()
        stream(0)
        for other in others:
            other.join()

    def cpu(self, case: Callable[[], object], times: int) -> float:
        """CPU nanoseconds of both ends for a byte."""
        before = time.process_time() + cpu_s(self.pid)
        for _ in range(times):
            case()
        return 1e9 * (time.process_time() + cpu_s(self.pid) - before) / times / TOTAL_BYTES

    def close(self) -> None:
        for transport in self.transports.values():
            transport.close()
        for connection in self.sockets:
            connection.close()


@contextlib.contextmanager
def both_ends(block_bytes: int, tls: TlsFiles) -> Iterator[Ends]:
    arguments = [str(block_bytes), str(TOTAL_BYTES // block_bytes)]
    arguments += [tls.ca_file, tls.cert_file, tls.key_file]
    with running("-m", "parts.fabric.tcp_source", *arguments, stdout=subprocess.PIPE) as source:
        ends = Ends(block_bytes, source, tls)
        try:
            yield ends
        finally:
            ends.close()


def measure(rounds: int) -> list[Row]:
    if shutil.which("openssl") is None:
        raise Missing("the openssl command, which makes the certificates for TLS")
    rows = []
    with tempfile.TemporaryDirectory(prefix="baton-fabric-") as name:
        tls = make_certificate(Path(name), "bench")
        for block_kib in BLOCK_KIB:
            with both_ends(block_kib << 10, tls) as ends:
                rows += _throughput(ends, f"blocks of {block_kib} KiB", rounds)
                if block_kib == BLOCK_KIB[0]:
                    rows += _latency(ends, block_kib)
    return rows


def _throughput(ends: Ends, size: str, rounds: int) -> list[Row]:
    plain: dict[str, Callable[[], object]] = {
        "plain, 1 stream": lambda: ends.receive(1, as_one=False),
        "plain, 2 streams": lambda: ends.receive(2, as_one=False),
        "plain, 1 stream, one piece": lambda: ends.receive(1, as_one=True),
        "plain, 2 streams, one piece": lambda: ends.receive(2, as_one=True),
    }
    fabric = {name: _fetcher(ends, name) for name in ends.transports}
    seconds = interleaved({**plain, **fabric}, rounds)
    ends.fetch("tcp, 1 stream")
    assert np.array_equal(ends.pool, ends.right)
    best = min(plain, key=lambda name: float(np.median(seconds[name])))
    rows = []
    for name in plain:
        speed, spread = middle(TOTAL_BYTES / seconds[name] / 1e9)
        rows.append(Row(f"{size}: {name}", speed, "GB/s", note=spread))
    for name in fabric:
        value, spread = middle(seconds[best] / seconds[name])
        speed, _ = middle(TOTAL_BYTES / seconds[name] / 1e9)
        target = "" if "TLS" in name else TARGET
        rows.append(
            Row(f"{size}: {name} ÷ {best}", value, "", target, f"{spread}; {speed:.2f} GB/s")
        )
    costs = {name: ends.cpu(case, 3) for name, case in {**plain, **fabric}.items()}
    for name, cost in costs.items():
        if name in fabric or name == best:
            rows.append(Row(f"{size}: CPU of both ends, {name}", cost, "ns/byte"))
    return rows


def _fetcher(ends: Ends, name: str) -> Callable[[], object]:
    return lambda: ends.fetch(name)


def _latency(ends: Ends, block_kib: int) -> list[Row]:
    rows = []
    for name in ("tcp, 1 stream", "tcp with TLS, 1 stream"):
        for what, case, times in (
            ("", ends.fetch_one, NUM_SMALL),
            (", first after a pause", ends.fetch_one_anew, NUM_SMALL // 10),
        ):
            taken = []
            for _ in range(times):
                started = time.perf_counter()
                case(name)
                taken.append(1e6 * (time.perf_counter() - started))
            p50, p99 = np.percentile(taken, (50, 99))
            label = f"one block of {block_kib} KiB, {name}{what}"
            rows.append(Row(label, float(p50), "µs", note=f"99 %: {p99:.0f}"))
    return rows
