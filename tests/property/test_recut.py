"""Blocks of any size and type, fetched into blocks of any other: every token is where it belongs.

What is stored is a random sequence's KV; what comes out is compared with a conversion of the
whole sequence. Slots beyond its end hold what no conversion may look at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.core.plan import Recut
from baton.core.recut import recut
from baton.fabric import recut as fabric_recut
from baton.fabric.recut import convert, fetch_recut
from baton.fabric.transport import ReadResult, Wanted
from baton.types import Grant, Handoff, KvFormat

LAYERS, HEADS, DIM = 2, 2, 4
ITEM = {"bfloat16": 2, "float16": 2, "float32": 4}
STORED = {"bfloat16": "<u2", "float16": "<f2", "float32": "<f4"}
OK, MISSING = ReadResult.OK, ReadResult.MISSING


def format_of(block_size: int, dtype: str) -> KvFormat:
    block_bytes = LAYERS * 2 * block_size * HEADS * DIM * ITEM[dtype]
    return KvFormat(block_size, dtype, LAYERS, HEADS, DIM, block_bytes)


class Source:
    """A store with the KV of `num_tokens` tokens, [layers, 2, tokens, numbers of a token]."""

    def __init__(self, num_tokens: int, block_size: int, dtype: str) -> None:
        rng = np.random.default_rng(num_tokens)
        numbers = rng.normal(size=(LAYERS, 2, num_tokens, HEADS * DIM)).astype(np.float32)
        kv = convert(numbers, "float32", dtype)
        assert kv is not None
        self.kv = kv
        self.num_fetched = 0
        fmt = format_of(block_size, dtype)
        self.blocks: list[Any] = []
        for start in range(0, num_tokens, block_size):
            part = kv[:, :, start : start + block_size]
            block = np.full(fmt.block_bytes, 0xFF, np.uint8).view(STORED[dtype])
            block = block.reshape(LAYERS, 2, block_size, HEADS * DIM)
            block[:, :, : part.shape[2]] = part
            self.blocks.append(block)
        keys = tuple(bytes([n]) for n in range(len(self.blocks)))
        frames = tuple(range(len(self.blocks)))
        grant = Grant("g", "p0", 1, "", 1.0, b"")
        self.handoff = Handoff("a", 0, 0, grant, num_tokens, fmt, "n", keys, keys, frames)
        self.missing: set[int] = set()

    def fetch(self, wanted: Sequence[Wanted]) -> list[ReadResult]:
        self.num_fetched += len(wanted)
        results = []
        for want in wanted:
            assert want.key == bytes([want.frame])
            found = self.blocks[want.frame].view(np.uint8).reshape(-1)
            np.frombuffer(want.destination, np.uint8)[:] = found
            results.append(MISSING if want.frame in self.missing else OK)
        return results


def check(source: Source, target: KvFormat, indices: list[int]) -> list[ReadResult]:
    """Fetch the blocks `indices` of the target's, and compare those that came."""
    cut: Recut = recut(source.handoff, target, indices)
    blocks = [np.full(target.block_bytes, 7, np.uint8) for _ in indices]
    results = fetch_recut(cut, blocks, source.fetch)
    wanted = convert(source.kv, source.handoff.kv_format.dtype, target.dtype)
    assert wanted is not None
    size = target.block_size
    for index, block, result in zip(indices, blocks, results, strict=True):
        found = block.view(STORED[target.dtype]).reshape(LAYERS, 2, size, HEADS * DIM)
        part = wanted[:, :, index * size : (index + 1) * size]
        filled = part.shape[2]
        if result is OK:
            assert np.array_equal(found[:, :, :filled], part)
            assert (found[:, :, filled:].copy().view(np.uint8) == 7).all(), "an unused slot"
    return results


@pytest.mark.parametrize("source_type", ITEM)
@pytest.mark.parametrize("target_type", ITEM)
@pytest.mark.parametrize(("theirs", "ours"), [(16, 32), (32, 16), (16, 24), (24, 16), (16, 16)])
@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 33, 96, 101])
def test_sizes_and_types(
    source_type: str, target_type: str, theirs: int, ours: int, num_tokens: int
) -> None:
    source = Source(num_tokens, theirs, source_type)
    target = format_of(ours, target_type)
    results = check(source, target, list(range(-(-num_tokens // ours))))
    assert set(results) == {OK}
    assert source.num_fetched == len(source.blocks), "each block once"


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_sizes_and_any_part(data: st.DataObject) -> None:
    draw = data.draw
    theirs, ours = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    num_tokens = draw(st.integers(1, 120))
    source = Source(num_tokens, theirs, draw(st.sampled_from(sorted(ITEM))))
    all_of = range(-(-num_tokens // ours))
    indices = sorted(draw(st.sets(st.sampled_from(all_of), min_size=1)))
    source.missing = draw(st.sets(st.integers(0, len(source.blocks) - 1), max_size=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fabric_recut, "MAX_STAGED_BYTES", draw(st.sampled_from((1, 3000, 1 << 20))))
        results = check(source, format_of(ours, draw(st.sampled_from(sorted(ITEM)))), indices)
    spoilt = [
        any(i * ours < (bad + 1) * theirs and (i + 1) * ours > bad * theirs
            and bad * theirs < num_tokens for bad in source.missing)
        for i in indices
    ]  # fmt: skip
    # Up to the first that did not come everything is as it should be; the rest is not used.
    first = spoilt.index(True) if True in spoilt else len(spoilt)
    assert results[:first] == [OK] * first
    assert first == len(spoilt) or results[first] is MISSING


def test_nothing_more_is_fetched_after_a_block_that_did_not_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fabric_recut, "MAX_STAGED_BYTES", 1)
    source = Source(96, 16, "float32")
    source.missing = {2}
    assert check(source, format_of(24, "float32"), [0, 1, 2, 3]) == [OK, MISSING, MISSING, MISSING]
    assert source.num_fetched == 3


@pytest.mark.parametrize(
    ("source_type", "target_type", "number"),
    [
        ("float32", "float16", 65520.0),
        ("bfloat16", "float16", 1e5),
        ("float32", "bfloat16", 3.4e38),
    ],
)
def test_a_number_that_the_type_cannot_hold_is_no_block(
    source_type: str, target_type: str, number: float
) -> None:
    source = Source(40, 16, source_type)
    stored = convert(np.array(number, np.float32), "float32", source_type)
    source.blocks[1][1, 0, 3, 5] = stored
    target = format_of(8, target_type)
    cut = recut(source.handoff, target, list(range(5)))
    blocks = [np.zeros(target.block_bytes, np.uint8) for _ in range(5)]
    results = fetch_recut(cut, blocks, source.fetch)
    # Token 19 is in the third of ours.
    assert results == [OK, OK, ReadResult.UNFIT, OK, OK]
