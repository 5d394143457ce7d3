"""Blocks through a stream in one call: every byte and digest, whatever the pieces; and limits."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import xxhash
from unit.copiers import COPIERS

from baton.fabric import bulk
from baton.fabric.bulk import receive_digested, send_pieces
from baton.fabric.digest import Copier
from baton.fabric.stream import Stream

SIZES = [1, 2, 240, 241, 242, 1024, 1025, 1088, 2048, 2049, 40_000, 300_000, 1 << 20]


@pytest.fixture(params=COPIERS, ids=lambda body: body.name)
def body(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Copier:
    """What does the work in this test."""
    made: Copier = request.param
    monkeypatch.setattr(bulk, "copier", lambda: made)
    return made


@pytest.fixture
def ends() -> Iterator[tuple[Stream, socket.socket]]:
    """A stream over TCP, and the plain socket at its other end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        there = socket.create_connection(listener.getsockname())
        here, _ = listener.accept()
    stream = Stream(here)
    with there, contextlib.closing(stream):
        yield stream, there


def soon(seconds: float = 10.0) -> float:
    return time.monotonic() + seconds


def noise(num_bytes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)


def places(sizes: list[int]) -> tuple[np.ndarray, list[memoryview]]:
    """Room for blocks with a byte between each and the next, all of it sevens."""
    room = np.full(sum(sizes) + len(sizes) + 1, 7, np.uint8)
    starts = np.cumsum([1, *(size + 1 for size in sizes)])
    return room, [room[at : at + size].data for at, size in zip(starts, sizes, strict=False)]


def whole(memory: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All of it as pieces, four times over."""
    return np.zeros(4, np.int64), np.full(4, memory.size)


def run(target: object, *args: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=args)  # type: ignore[arg-type]
    thread.start()
    return thread


@pytest.mark.parametrize("seed", range(4))
def test_every_byte_and_every_digest(
    body: Copier, ends: tuple[Stream, socket.socket], seed: int
) -> None:
    stream, there = ends
    rng = random.Random(seed)
    sizes = [*SIZES, *(rng.randrange(1, 5000) for _ in range(150))]
    rng.shuffle(sizes)
    sent = noise(sum(sizes), seed).tobytes()

    def trickle() -> None:
        at = 0
        while at < len(sent):
            size = rng.choice((1, 63, 64, 1000, 70_000, 1 << 20))
            there.sendall(sent[at : at + size])
            at += size
            if rng.random() < 0.05:
                time.sleep(0.001)

    sender = run(trickle)
    room, blocks = places(sizes)
    found = [b"before"]
    receive_digested(stream, blocks, found, soon())
    sender.join()
    assert b"".join(blocks) == sent
    assert found == [b"before", *(xxhash.xxh3_128_digest(block) for block in blocks)]
    assert np.count_nonzero(room == 7) >= len(sizes) + 1
    ends_of = np.cumsum([0, *(size + 1 for size in sizes)])
    assert (room[ends_of] == 7).all(), "it wrote between the blocks"


def test_what_follows_the_blocks_stays(body: Copier, ends: tuple[Stream, socket.socket]) -> None:
    stream, there = ends
    there.sendall(b"x" * 5000 + b"\0\0\0\x03end")
    _, blocks = places([4000, 1000])
    receive_digested(stream, blocks, [], soon())
    assert stream.receive_message(soon()) == b"end"
    receive_digested(stream, [], [], soon())


def test_blocks_that_were_whole_are_told_before_the_end(
    body: Copier, ends: tuple[Stream, socket.socket]
) -> None:
    stream, there = ends
    there.sendall(b"x" * 2500)
    there.shutdown(socket.SHUT_WR)
    _, blocks = places([1000, 1000, 1000])
    found: list[bytes] = []
    with pytest.raises(ConnectionResetError):
        receive_digested(stream, blocks, found, soon())
    assert found == [xxhash.xxh3_128_digest(b"x" * 1000)] * 2


@pytest.mark.parametrize("trickles", [False, True])
def test_a_limit_is_kept(body: Copier, ends: tuple[Stream, socket.socket], trickles: bool) -> None:
    stream, there = ends
    there.sendall(b"x" * 1500)
    stopping = threading.Event()

    def trickle() -> None:
        while trickles and not stopping.wait(0.005):
            there.sendall(b"x")

    sender = run(trickle)
    _, blocks = places([1000, 100_000])
    started = time.monotonic()
    found: list[bytes] = []
    with pytest.raises(TimeoutError):
        receive_digested(stream, blocks, found, started + 0.2)
    assert 0.2 <= time.monotonic() - started < 0.6
    assert len(found) == 1
    stopping.set()
    sender.join()
    with pytest.raises(TimeoutError):
        receive_digested(stream, blocks, found, started)


def test_nothing_is_taken_after_the_limit(body: Copier, ends: tuple[Stream, socket.socket]) -> None:
    stream, there = ends
    there.sendall(b"x" * 1000)
    stream.wait_readable(soon())
    _, blocks = places([1000])
    with pytest.raises(TimeoutError):
        receive_digested(stream, blocks, [], time.monotonic() - 0.001)
    assert set(blocks[0]) == {7}
    with pytest.raises(TimeoutError):
        send_pieces(stream, noise(1000), np.array([0]), np.array([1000]), time.monotonic() - 0.001)


def test_pieces_are_sent_in_order(body: Copier, ends: tuple[Stream, socket.socket]) -> None:
    stream, there = ends
    memory = noise(4 << 20)
    memory.flags.writeable = False
    rng = random.Random(5)
    sizes = [*SIZES, *(rng.randrange(1, 5000) for _ in range(150))]
    starts = [rng.randrange(memory.size - size) for size in sizes]
    received = bytearray()

    def read() -> None:
        there.settimeout(10.0)
        while len(received) < sum(sizes):
            received.extend(there.recv(rng.choice((100, 10_000, 1 << 20))))

    reader = run(read)
    send_pieces(stream, memory, np.array(starts), np.array(sizes), soon())
    reader.join()
    right = (memory[at : at + size].tobytes() for at, size in zip(starts, sizes, strict=True))
    assert bytes(received) == b"".join(right)
    send_pieces(stream, memory, np.array([], int), np.array([], int), soon())


def test_who_does_not_read_is_not_waited_for(
    body: Copier, ends: tuple[Stream, socket.socket]
) -> None:
    stream, there = ends
    memory = noise(16 << 20)
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        send_pieces(stream, memory, *whole(memory), started + 0.2)
    assert 0.2 <= time.monotonic() - started < 0.8
    there.close()
    with pytest.raises(ConnectionError):
        for _ in range(3):
            send_pieces(stream, memory, *whole(memory), soon())


def test_it_ends_when_the_connection_is_shut_down(
    body: Copier, ends: tuple[Stream, socket.socket]
) -> None:
    """As a server does with its connections when it stops, from another thread."""
    stream, _ = ends
    memory = noise(16 << 20)
    raised: list[OSError] = []

    def send() -> None:
        try:
            send_pieces(stream, memory, *whole(memory), soon())
        except OSError as error:
            raised.append(error)

    sender = run(send)
    time.sleep(0.1)
    stream.shut_down()
    sender.join(5.0)
    assert not sender.is_alive() and isinstance(raised[0], ConnectionError)
