"""What the ends of `tcp` make of messages: bounds, lies, frames that change, codecs."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from tcp_ends import (
    BLOCK_BYTES,
    EPOCH,
    SECRET,
    Half,
    Make,
    Store,
    ask_of,
    exchange_of,
)

from baton.fabric.arena import kv_format_hash
from baton.fabric.exchange import (
    MAX_ASK_BYTES,
    MAX_ENCODED_ASK_BYTES,
    MIN_ASK_BYTES,
    ask_bytes,
    exchanges,
)
from baton.fabric.stream import Stream
from baton.fabric.tcp_answers import Answers
from baton.fabric.transport import ReadResult, Wanted
from baton.fabric.wire import (
    MAX_BLOCKS,
    MAX_MESSAGE_BYTES,
    MAX_NUMBER,
    Blocks,
    End,
    Malformed,
    Refusal,
    decode_answer,
    decode_ask,
    decode_length,
    pack,
    pack_numbers,
)

pytest_plugins = ["tcp_fixtures"]

OK = ReadResult.OK


# Messages


def answered(store: Store, spoil: Callable[[], object], codec: str = "raw") -> list[ReadResult]:
    """Results of a fetch during which `spoil` is called just before the blocks are sent."""

    class Spoiling(Stream):
        def send(self, buffers: object, limit: float, more: bool = False) -> None:
            if not spoiled:
                spoiled.append(spoil())
            super().send(buffers, limit, more)  # type: ignore[arg-type]

    spoiled: list[object] = []
    ends = socket.socketpair()
    here, there = Stream(ends[0]), Spoiling(ends[1])
    codecs = {"half": Half()}
    answers = Answers("p0", store.arena, store.kv_format, SECRET, store.leases.allows, codecs)
    exchange = exchange_of(store.all_wanted())
    limit = time.monotonic() + 5.0
    here.send([exchange.ask(store.grant, kv_format_hash(store.kv_format), codec)], limit)
    answers.answer(there.receive_message(limit), there, 5.0)
    exchange.receive(here, limit, store.kv_format, codecs.get(codec))
    for end in (here, there, answers):
        end.close()
    return [result or ReadResult.UNREACHABLE for result in exchange.results]


@pytest.mark.parametrize("codec", ["raw", "half"])
def test_a_frame_that_is_reused_meanwhile_is_missing(make: Make, codec: str) -> None:
    store = make(block_bytes=1000, listens=False)
    other = bytes(1000)
    reuse: Callable[[], object] = lambda: store.arena.write(1, store.key(1), other)  # noqa: E731
    assert answered(store, reuse, codec) == ["ok", "missing", "ok", "ok"]


@pytest.mark.parametrize("codec", ["raw", "half"])
def test_a_frame_that_is_damaged_meanwhile_is_corrupt(make: Make, codec: str) -> None:
    store = make(block_bytes=1000, listens=False)

    def damage() -> None:
        store.arena._memory[store.arena.geometry.frame_at(2) + 123] ^= 1

    assert answered(store, damage, codec) == ["ok", "ok", "corrupt", "ok"]


def asked(lengths: list[int], num_streams: int = 1) -> list[list[int]]:
    """Which blocks go into each ask."""
    wanted = [Wanted(bytes(32), 0, bytes(16), np.empty(length, np.uint8)) for length in lengths]
    most = ask_bytes(sum(lengths), num_streams)
    return [list(made.indices) for made in exchanges(wanted, [None] * len(wanted), most)]


def test_asks_are_split_by_bytes_and_by_number() -> None:
    third = MIN_ASK_BYTES // 3
    assert asked([]) == []
    assert asked([third] * 4) == [[0, 1, 2], [3]]
    assert asked([2 * MIN_ASK_BYTES, 1, 2 * MIN_ASK_BYTES]) == [[0], [1], [2]]
    assert [len(made) for made in asked([1] * 2500)] == [1024, 1024, 452]
    eighths = [MIN_ASK_BYTES // 8] * 512
    assert {len(made) for made in asked(eighths)} == {128}
    assert {len(made) for made in asked(eighths, 4)} == {32}
    assert ask_bytes(1 << 40, 1) == MAX_ASK_BYTES
    assert ask_bytes(1 << 40, 1, is_encoded=True) == MAX_ENCODED_ASK_BYTES


def test_no_ask_is_made_for_what_cannot_be() -> None:
    good = Wanted(bytes(32), 1, bytes(16), bytearray(100))
    wanted = [
        msgspec.structs.replace(good, key=bytes(31)),
        good,
        msgspec.structs.replace(good, frame=-1),
        msgspec.structs.replace(good, frame=1 << 32),
        good,
        msgspec.structs.replace(good, destination=bytearray()),
    ]
    results: list[ReadResult | None] = [None] * len(wanted)
    (made,) = exchanges(wanted, results, MIN_ASK_BYTES)
    assert made.indices == [1, 4]
    assert results == ["missing", None, "out_of_range", "out_of_range", None, "wrong_size"]


def test_messages_have_bounds() -> None:
    for length in (0, MAX_MESSAGE_BYTES + 1, (1 << 32) - 1):
        with pytest.raises(Malformed):
            decode_length(struct.pack(">I", length))
    store = Store(num_blocks=1, listens=False)
    store.close()
    ask = decode_ask(ask_of(store)[4:])
    assert MAX_BLOCKS == 1024
    for change in (
        {"keys": b"", "numbers": b""},
        {"keys": bytes(32 * 1025), "numbers": bytes(12 * 1025)},
        {"keys": bytes(31)},
        {"keys": bytes(33)},
        {"keys": bytes(64)},
        {"numbers": b""},
        {"numbers": bytes(11)},
        {"numbers": bytes(24)},
        {"ask_id": bytes(15)},
        {"kv_format": bytes(33)},
        {"codec": "c" * 33},
        {"grant": None},
    ):
        changed = pack(msgspec.structs.replace(ask, **change))
        with pytest.raises(Malformed):
            decode_ask(changed[4:])
    numbers = pack_numbers(*[[MAX_NUMBER] * 1024] * 3)
    full = msgspec.structs.replace(ask, keys=bytes(32 * 1024), numbers=numbers)
    assert len(pack(full)) < MAX_MESSAGE_BYTES, "a full ask fits, and so do its answers"
    assert decode_ask(pack(full)[4:]).each_number().tolist() == [[MAX_NUMBER] * 1024] * 3
    assert len(pack(Blocks(bytes(16), bytes(1024), (1 << 63) - 1))) < MAX_MESSAGE_BYTES
    for wrong in (Blocks(bytes(16), bytes(1025), 0), Blocks(bytes(16), b"\x05", 0)):
        with pytest.raises(Malformed):
            decode_answer(pack(wrong)[4:])
    every = tuple(range(1024))
    assert len(pack(End(bytes(16), every, every, (bytes(16),) * 1024))) < MAX_MESSAGE_BYTES


# A source that misbehaves


def fake_source(stack: contextlib.ExitStack, answer: Callable[[bytes], bytes]) -> tuple[str, int]:
    """Listens, and answers the first ask of each connection with bytes made from the ask's id."""
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                data = b""
                while len(data) < 4 or len(data) < 4 + struct.unpack(">I", data[:4])[0]:
                    data += connection.recv(1 << 16)
                connection.sendall(answer(decode_ask(data[4:]).ask_id))
                connection.settimeout(2.0)
                while connection.recv(1 << 16):
                    pass

    thread = threading.Thread(target=serve)
    thread.start()
    stack.callback(thread.join)
    stack.callback(listener.shutdown, socket.SHUT_RDWR)
    return listener.getsockname()  # type: ignore[no-any-return]


