"""Blocks that are offered early to a worker whose own are of another form."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest
from sim_engine import Client, SimWorker, make_request
from unit.test_core_handoff import PROMPT, TTL_S, grant
from unit.test_core_unlike_handoff import config, finish

from baton.core.handoff import RequestTable
from baton.core.instructions import Offer
from baton.core.keys import chain, extend_chain, root_key
from baton.core.life import Content, HandoffPolicy
from baton.core.limits import SchedulerConfig
from baton.core.offers import Offers
from baton.core.router import Router, WorkerInfo
from baton.types import Recast, Request, Role, SamplingParams, Sealed

TOKENS = tuple(range(50, 75))
SIZES = [(2, 4), (4, 2), (2, 3), (3, 2), (3, 3)]


def content(of: SchedulerConfig) -> Content:
    return Content(of.fingerprint, of.numerics, of.kv_format.block_size, of.kv_format)


def keys_of(reader: SchedulerConfig, tokens: Sequence[int]) -> tuple[bytes, ...]:
    root = root_key(reader.fingerprint, reader.numerics, b"")
    return tuple(chain(root, tokens, reader.kv_format.block_size))


def sealed(first: int, *keys: bytes) -> Sealed:
    digests = tuple(b"digest of " + key for key in keys)
    frames = tuple(range(first, first + len(keys)))
    return Sealed("r", 0, 0, grant("p0"), first, keys, digests, frames)


def made(theirs: int, ours: int) -> Offers:
    return Offers(content(config(theirs)), content(config(ours)), b"", extend_chain)


def test_what_completes_none_of_the_readers_blocks_waits() -> None:
    offers, keys = made(4, 6), keys_of(config(6), TOKENS)
    a, b, c, *_ = keys_of(config(4), TOKENS)
    assert offers.add(sealed(0, a), TOKENS) is None
    second = offers.add(sealed(1, b), TOKENS)
    assert second is not None
    assert (second.first, second.keys, second.frames) == (0, (a, b), (0, 1))
    assert second.recast == Recast(config(4).kv_format, "exact", 0, keys[:1])
    third = offers.add(sealed(2, c), TOKENS)
    assert third is not None
    assert (third.first, third.keys) == (1, (b, c)), "b is part of both"
    assert third.digests == (b"digest of " + b, b"digest of " + c)
    assert third.recast is not None
    assert (third.recast.first, third.recast.keys) == (1, keys[1:2])


def test_one_block_may_complete_several() -> None:
    offered = made(6, 2).add(sealed(0, keys_of(config(6), TOKENS)[0]), TOKENS)
    assert offered is not None and offered.recast is not None
    assert offered.recast.keys == keys_of(config(2), TOKENS)[:3]


def test_after_a_gap_nothing_is_offered() -> None:
    offers, (a, b, *_) = made(4, 2), keys_of(config(4), TOKENS)
    assert offers.add(sealed(1, b), TOKENS) is None
    assert offers.add(sealed(0, a), TOKENS) is not None
    assert offers.add(sealed(0, a), TOKENS) is None, "a repeat"


@pytest.mark.parametrize("field", ["digests", "frames"])
def test_what_has_not_as_many_of_each_is_offered_to_nobody_and_fetched_by_nobody(
    field: str,
) -> None:
    whole = sealed(0, keys_of(config(4), TOKENS)[0])
    torn = msgspec.structs.replace(whole, **{field: ()})
    assert made(4, 2).add(torn, TOKENS) is None
    offered = made(4, 2).add(whole, TOKENS)
    assert offered is not None
    worker = SimWorker(config(2))
    worker.scheduler.offer(msgspec.structs.replace(offered, **{field: ()}), 0.0)
    worker.scheduler.offer(msgspec.structs.replace(offered, first=-1), 0.0)
    worker.step(0.0)
    assert not worker.imports


def test_blocks_of_other_tokens_are_not_offered() -> None:
    """They would come to bear keys of tokens that they are not of."""
    offers, (a, b, c, *_) = made(4, 2), keys_of(config(4), TOKENS)
    other = keys_of(config(4), (*TOKENS[:4], *TOKENS[5:9]))[1]
    assert offers.add(sealed(0, a), TOKENS) is not None
    assert offers.add(sealed(1, other), TOKENS) is None
    assert offers.add(sealed(2, c), TOKENS) is None
    assert made(4, 2).add(sealed(0, a, b, c), TOKENS[:11]) is None, "more than there are tokens"


@pytest.mark.parametrize(("theirs", "ours"), SIZES)
@pytest.mark.parametrize("numerics", ["exact", "gpu-other"])
def test_most_has_come_when_the_handoff_does(theirs: int, ours: int, numerics: str) -> None:
    """The rest comes with the handoff; all tokens are those of a worker alone."""
    there = msgspec.structs.replace(config(theirs), max_num_batched_tokens=3)
    prefill, decode = SimWorker(there), SimWorker(config(ours, numerics))
    client = Client(make_request("a", TOKENS, 4, hand_off=True))
    offers = Offers(content(there), content(decode.config), b"", extend_chain)
    prefill.scheduler.add(client.request, 0.0)
    num_early = 0
    for _ in range(30):
        update = prefill.step(0.0)
        while prefill.exports:
            more = prefill.finish_export(0, 0.0)
            update.sealed += more.sealed
            update.handoffs += more.handoffs
        for delta in update.deltas:
            client.take(delta)
        for news in update.sealed:
            if offered := offers.add(news, TOKENS):
                decode.scheduler.offer(offered, 0.0)
                decode.step(0.0)
                decode.finish_import(0, prefill, 0.0)
        num_early = decode.scheduler.counters["early_blocks"]
        for handoff in update.handoffs:
            client.take_handoff(handoff)
            decode.scheduler.add(client.next_leg(hand_off=False, handoff=handoff), 0.0)
    for delta in decode.step(0.0).deltas:
        client.take(delta)
    assert num_early >= len(TOKENS) // ours - max(1, theirs // ours)
    while decode.imports:
        decode.finish_import(0, prefill, 0.0)
    finish(decode, client)
    counters = decode.scheduler.counters
    num_blocks = -(-len(TOKENS) // ours)
    assert counters["early_blocks"] + counters["imported_blocks"] == num_blocks
    assert counters["converted_blocks"] == num_blocks or (theirs, numerics) == (ours, "exact")
    assert counters["prompt_tokens_computed"] == 0
    assert not decode.num_fallbacks()
    decode.check_empty()


@pytest.mark.parametrize(
    "changes",
    [
        {"numerics": "fake-other"},  # rules of its own for the same device
        {"first": 1},  # the last of them is not covered any more
        {"kv_format": msgspec.structs.replace(config(4).kv_format, head_dim=2)},
        {"kv_format": msgspec.structs.replace(config(4).kv_format, block_bytes=1)},
        {"kv_format": msgspec.structs.replace(config(4).kv_format, block_size=0)},
        {"kv_format": msgspec.structs.replace(config(4).kv_format, block_size=1 << 40)},
        {"keys": ()},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_cannot_be_used_is_not_fetched(changes: dict[str, object]) -> None:
    worker = SimWorker(config(2, "fake-exact"))
    right = Recast(config(4).kv_format, "fake-exact", 0, (b"k" * 32, b"l" * 32))
    offered = msgspec.structs.replace(sealed(0, b"a"), recast=right)
    worker.scheduler.offer(offered, 0.0)
    worker.step(0.0)
    assert [len(order.wanted) for order in worker.imports] == [2]
    worker = SimWorker(config(2, "fake-exact"))
    wrong = msgspec.structs.replace(right, **changes)
    worker.scheduler.offer(msgspec.structs.replace(offered, recast=wrong), 0.0)
    worker.step(0.0)
    assert sum(len(order.wanted) for order in worker.imports) == ("first" in changes)


def test_the_gateway_offers_what_the_decode_worker_can_use() -> None:
    table = RequestTable(Router(), HandoffPolicy(TTL_S))
    for name, size in (("p0", 4), ("d0", 2)):
        role = Role.PREFILL if name == "p0" else Role.DECODE
        info = WorkerInfo(name, role, 1, 100, size, 100, True, f"exact/{size}")
        table.join(info, content(config(size)), 0.0)
    for attempt in range(2):
        if attempt == 0:
            table.add(Request("r", PROMPT, SamplingParams(50)), 0.0)
        else:
            table.freeze("p0", 1.0, None)
            table.thaw("p0", 1.0)
        table.take()
        theirs = keys_of(config(4), PROMPT)
        told = msgspec.structs.replace(sealed(0, *theirs), attempt=attempt)
        table.sealed("p0", told, 1.0)
        (offer,) = table.take().instructions
        assert isinstance(offer, Offer)
        assert (offer.worker_id, offer.sealed.keys) == ("d0", theirs)
        assert offer.sealed.recast == Recast(
            config(4).kv_format, "exact", 0, keys_of(config(2), PROMPT)[:4]
        )
