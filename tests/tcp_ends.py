"""Both ends of `tcp`: a store with blocks and its server, a reader of them, and what came of it."""

from __future__ import annotations

import contextlib
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec
import numpy as np

from baton.core.lease import LeaseTable
from baton.core.store_index import StoreIndex
from baton.fabric.arena import Arena, kv_format_hash
from baton.fabric.exchange import Exchange, view_of
from baton.fabric.tcp import TcpTransport
from baton.fabric.tcp_server import TcpServer
from baton.fabric.transport import Bytes, Peer, ReadableBlock, ReadResult, Wanted, WritableBlock
from baton.fabric.wire import Codec
from baton.types import Grant, KvFormat

BLOCK_BYTES = 40_000
KV_FORMAT = KvFormat(16, "float32", 2, 2, 8, BLOCK_BYTES)
SECRET = b"s" * 32
EPOCH = 9
GRANT_ID = "an-id-that-nobody-guesses"


Make = Callable[..., "Store"]


def kv_format_of(block_bytes: int) -> KvFormat:
    return msgspec.structs.replace(KV_FORMAT, block_bytes=block_bytes)


class Half:
    """A codec that drops every other byte; blocks of tests have every byte twice, so it is exact.

    fails: a decoder that finds something wrong. filled: what encoding was told, block by block.
    """

    def __init__(self, fails: bool = False) -> None:
        self._fails = fails
        self.filled: list[int | None] = []

    def encoded_bytes(self, fmt: KvFormat) -> int:
        return fmt.block_bytes // 2

    def encode(
        self,
        fmt: KvFormat,
        source: ReadableBlock,
        destination: Bytes,
        num_tokens: int | None = None,
    ) -> int:
        self.filled.append(num_tokens)
        destination[:] = np.frombuffer(source, np.uint8)[::2]
        return destination.size

    def decode(self, fmt: KvFormat, source: Bytes, destination: WritableBlock) -> None:
        if self._fails:
            raise ValueError("not a block")
        np.frombuffer(destination, np.uint8)[:] = np.repeat(source, 2)


class Store:
    """A worker's side: `num_blocks` random blocks in as many frames, all covered by one grant.

    listens: whether it has a server; `key(n)` is in frame `n`, and one frame more stays empty.
    """

    def __init__(
        self,
        num_blocks: int = 4,
        block_bytes: int = BLOCK_BYTES,
        epoch: int = EPOCH,
        tls: ssl.SSLContext | None = None,
        codecs: Mapping[str, Codec] | None = None,
        port: int = 0,
        listens: bool = True,
    ) -> None:
        self.kv_format = kv_format_of(block_bytes)
        self.arena = Arena.create(num_blocks + 1, block_bytes, epoch, self.kv_format)
        self.index = StoreIndex(num_blocks + 1)
        self.leases = LeaseTable("p0", epoch, SECRET, self.index)
        self.grant = self.leases.mint(GRANT_ID, "tenant", 60.0, time.monotonic())
        rng = np.random.default_rng(epoch)
        halves = rng.integers(0, 256, (num_blocks, block_bytes // 2), dtype=np.uint8)
        self.blocks = [block.tobytes() for block in np.repeat(halves, 2, axis=1)]
        self.digests = []
        assert self.index.reserve(num_blocks)
        for number, block in enumerate(self.blocks):
            key = self.key(number)
            assert self.index.begin(key).frame == number
            self.digests.append(self.arena.write(number, key, block))
            self.index.seal(key, self.digests[-1])
            assert self.leases.cover(GRANT_ID, key)
        self.server: TcpServer | None = None
        self.address = ("127.0.0.1", port)
        if listens:
            self.server = TcpServer(
                "127.0.0.1",
                port,
                "p0",
                self.arena,
                self.kv_format,
                SECRET,
                self.leases.allows,
                tls,
                codecs,
            )
            self.address = self.server.address

    @staticmethod
    def key(number: int) -> bytes:
        return (number + 1).to_bytes(4) * 8

    def wanted(self, number: int, **changes: object) -> Wanted:
        block = Wanted(
            self.key(number), number, self.digests[number], bytearray(len(self.blocks[number]))
        )
        return msgspec.structs.replace(block, **changes)

    def all_wanted(self) -> list[Wanted]:
        return [self.wanted(number) for number in range(len(self.blocks))]

    def peer(self, address: tuple[str, int] | None = None) -> Peer:
        return Peer("p0", self.arena.geometry.epoch, *(address or self.address))

    def transport(
        self,
        address: tuple[str, int] | None = None,
        tls: ssl.SSLContext | None = None,
        num_streams: int = 2,
        codecs: Mapping[str, Codec] | None = None,
    ) -> TcpTransport:
        """A reader that finds this store at `address`, where a proxy may be."""
        peers = {"p0": self.peer(address)}
        return TcpTransport(peers.get, self.kv_format, tls, num_streams, codecs)

    def fetch(
        self,
        transport: TcpTransport,
        wanted: Sequence[Wanted] | None = None,
        grant: Grant | None = None,
        seconds: float = 10.0,
        codec: str = "raw",
    ) -> list[ReadResult]:
        """Results of all blocks (or those `wanted`), each of which is right if it is OK.

        Fails if it takes noticeably longer than `seconds`.
        """
        blocks = self.all_wanted() if wanted is None else wanted
        started = time.monotonic()
        results = transport.fetch(grant or self.grant, blocks, started + seconds, codec)
        elapsed_s = time.monotonic() - started
        assert elapsed_s < seconds + SLACK_S, f"{elapsed_s:.3f} s of {seconds} s"
        for block, result in zip(blocks, results, strict=True):
            if result is ReadResult.OK:
                assert bytes(block.destination) in self.blocks
                assert self.blocks.index(bytes(block.destination)) == block.frame
        return results

    def works(self, transport: TcpTransport) -> bool:
        return set(self.fetch(transport)) == {ReadResult.OK}

    def close(self) -> None:
        if self.server is not None:
            self.server.stop()
        self.arena.close()


SLACK_S = 2.0
"""What a busy machine may add to a deadline."""


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "in vain"
        time.sleep(0.002)


def num_connections(store: Store) -> int:
    assert store.server is not None
    return len(store.server._connections)


def exchange_of(wanted: Sequence[Wanted]) -> Exchange:
    return Exchange(wanted, [view_of(block) for block in wanted])


def ask_of(store: Store) -> bytes:
    exchange = exchange_of(store.all_wanted())
    return exchange.ask(store.grant, kv_format_hash(store.kv_format), "raw")


class Source:
    """A `Store` in a process of its own, which can be killed and frozen; `twin` is what it holds.

    port: where it listens; 0 takes any free one.
    """

    def __init__(
        self, num_blocks: int = 4, block_bytes: int = BLOCK_BYTES, epoch: int = EPOCH, port: int = 0
    ) -> None:
        self.twin = Store(num_blocks, block_bytes, epoch, listens=False)
        arguments = [str(number) for number in (num_blocks, block_bytes, epoch, port)]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None
        self.twin.address = ("127.0.0.1", int(self.process.stdout.readline()))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)  # it takes its time

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.twin.close()
        self.thaw()
        self.process.communicate(timeout=20)


def serve(num_blocks: int, block_bytes: int, epoch: int, port: int) -> None:
    """Be a source until standard input ends."""
    with contextlib.closing(Store(num_blocks, block_bytes, epoch, port=port)) as store:
        print(store.address[1], flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    serve(*map(int, sys.argv[1:]))