OTHER_ID = bytes(16)
OK4, MISSING4 = bytes(4), bytes([1] * 4)


@pytest.mark.parametrize(
    "answer",
    [
        lambda id_: b"\xff" * 4,
        lambda id_: bytes(4),
        lambda id_: struct.pack(">I", MAX_MESSAGE_BYTES + 1),
        lambda id_: b"\0\0\0\x05hello",
        lambda id_: pack(End(id_)),
        lambda id_: pack(Refusal(OTHER_ID, "refused")),
        lambda id_: pack(Refusal(id_, "ok")),  # type: ignore[arg-type]
        lambda id_: pack(Blocks(OTHER_ID, MISSING4, 0)),
        lambda id_: pack(Blocks(id_, MISSING4[1:], 0)),
        lambda id_: pack(Blocks(id_, MISSING4 + b"\x01", 0)),
        lambda id_: pack(Blocks(id_, OK4, 4 * BLOCK_BYTES + 1)),
        lambda id_: pack(Blocks(id_, OK4, 4 * BLOCK_BYTES - 1)),
        lambda id_: pack(Blocks(id_, b"\0\0\0\x01", 4 * BLOCK_BYTES)),
        lambda id_: pack(Blocks(id_, b"\0\0\0\x05", 3 * BLOCK_BYTES)),
    ],
    ids=[
        "huge",
        "empty",
        "too long",
        "no msgpack",
        "end first",
        "refusal of another ask",
        "refusal that says ok",
        "answer to another ask",
        "too few blocks",
        "too many blocks",
        "a block too long",
        "a block too short",
        "missing, but so long",
        "a state there is not",
    ],
)
def test_a_source_that_answers_garbage(
    store: Store, stack: contextlib.ExitStack, answer: Callable[[bytes], bytes]
) -> None:
    address = fake_source(stack, answer)
    reader = stack.enter_context(contextlib.closing(store.transport(address)))
    wanted = store.all_wanted()
    assert store.fetch(reader, wanted, seconds=2.0) == ["unreachable"] * 4
    assert not any(any(block.destination) for block in wanted), "no destination is touched"


