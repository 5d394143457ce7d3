"""A sequence's way into a worker whose blocks are of another size, type or device."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from sim_engine import Client, SimWorker, expected_tokens, make_config, make_request, run_alone

from baton.core.limits import SchedulerConfig
from baton.types import FinishReason, Handoff

PROMPT = tuple(range(1, 14))
SIZES = [(2, 4), (4, 2), (2, 3), (3, 2), (4, 6), (1, 16), (16, 1)]


def config(block_size: int, numerics: str = "exact", **fields: Any) -> SchedulerConfig:
    made = make_config(block_size=block_size, num_blocks=64, num_frames=64, keep_blocks=True)
    return msgspec.structs.replace(made, numerics=numerics, **fields)


def handed_off(prefill: SimWorker, name: str, prompt: tuple[int, ...] = PROMPT) -> Client:
    (client,) = run_alone(prefill, [make_request(name, prompt, 4, hand_off=True)])
    assert client.handoff is not None
    return client


def take_over(decode: SimWorker, client: Client, handoff: Handoff | None = None) -> None:
    """Until the decode worker has asked for what it misses."""
    decode.scheduler.add(client.next_leg(hand_off=False, handoff=handoff or client.handoff), 0.0)
    for delta in decode.step(0.0).deltas:
        client.take(delta)


def finish(decode: SimWorker, client: Client) -> None:
    for _ in range(30):
        if client.finish is None:
            for delta in decode.step(0.0).deltas:
                client.take(delta)
        while decode.exports:
            decode.finish_export(0, 0.0)
    assert client.finish is FinishReason.LENGTH


@pytest.mark.parametrize(("theirs", "ours"), SIZES)
@pytest.mark.parametrize("length", [1, 3, 4, 12, 13])
def test_another_block_size_costs_no_prompt_token(theirs: int, ours: int, length: int) -> None:
    prefill, decode = SimWorker(config(theirs)), SimWorker(config(ours))
    client = handed_off(prefill, "a", PROMPT[:length])
    take_over(decode, client)
    (order,) = decode.imports
    assert len(order.wanted) == -(-length // ours)
    decode.finish_import(0, prefill, 0.0)
    finish(decode, client)
    counters = decode.scheduler.counters
    assert counters["prompt_tokens_computed"] == 0
    assert counters["imported_blocks"] == counters["converted_blocks"] == -(-length // ours)
    assert not decode.num_fallbacks()
    decode.check_empty()


def test_recut_blocks_are_exact_and_are_found_by_our_own_keys() -> None:
    prefill, decode = SimWorker(config(4)), SimWorker(config(3))
    client = handed_off(prefill, "a")
    take_over(decode, client)
    decode.finish_import(0, prefill, 0.0)
    finish(decode, client)
    (again,) = run_alone(decode, [make_request("b", PROMPT, 4)])
    assert again.received == expected_tokens(PROMPT, 4)
    assert decode.scheduler.counters["prefix_hit_tokens"] == 12  # all four full blocks
    # So another handoff of it needs the rest alone: token 13, out of their fourth block.
    other = handed_off(prefill, "c")
    take_over(decode, other)
    (order,) = decode.imports
    assert [want.index for want in order.wanted] == [4]
    assert order.recut is not None
    assert [len(block.pieces) for block in order.recut.blocks] == [1]
    decode.finish_import(0, prefill, 0.0)
    finish(decode, other)


def test_what_comes_from_other_arithmetic_answers_no_exact_look_up() -> None:
    prefill, decode = SimWorker(config(2, "cpu-a")), SimWorker(config(3, "gpu-b"))
    client = handed_off(prefill, "a")
    take_over(decode, client)
    decode.finish_import(0, prefill, 0.0)
    finish(decode, client)
    assert not decode.num_fallbacks()
    (again,) = run_alone(decode, [make_request("b", PROMPT, 4)])
    assert again.received == expected_tokens(PROMPT, 4)
    counters = decode.scheduler.counters
    assert counters["prefix_hit_tokens"] == counters["restored_blocks"] == 0
    # Another handoff from there finds them; the pool has 12 of 13 tokens in full blocks.
    other = handed_off(prefill, "c")
    take_over(decode, other)
    assert counters["prefix_hit_tokens"] == 12
    decode.finish_import(0, prefill, 0.0)
    finish(decode, other)


@pytest.mark.parametrize(("bad", "num_good"), [(0, 0), (2, 1), (3, 2), (6, 4)])
def test_a_source_block_that_is_bad_spoils_what_it_is_part_of(bad: int, num_good: int) -> None:
    prefill, decode = SimWorker(config(2)), SimWorker(config(3))
    client = handed_off(prefill, "a")
    assert client.handoff is not None
    frame = prefill.store.frames[client.handoff.frames[bad]]
    frame.slots = [(token ^ 1, position, before) for token, position, before in frame.slots]
    take_over(decode, client)
    decode.finish_import(0, prefill, 0.0)
    finish(decode, client)
    counters = decode.scheduler.counters
    assert counters["fallback_import_corrupt"] == 1
    assert counters["imported_blocks"] == num_good
    assert counters["prompt_tokens_computed"] == len(PROMPT) - 3 * num_good
    decode.check_empty()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_layers": 2}, "format"),
        ({"block_size": 0}, "format"),
        ({"block_size": -4}, "format"),
        ({"block_bytes": 1 << 50}, "format"),
        ({"block_size": 5, "block_bytes": 120}, "length"),
        ({"numerics": "gpu-x"}, "key"),
        ({"keys": (b"x" * 32,) * 4}, "key"),
        ({"request_id": "b"}, "request"),
    ],
)
def test_an_unlike_handoff_that_does_not_fit_is_refused(
    change: dict[str, Any], reason: str
) -> None:
    prefill, decode = SimWorker(config(4)), SimWorker(config(3))
    client = handed_off(prefill, "a")
    handoff = client.handoff
    assert handoff is not None
    fmt = {name: value for name, value in change.items() if name in KV_FIELDS}
    rest = {name: value for name, value in change.items() if name not in KV_FIELDS}
    kv_format = msgspec.structs.replace(handoff.kv_format, **fmt)
    take_over(decode, client, msgspec.structs.replace(handoff, kv_format=kv_format, **rest))
    assert not decode.imports
    finish(decode, client)
    assert decode.scheduler.counters[f"fallback_import_{reason}"] == 1
    assert decode.num_fallbacks() == 1


KV_FIELDS = ("num_layers", "block_size", "block_bytes")
