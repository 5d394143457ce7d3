"""Blocks over TCP through a bad network, from sources that die, freeze or come back as others.

Whatever happens: results by the deadline, no wrong block, nothing left open, and the next fetch,
once the trouble is over, is as good as ever. Every fault is seen to have struck.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Sequence

import pytest
from parts.fault_proxy import (
    AnyFault,
    Cut,
    Delay,
    Duplicate,
    FaultProxy,
    Flip,
    Freeze,
    Reorder,
    Replay,
    Throttle,
    Truncate,
)
from tcp_ends import BLOCK_BYTES, EPOCH, Half, Make, Source, Store, ask_of, until

from baton.fabric.tcp import TcpTransport
from baton.fabric.transport import ReadResult, Wanted
from baton.fabric.wire import BLOCK_RESULTS, Blocks, decode_answer, decode_length, pack

pytest_plugins = ["tcp_fixtures"]

NUM_BLOCKS = 8
BODY = NUM_BLOCKS * BLOCK_BYTES
HEAD = len(pack(Blocks(bytes(16), bytes(NUM_BLOCKS), BODY)))
"""How many bytes of an answer come before the first block."""


class Way:
    """A store, a proxy with faults before it, and a reader behind that."""

    def __init__(
        self,
        store: Store,
        stack: contextlib.ExitStack,
        down: Sequence[AnyFault] = (),
        up: Sequence[AnyFault] = (),
        num_streams: int = 1,
    ) -> None:
        self.store = store
        self.proxy = stack.enter_context(FaultProxy(store.address, down, up, records=True))
        codecs = {"half": Half()}
        self.reader = store.transport(self.proxy.address, num_streams=num_streams, codecs=codecs)
        stack.enter_context(contextlib.closing(self.reader))

    def fetch(
        self, wanted: Sequence[Wanted] | None = None, seconds: float = 5.0, codec: str = "raw"
    ) -> list[ReadResult]:
        return self.store.fetch(self.reader, wanted, seconds=seconds, codec=codec)

    def struck(self, fault: type[AnyFault], num_times: int = 1) -> bool:
        return self.proxy.hits[fault.__name__] == num_times

    def recovers(self) -> bool:
        """Without faults, the same reader reads all again."""
        self.proxy.up, self.proxy.down = [], []
        return self.store.works(self.reader)


@pytest.fixture
def eight(make: Make) -> Store:
    return make(num_blocks=NUM_BLOCKS, codecs={"half": Half()})


def is_untouched(wanted: Sequence[Wanted]) -> bool:
    return not any(any(block.destination) for block in wanted)


def first_answer(recorded: bytes) -> int:
    """Length of the first answer with blocks in what a source said."""
    head = 4 + decode_length(recorded[:4])
    answer = decode_answer(recorded[4:head])
    assert isinstance(answer, Blocks)
    end = head + answer.num_bytes
    return end + 4 + decode_length(recorded[end : end + 4])


def test_a_proxy_without_faults_changes_nothing(eight: Store, stack: contextlib.ExitStack) -> None:
    way = Way(eight, stack)
    assert set(way.fetch()) == {"ok"}
    ((up, down),) = way.proxy.recorded
    assert len(up) > 200
    assert down[HEAD : HEAD + BODY] == b"".join(eight.blocks)
    assert first_answer(down) == len(down)
    assert not way.proxy.hits


# Bytes


@pytest.mark.parametrize("number", [0, 3, NUM_BLOCKS - 1])
def test_a_flipped_bit_in_a_block(eight: Store, stack: contextlib.ExitStack, number: int) -> None:
    way = Way(eight, stack, [Flip(HEAD + number * BLOCK_BYTES + 77, bit=5)])
    expected = ["ok"] * NUM_BLOCKS
    expected[number] = "corrupt"
    assert way.fetch() == expected
    assert way.struck(Flip)
    assert way.recovers()


def test_a_flipped_bit_in_an_encoded_block(eight: Store, stack: contextlib.ExitStack) -> None:
    way = Way(eight, stack, [Flip(HEAD + 2 * BLOCK_BYTES // 2 + 77)])
    assert way.fetch(codec="half") == ["ok", "ok", "corrupt", *["ok"] * 5]
    assert way.struck(Flip)
    assert way.recovers()


@pytest.mark.parametrize("at", range(0, HEAD, 3))
def test_a_flipped_bit_in_the_head_of_an_answer(
    eight: Store, stack: contextlib.ExitStack, at: int
) -> None:
    way = Way(eight, stack, [Flip(at, bit=at % 8)])
    wanted = eight.all_wanted()
    results = way.fetch(wanted, seconds=0.5)
    assert set(results) <= {"unreachable", "timed_out"}, "every bit of it means something"
    assert is_untouched(wanted)
    assert way.struck(Flip)
    assert way.recovers()


@pytest.mark.parametrize("at", [*range(0, 500, 17), -32, -31, -28, -27, -1])
def test_a_flipped_bit_in_an_ask(eight: Store, stack: contextlib.ExitStack, at: int) -> None:
    num_bytes = len(ask_of(eight))
    at, bit = (at, at % 8) if at >= 0 else (num_bytes + at, 2)
    way = Way(eight, stack, up=[Flip(at, bit=bit)])
    results = way.fetch(seconds=0.3)
    assert way.struck(Flip)
    ((ask, _), *_) = way.proxy.recorded
    ttl_at = ask.index(b"ttl_s") + 5
    is_ttl = ttl_at < at < ttl_at + 9  # how long the lease is, the server knows better
    # How many slots of a block are filled, only a codec asks; these numbers come last, 0 each. Of
    # more slots than the 16 that a block has, the server will not hear.
    place = at - (num_bytes - 4 * NUM_BLOCKS)
    is_filling = place >= 0 and place % 4 == 0 and bit <= 4
    assert (set(results) == {"ok"}) == (is_ttl or is_filling)
    assert way.recovers()


@pytest.mark.parametrize("fault", [Cut, Truncate])
@pytest.mark.parametrize(
    "at", [0, 2, 4, HEAD - 1, HEAD, HEAD + 1, HEAD + 3 * BLOCK_BYTES, HEAD + BODY, HEAD + BODY + 3]
)
def test_an_answer_that_breaks_off(
    eight: Store, stack: contextlib.ExitStack, fault: type[Cut | Truncate], at: int
) -> None:
    way = Way(eight, stack, [fault(at)])
    results = way.fetch()
    num_whole = max(0, (at - HEAD) // BLOCK_BYTES)
    if fault is Truncate:
        assert results == ["ok"] * num_whole + ["unreachable"] * (NUM_BLOCKS - num_whole)
    else:  # what had come may be lost with the connection
        num_ok = results.count(ReadResult.OK)
        assert num_ok <= num_whole
        assert results == ["ok"] * num_ok + ["unreachable"] * (NUM_BLOCKS - num_ok)
    assert way.struck(fault)
    assert way.recovers()


@pytest.mark.parametrize("at", [0, 3, 100])
def test_an_ask_that_breaks_off(eight: Store, stack: contextlib.ExitStack, at: int) -> None:
    way = Way(eight, stack, up=[Truncate(at)])
    assert set(way.fetch()) == {"unreachable"}
    assert way.struck(Truncate)
    assert way.recovers()


def test_a_piece_that_comes_twice(eight: Store, stack: contextlib.ExitStack) -> None:
    way = Way(eight, stack, [Duplicate(HEAD + 2 * BLOCK_BYTES + 1000, 500)])
    results = way.fetch(seconds=1.0)
    assert results[:3] == ["ok", "ok", "corrupt"]
    assert "ok" not in results[2:]
    assert way.struck(Duplicate)
    assert way.recovers()


def test_pieces_in_another_order(eight: Store, stack: contextlib.ExitStack) -> None:
    way = Way(eight, stack, [Reorder(HEAD + BLOCK_BYTES + 1000, 500, 700)])
    assert way.fetch() == ["ok", "corrupt", *["ok"] * 6]
    assert way.struck(Reorder)
    assert way.recovers()


# Messages


def test_an_answer_that_comes_twice(eight: Store, stack: contextlib.ExitStack) -> None:
    """The first is good. The second is no answer to what is asked next."""
    way = Way(eight, stack)
    assert set(way.fetch()) == {"ok"}
    ((_, down),) = way.proxy.recorded
    way.proxy.down = [Duplicate(0, len(down))]
    way.reader.close()
    assert set(way.fetch()) == {"ok"}
    until(lambda: way.struck(Duplicate))
    assert way.recovers()
    assert len(way.proxy.recorded) == 3, "by another connection"


def test_answers_in_another_order(make: Make, stack: contextlib.ExitStack) -> None:
    store = make(num_blocks=80)  # three asks, of which two are under way at once
    way = Way(store, stack)
    assert set(way.fetch()) == {"ok"}
    ((_, down),) = way.proxy.recorded
    first = first_answer(down)
    second = first_answer(down[first:])
    assert first + second < len(down)
    way.proxy.down = [Reorder(0, first, second)]
    way.reader.close()
    wanted = store.all_wanted()
    assert set(way.fetch(wanted)) == {"unreachable"}
    assert is_untouched(wanted)
    assert way.struck(Reorder)
    assert way.recovers()


def test_an_answer_from_before(eight: Store, stack: contextlib.ExitStack) -> None:
    way = Way(eight, stack)
    assert set(way.fetch()) == {"ok"}
    ((_, down),) = way.proxy.recorded
    way.proxy.down = [Replay(down)]
    way.reader.close()
    wanted = eight.all_wanted()
    assert set(way.fetch(wanted)) == {"unreachable"}
    assert is_untouched(wanted), "though they were the right bytes"
    assert way.struck(Replay)
    assert way.recovers()


def test_an_ask_from_before(eight: Store, stack: contextlib.ExitStack) -> None:
    """Who has seen an ask may repeat it only as long as its lease lives."""
    way = Way(eight, stack)
    assert set(way.fetch()) == {"ok"}
    ((up, _),) = way.proxy.recorded
    eight.leases.release(eight.grant.grant_id)
    with socket.create_connection(eight.address, 5.0) as connection:
        connection.sendall(up)
        answer = connection.recv(1 << 16)
    states = decode_answer(answer[4 : 4 + decode_length(answer[:4])])
    assert isinstance(states, Blocks)
    assert {BLOCK_RESULTS[result] for result in states.results} == {ReadResult.REFUSED}
    assert states.num_bytes == 0


# Time


@pytest.mark.parametrize("at", [0, HEAD - 1, HEAD + 3 * BLOCK_BYTES + 5])
def test_an_answer_that_stands_still(eight: Store, stack: contextlib.ExitStack, at: int) -> None:
    way = Way(eight, stack, [Freeze(at)])
    started = time.monotonic()
    results = way.fetch(seconds=0.5)
    assert time.monotonic() - started >= 0.5
    num_whole = max(0, (at - HEAD) // BLOCK_BYTES)
    # What was whole in time is good; on a busy machine it may be fewer.
    num_good = results.count("ok")
    assert num_good <= num_whole
    assert results == ["ok"] * num_good + ["timed_out"] * (NUM_BLOCKS - num_good)
    assert way.struck(Freeze)
    assert way.recovers()


def test_one_megabit_a_second(eight: Store, stack: contextlib.ExitStack) -> None:
    way = Way(eight, stack, [Throttle(125_000)])
    results = way.fetch(seconds=1.0)
    num_ok = results.count(ReadResult.OK)
    assert num_ok in (1, 2, 3), "40 kB take a third of a second"
    assert results == ["ok"] * num_ok + ["timed_out"] * (NUM_BLOCKS - num_ok)
    assert way.proxy.hits["Throttle"] > 0
    assert way.recovers()


def test_a_slow_source_slows_no_other(
    eight: Store, make: Make, stack: contextlib.ExitStack
) -> None:
    slow = Way(eight, stack, [Throttle(125_000)])
    other = make(epoch=EPOCH + 1)
    reader = stack.enter_context(contextlib.closing(other.transport()))
    results: list[ReadResult] = []
    thread = threading.Thread(target=lambda: results.extend(slow.fetch(seconds=1.5)))
    thread.start()
    try:
        until(lambda: slow.proxy.hits["Throttle"] > 0)
        for _ in range(20):
            assert set(other.fetch(reader, seconds=0.5)) == {"ok"}
        assert thread.is_alive()
    finally:
        thread.join()
    assert "timed_out" in results


def test_a_long_way(make: Make, stack: contextlib.ExitStack) -> None:
    """Asks are under way while answers come: 8 asks do not take 8 times there and back."""
    store = make(num_blocks=8, block_bytes=1 << 20)
    way = Way(store, stack, [Delay(0.1)], [Delay(0.1)])
    started = time.monotonic()
    assert set(way.fetch(seconds=10.0)) == {"ok"}
    assert 0.2 < time.monotonic() - started < 1.4
    assert way.proxy.hits["Delay"] > 0


def test_a_lease_that_ends_on_the_way(eight: Store, stack: contextlib.ExitStack) -> None:
    grant = eight.leases.mint("short", "tenant", 0.2, time.monotonic())
    for number in range(NUM_BLOCKS):
        assert eight.leases.cover("short", eight.key(number))
    way = Way(eight, stack, up=[Delay(0.4)])
    assert set(eight.fetch(way.reader, grant=grant)) == {"refused"}
    assert way.proxy.hits["Delay"] > 0
    assert way.recovers()


def test_the_proxy_keeps_to_its_speed(stack: contextlib.ExitStack) -> None:
    num_bytes, bytes_per_s = 4 << 20, 8 << 20
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    proxy = FaultProxy(listener.getsockname(), [Throttle(bytes_per_s)])
    stack.enter_context(proxy)
    reader = stack.enter_context(socket.create_connection(proxy.address))
    source, _ = listener.accept()
    stack.enter_context(source)
    thread = threading.Thread(target=source.sendall, args=(bytes(num_bytes),))
    thread.start()
    started = time.monotonic()
    left = num_bytes
    while left:
        left -= len(reader.recv(left))
    elapsed_s = time.monotonic() - started
    thread.join()
    assert 0.95 < elapsed_s / (num_bytes / bytes_per_s) < 1.3


# Sources


@pytest.fixture
def source(stack: contextlib.ExitStack) -> Source:
    return stack.enter_context(contextlib.closing(Source(num_blocks=64, block_bytes=1 << 18)))


def during(wanted: Sequence[Wanted], act: object, stack: contextlib.ExitStack) -> threading.Thread:
    """Call `act` on a thread when the first blocks of a fetch have come."""

    def watch() -> None:
        until(lambda: any(wanted[5].destination[:100]), 10.0)
        act()  # type: ignore[operator]

    thread = threading.Thread(target=watch)
    stack.callback(thread.join)
    return thread


def test_a_source_that_dies_in_the_middle(source: Source, stack: contextlib.ExitStack) -> None:
    way = Way(source.twin, stack, [Throttle(16 << 20)])
    wanted = source.twin.all_wanted()
    during(wanted, source.kill, stack).start()
    started = time.monotonic()
    results = way.fetch(wanted, seconds=10.0)
    assert time.monotonic() - started < 2.0, "at once, not at the deadline"
    num_ok = results.count(ReadResult.OK)
    assert 4 <= num_ok < 64
    assert set(results[num_ok:]) == {"unreachable"}
    assert source.process.returncode is not None
    assert set(way.fetch(seconds=1.0)) == {"unreachable"}
    successor = Source(64, 1 << 18, EPOCH + 1, source.twin.address[1])
    stack.enter_context(contextlib.closing(successor))
    assert set(way.fetch(seconds=2.0)) == {"stale_epoch"}, "the same address, another start"
    reader = stack.enter_context(contextlib.closing(successor.twin.transport()))
    assert successor.twin.works(reader)


def test_a_source_that_freezes_in_the_middle(source: Source, stack: contextlib.ExitStack) -> None:
    way = Way(source.twin, stack, [Throttle(32 << 20)])
    wanted = source.twin.all_wanted()
    during(wanted, source.freeze, stack).start()
    results = way.fetch(wanted, seconds=2.0)
    num_ok = results.count(ReadResult.OK)
    assert 4 <= num_ok < 64, "all of them would take half a second"
    assert set(results[num_ok:]) == {"timed_out"}
    source.thaw()
    assert way.recovers()


def test_a_source_that_is_frozen(source: Source, stack: contextlib.ExitStack) -> None:
    """Its connection stands, and new ones are even accepted by the system."""
    reader = stack.enter_context(contextlib.closing(source.twin.transport()))
    assert source.twin.works(reader)
    source.freeze()
    for _ in range(2):
        wanted = source.twin.all_wanted()
        assert set(source.twin.fetch(reader, wanted, seconds=0.3)) == {"timed_out"}
        assert is_untouched(wanted)
    source.thaw()
    assert source.twin.works(reader)


def test_a_source_on_another_port_by_mistake(
    eight: Store, make: Make, stack: contextlib.ExitStack
) -> None:
    """A store of another secret: its owner cannot have made the grant."""
    other = make(num_blocks=NUM_BLOCKS)
    other.server._answers._secret = b"x" * 32  # type: ignore[union-attr]
    reader = TcpTransport({"p0": other.peer()}.get, eight.kv_format)
    stack.enter_context(contextlib.closing(reader))
    assert set(eight.fetch(reader)) == {"refused"}