def test_states_alone_make_no_block_good(store: Store, stack: contextlib.ExitStack) -> None:
    """Right lengths, wrong bytes; then right bytes and an end of another ask."""
    zeros = bytes(4 * BLOCK_BYTES)
    address = fake_source(
        stack, lambda id_: pack(Blocks(id_, OK4, 4 * BLOCK_BYTES)) + zeros + pack(End(id_))
    )
    reader = stack.enter_context(contextlib.closing(store.transport(address)))
    assert store.fetch(reader, seconds=2.0) == ["corrupt"] * 4
    right = b"".join(store.blocks)
    address = fake_source(
        stack, lambda id_: pack(Blocks(id_, OK4, 4 * BLOCK_BYTES)) + right + pack(End(OTHER_ID))
    )
    reader = stack.enter_context(contextlib.closing(store.transport(address)))
    assert store.fetch(reader, seconds=2.0) == ["ok"] * 4, "their digests are right"
    assert reader._idle == {("p0", EPOCH): []}, "but the connection is not used again"


# Codecs


def test_blocks_travel_encoded(make: Make, stack: contextlib.ExitStack) -> None:
    store = make(num_blocks=300, block_bytes=20_000, codecs={"half": Half()})
    reader = store.transport(codecs={"half": Half()})
    stack.enter_context(contextlib.closing(reader))
    assert set(store.fetch(reader, codec="half")) == {OK}
    short = store.wanted(0, destination=bytearray(100))
    assert store.fetch(reader, [short, store.wanted(1)], codec="half") == ["wrong_size", "ok"]


def test_an_encoder_is_told_how_far_a_block_is_filled(
    make: Make, stack: contextlib.ExitStack
) -> None:
    codec = Half()
    store = make(codecs={"half": codec})
    reader = stack.enter_context(contextlib.closing(store.transport(codecs={"half": Half()})))
    wanted = [
        msgspec.structs.replace(store.wanted(n), num_tokens=filled)
        for n, filled in enumerate((0, 16, 3, 17))
    ]
    # The format has blocks of 16 tokens.
    assert store.fetch(reader, wanted, codec="half") == ["ok", "ok", "ok", "wrong_size"]
    assert codec.filled == [None, 16, 3]


def test_a_codec_that_one_end_does_not_know(store: Store, stack: contextlib.ExitStack) -> None:
    for codecs in ({}, {"half": Half()}):
        reader = store.transport(codecs=codecs)
        stack.enter_context(contextlib.closing(reader))
        assert set(store.fetch(reader, codec="half")) == {"codec"}
        assert store.works(reader)


def test_a_codec_that_cannot_take_the_format_is_not_known(
    make: Make, stack: contextlib.ExitStack
) -> None:
    class Picky(Half):
        def encoded_bytes(self, fmt: object) -> int:
            raise ValueError("not this one")

    store = make(codecs={"half": Picky()})
    reader = stack.enter_context(contextlib.closing(store.transport(codecs={"half": Half()})))
    assert set(store.fetch(reader, codec="half")) == {"codec"}


def test_a_block_that_cannot_be_decoded_is_corrupt(make: Make, stack: contextlib.ExitStack) -> None:
    store = make(codecs={"half": Half()})
    reader = store.transport(codecs={"half": Half(fails=True)})
    stack.enter_context(contextlib.closing(reader))
    assert set(store.fetch(reader, codec="half")) == {"corrupt"}


@pytest.mark.parametrize(
    ("digests", "expected"),
    [((bytes(16),) * 4, "corrupt"), ((bytes(16),) * 3, "unreachable"), ((), "unreachable")],
)
def test_encoded_blocks_need_their_digests(
    store: Store, stack: contextlib.ExitStack, digests: tuple[bytes, ...], expected: str
) -> None:
    half = BLOCK_BYTES // 2
    address = fake_source(
        stack,
        lambda id_: (
            pack(Blocks(id_, OK4, 4 * half)) + bytes(4 * half) + pack(End(id_, digests=digests))
        ),
    )
    reader = store.transport(address, codecs={"half": Half()})
    stack.enter_context(contextlib.closing(reader))
    wanted = store.all_wanted()
    assert store.fetch(reader, wanted, seconds=2.0, codec="half") == [expected] * 4
    assert not any(any(block.destination) for block in wanted)
