"""Random mutations of asks and answers, against the real serving end and the real reader.

Each goes through a socket pair whose far end has then closed, so nothing ever waits. Whatever
comes: no crash, no block accepted that is not the one asked for, no block sent that the grant does
not cover, no memory beyond a bound, and both ends work as before when it is over.

`make fuzz MUTATIONS=100000` runs more of them; each half of the number goes to one side.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tcp_ends import GRANT_ID, SECRET, Half, Store, exchange_of, until

from baton.fabric.arena import kv_format_hash
from baton.fabric.exchange import Exchange
from baton.fabric.stream import Stream
from baton.fabric.tcp_answers import Answers
from baton.fabric.transport import ReadResult
from baton.fabric.wire import (
    BLOCK_RESULTS,
    Ask,
    Blocks,
    Malformed,
    Refusal,
    decode_answer,
    decode_ask,
    decode_end,
    decode_length,
)

pytest_plugins = ["tcp_fixtures"]

MUTATIONS = int(os.environ.get("MUTATIONS", "20000"))
NUM_BLOCKS = 4
BLOCK_BYTES = 256
MAX_GROWTH_BYTES = 32 << 20
CODECS = {"half": Half()}
INTERESTING = [
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    bytes(4),
    struct.pack(">I", 1 << 16),
    struct.pack(">I", (1 << 16) + 1),
    b"\xdd\xff\xff\xff\xff",  # an array of 4 billion
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",  # as many bytes
    b"\xdb\xff\xff\xff\xff",
    b"\xcf" + b"\xff" * 8,
    b"\xd3\x80" + bytes(7),
    b"\xc0",
    b"\x91" * 3000,
]


def mutated(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """`data` with one to three of its places flipped, overwritten, cut, repeated or mixed up."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(result) + 1)
        to = min(len(result), at + rng.randrange(1, 64))
        kind = rng.randrange(8)
        if kind <= 1 and result:
            result[rng.randrange(len(result))] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del result[at:]
        elif kind == 3:
            del result[at:to]
        elif kind == 4:
            piece = rng.choice(INTERESTING)
            result[at : at + len(piece) * rng.randrange(2)] = piece
        elif kind == 5:
            result[at:at] = result[at:to]
        elif kind == 6:
            start = rng.randrange(len(other))
            result[at : at + rng.randrange(64)] = other[start : start + rng.randrange(64)]
        else:  # the length before the message
            result[:4] = struct.pack(">I", max(0, len(data) - 4 + rng.randrange(-9, 10)))
    return bytes(result)


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@contextlib.contextmanager
def no_growth() -> Iterator[None]:
    before, peak_before = rss_bytes(), peak_rss_bytes()
    yield
    assert rss_bytes() - before < MAX_GROWTH_BYTES
    assert peak_rss_bytes() - max(before, peak_before) < MAX_GROWTH_BYTES


class Ends:
    """The serving end of a store and readers of it, joined by socket pairs."""

    def __init__(self) -> None:
        self.store = Store(NUM_BLOCKS, BLOCK_BYTES, codecs=CODECS)
        # In the store, but not for everybody.
        self.secret_key = b"secret key".ljust(32)
        self.store.arena.write(NUM_BLOCKS, self.secret_key, b"S" * BLOCK_BYTES)
        allows = self.store.leases.allows
        fmt = self.store.kv_format
        self.answers = Answers("p0", self.store.arena, fmt, SECRET, allows, CODECS)

    def exchange(self, codec: str) -> tuple[Exchange, bytes]:
        """An ask for some blocks, one of which is the secret, or has a wrong frame."""
        wanted = self.store.all_wanted()
        wanted[1] = self.store.wanted(1, frame=2)
        wanted[2] = self.store.wanted(2, key=self.secret_key, frame=NUM_BLOCKS)
        exchange = exchange_of(wanted)
        return exchange, exchange.ask(self.store.grant, kv_format_hash(self.store.kv_format), codec)

    def serve(self, data: bytes) -> bytes:
        """What the serving end says to `data`, however many asks that is."""
        reader, server = socket.socketpair()
        with reader:
            reader.sendall(data)
            reader.shutdown(socket.SHUT_WR)
            stream = Stream(server)
            limit = time.monotonic() + 5.0
            try:
                while True:
                    self.answers.answer(stream.receive_message(limit), stream, 5.0)
            except (ConnectionResetError, Malformed):
                pass  # the end, or garbage; a TimeoutError is a failure
            finally:
                stream.close()
            said = b""
            with contextlib.suppress(ConnectionResetError):  # it has not read all of `data`
                while piece := reader.recv(1 << 16):
                    said += piece
            return said

    def receive(self, exchange: Exchange, data: bytes, codec: str) -> bool:
        """Let `exchange` have `data` for an answer; whether it took it for one."""
        reader, server = socket.socketpair()
        with server:
            server.sendall(data)
        stream = Stream(reader)
        try:
            exchange.receive(
                stream, time.monotonic() + 5.0, self.store.kv_format, CODECS.get(codec)
            )
            return True
        except (ConnectionResetError, Malformed):
            return False
        finally:
            stream.close()

    def close(self) -> None:
        self.answers.close()
        self.store.close()


