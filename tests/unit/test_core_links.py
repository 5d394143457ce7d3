"""Codecs of links, and the numerics class of what came through them."""

from __future__ import annotations

import msgspec
import pytest
from sim_engine import Client, SimWorker, expected_tokens, make_config, make_request, run_alone

from baton.core import links
from baton.core.codec_choice import RAW, CodecFigures
from baton.core.links import LinkTable
from baton.core.plan import Update
from baton.types import FinishReason, Grant, Sealed

BLOCK_BYTES = 48
INT8 = CodecFigures("int8", BLOCK_BYTES // 2, 1e-9, 1e-9, kl=0.001)
CONFIG = msgspec.structs.replace(make_config(keep_blocks=True), codecs=(INT8,), max_kl=0.01)
GRANT = Grant("g", "prefill", 1, "", 10.0, b"")
PROMPT = (1, 2, 3, 4, 5)


@pytest.fixture(autouse=True)
def small_transfers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "MIN_MEASURED_BYTES", BLOCK_BYTES)


def table(config: object = CONFIG, rate: float = 1e6) -> LinkTable:
    """A link to `prefill`, over which 10 blocks went at `rate` bytes a second."""
    made = LinkTable(config)  # type: ignore[arg-type]
    made.reached_by_wire("prefill")
    if rate:
        made.observe(GRANT, RAW, 10, 10 * BLOCK_BYTES / rate)
    return made


def test_a_slow_wire_takes_the_codec_that_the_budget_allows() -> None:
    assert table().codec(("a", 0, 0), "prefill") == "int8"
    assert table().rate("prefill") == pytest.approx(1e6)


def test_raw_where_there_is_no_wire_no_figure_no_need_or_no_budget() -> None:
    assert table().codec(("a", 0, 0), "other") == RAW
    assert table(rate=0).codec(("a", 0, 0), "prefill") == RAW
    assert table(rate=1e12).codec(("a", 0, 0), "prefill") == RAW
    strict = msgspec.structs.replace(CONFIG, max_kl=1e-6)
    assert table(strict).codec(("a", 0, 0), "prefill") == RAW


def test_a_sequence_keeps_its_codec_when_the_link_changes() -> None:
    made = table()
    assert made.codec(("a", 0, 0), "prefill") == "int8"
    for _ in range(50):
        made.observe(GRANT, RAW, 10, 10 * BLOCK_BYTES / 1e12)
    assert made.codec(("a", 0, 0), "prefill") == "int8"
    assert made.codec(("b", 0, 0), "prefill") == RAW


def _handed_off(prefill: SimWorker, name: str) -> tuple[Client, list[Sealed]]:
    sealed: list[Sealed] = []
    take = prefill.scheduler.take

    def taken() -> Update:
        update = take()
        sealed.extend(update.sealed)
        return update

    prefill.scheduler.take = taken  # type: ignore[method-assign]
    (client,) = run_alone(prefill, [make_request(name, PROMPT, 4, hand_off=True)])
    prefill.scheduler.take = take  # type: ignore[method-assign]
    return client, sealed


def _finish(decode: SimWorker, client: Client) -> None:
    for _ in range(20):
        for delta in decode.step(0.0).deltas:
            client.take(delta)
        while decode.exports:
            decode.finish_export(0, 0.0)
    assert client.finish is FinishReason.LENGTH


@pytest.mark.parametrize("early", [False, True])
def test_what_came_lossy_never_answers_an_exact_look_up(early: bool) -> None:
    prefill, decode = SimWorker(CONFIG, "prefill"), SimWorker(CONFIG, "decode")
    decode.scheduler.link("prefill")
    decode.scheduler.fetches.links.observe(GRANT, RAW, 10, 10 * BLOCK_BYTES / 1e6)
    client, sealed = _handed_off(prefill, "a")
    if early:
        assert sealed
        for notice in sealed:
            decode.scheduler.offer(notice, 0.0)
        decode.step(0.0)
        assert {order.codec for order in decode.imports} == {"int8"}
        while decode.imports:
            decode.finish_import(0, prefill, 0.0)
    decode.scheduler.add(client.next_leg(hand_off=False, handoff=client.handoff), 0.0)
    for delta in decode.step(0.0).deltas:
        client.take(delta)
    # The full blocks are encoded, the partial one is not.
    asked = [(order.codec, len(order.wanted)) for order in decode.imports]
    assert asked == [("raw", 1)] if early else [("int8", 2), ("raw", 1)]
    while decode.imports:
        decode.finish_import(0, prefill, 0.0)
    _finish(decode, client)
    assert not decode.num_fallbacks()
    hits = decode.scheduler.counters["prefix_hit_tokens"]
    # The same prompt, computed here: neither pool nor store may serve it what was lossy.
    (again,) = run_alone(decode, [make_request("b", PROMPT, 4)])
    assert again.received == expected_tokens(PROMPT, 4)
    assert decode.scheduler.counters["prefix_hit_tokens"] == hits
    assert decode.scheduler.counters["restored_blocks"] == 0
    # Another handoff of it over the same link finds the lossy blocks.
    other, _ = _handed_off(prefill, "c")
    decode.scheduler.add(other.next_leg(hand_off=False, handoff=other.handoff), 0.0)
    decode.step(0.0)
    assert decode.scheduler.counters["prefix_hit_tokens"] == hits + 4
    decode.finish_import(0, prefill, 0.0)
    _finish(decode, other)