@pytest.fixture
def ends(nothing_is_left: None) -> Iterator[Ends]:
    with contextlib.closing(Ends()) as made:
        yield made


def answers_in(said: bytes, asks: list[Ask]) -> Iterator[tuple[Ask, Blocks, list[bytes]]]:
    """The answers with blocks in what a server said to these asks, all of it well formed."""
    for ask in asks:
        if not said:
            return
        size = 4 + decode_length(said[:4])
        answer, said = decode_answer(said[4:size]), said[size:]
        assert answer.ask_id == ask.ask_id
        if isinstance(answer, Refusal):
            continue
        lengths = [
            0 if result else num_bytes if ask.codec == "raw" else BLOCK_BYTES // 2
            for result, num_bytes in zip(answer.results, ask.each_number()[1].tolist(), strict=True)
        ]
        assert answer.num_bytes == sum(lengths)
        blocks = []
        for num_bytes in lengths:
            blocks.append(said[:num_bytes])
            assert len(blocks[-1]) == num_bytes
            said = said[num_bytes:]
        size = 4 + decode_length(said[:4])
        assert decode_end(said[4:size]).ask_id == ask.ask_id
        said = said[size:]
        yield ask, answer, blocks
    assert not said


def asks_in(data: bytes) -> Iterator[Ask]:
    with contextlib.suppress(Malformed, struct.error):
        while data:
            size = 4 + decode_length(data[:4])
            if len(data) < size:
                return
            yield decode_ask(data[4:size])
            data = data[size:]


def test_mutated_asks(ends: Ends) -> None:
    rng = random.Random(11)
    store = ends.store
    good = [ends.exchange(codec)[1] for codec in ("raw", "half", "unknown")]
    assert ends.serve(good[0] + good[1])
    num_served = num_refused = 0
    with no_growth():
        for turn in range(MUTATIONS // 2):
            data = mutated(rng, good[turn % 3], rng.choice(good))
            said = ends.serve(data)
            for ask, answer, blocks in answers_in(said, list(asks_in(data))):
                grant = ask.grant
                assert (grant.grant_id, grant.source, grant.tenant) == (GRANT_ID, "p0", "tenant")
                for key, number, block in zip(ask.each_key(), answer.results, blocks, strict=True):
                    result = BLOCK_RESULTS[number]
                    num_served += result == "ok"
                    num_refused += result == "refused"
                    if result == "ok":
                        right = store.blocks[store.leases.keys(GRANT_ID).index(key)]
                        assert block == (right if ask.codec == "raw" else right[::2])
                    else:
                        assert not block
            assert b"SSSSSSSS" not in said, "a block that no lease covers"
    assert num_served > MUTATIONS // 50 and num_refused > MUTATIONS // 50, "some get far"


def test_mutated_answers(ends: Ends) -> None:
    rng = random.Random(12)
    store = ends.store
    taken = dict.fromkeys(ReadResult, 0)
    num_taken = 0
    other = ends.serve(ends.exchange("raw")[1])
    with no_growth():
        for turn in range(MUTATIONS // 2):
            codec = ("raw", "half")[turn % 2]
            exchange, ask = ends.exchange(codec)
            data = mutated(rng, ends.serve(ask), other)
            num_taken += ends.receive(exchange, data, codec)
            for number, result in enumerate(exchange.results):
                if result is not None:
                    taken[result] += 1
                if result is ReadResult.OK:
                    assert number in (0, 3)
                    destination = exchange._wanted[number].destination
                    assert bytes(destination) == store.blocks[number]
            other = data or other
    assert 0 < num_taken < MUTATIONS // 4, "most of them are not taken for an answer"
    assert min(taken[ReadResult.OK], taken[ReadResult.CORRUPT]) > MUTATIONS // 200, taken


def test_a_server_over_tcp_outlives_garbage(ends: Ends) -> None:
    rng = random.Random(13)
    store = ends.store
    good = ends.exchange("raw")[1]
    with contextlib.closing(store.transport(codecs=CODECS)) as reader, no_growth():
        for turn in range(300):
            connection = socket.create_connection(store.address, 5.0)
            with connection, contextlib.suppress(ConnectionError):
                connection.sendall(mutated(rng, good, good))
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)  # it may have ended it already
                while connection.recv(1 << 16):
                    pass
            if turn % 50 == 0:
                assert store.works(reader)
        assert store.works(reader)
        assert set(store.fetch(reader, codec="half")) == {ReadResult.OK}
    server = store.server
    assert server is not None
    until(lambda: not server._connections)
