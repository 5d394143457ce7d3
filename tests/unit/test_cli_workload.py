"""Arrivals, traces, data sets and prompts."""

from __future__ import annotations

import random
from itertools import islice, pairwise
from pathlib import Path

import msgspec
import pytest

from baton.cli.load.prompts import FIRST_TOKEN_ID, PromptSource
from baton.cli.load.workload import (
    Arrival,
    Range,
    from_dataset,
    from_trace,
    limit,
    poisson,
    synthetic,
)
from baton.errors import ConfigError
from baton.planner.traces import Trace
from baton.twin.workload import TraceRequest


def test_poisson_has_the_rate_and_the_spread_of_one() -> None:
    times = list(islice(poisson(4.0, random.Random(1)), 20_001))
    gaps = [b - a for a, b in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert times[0] == 0.0
    assert mean == pytest.approx(0.25, rel=0.03)
    assert variance**0.5 / mean == pytest.approx(1.0, rel=0.05)


def test_an_infinite_rate_sends_all_at_once() -> None:
    assert list(islice(poisson(float("inf"), random.Random(1)), 3)) == [0.0, 0.0, 0.0]


def test_limits_by_number_and_by_time() -> None:
    def arrivals() -> list[Arrival]:
        return [Arrival(float(i), 1, 1) for i in range(10)]

    assert len(limit(iter(arrivals()), 3, None)) == 3
    assert len(limit(iter(arrivals()), None, 4.5)) == 5
    assert len(limit(iter(arrivals()), 2, 4.5)) == 2


def test_lengths_stay_in_their_range() -> None:
    rng = random.Random(2)
    made = list(islice(synthetic(1.0, Range(5, 7), Range(3, 3), rng), 200))
    assert {a.prompt_tokens for a in made} == {5, 6, 7}
    assert {a.output_tokens for a in made} == {3}


@pytest.mark.parametrize("text", ["", "0", "7-5", "a", "1-", "-3", "1.5", "1-2-3"])
def test_bad_ranges_name_the_flag(text: str) -> None:
    with pytest.raises(ConfigError, match="--x"):
        Range.parse(text, "--x")


def test_a_trace_faster_and_shorter() -> None:
    requests = [
        TraceRequest(0.0, 10, 1),
        TraceRequest(2.0, 1100, 50, blocks=(4, 5), block_size=512),
    ]
    trace = Trace(source="t", format="mooncake", requests=requests)
    assert from_trace(trace, speed=4.0, scale=0.1) == [
        Arrival(0.0, 1, 1),
        Arrival(0.5, 110, 5, blocks=(4, 5), block_tokens=51),
    ]
    with pytest.raises(ConfigError, match="lengths but no times: name their column by --columns"):
        from_trace(msgspec.structs.replace(trace, has_arrivals=False))


def test_dataset(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(
        '{"prompt": "a", "output_tokens": 3}\n{"prompt": [1, 2]}\n'
        '{"messages": [{"role": "user", "content": "c"}]}\n'
    )
    made = list(islice(from_dataset(file, 1.0, None, random.Random(0)), 6))
    assert sorted(str(a.prompt) for a in made[:3]) == sorted(str(a.prompt) for a in made[3:])
    assert {str(a.prompt): a.output_tokens for a in made}["a"] == 3
    assert {str(a.prompt): a.output_tokens for a in made}["[1, 2]"] is None
    drawn = list(islice(from_dataset(file, 1.0, Range(9, 9), random.Random(0)), 3))
    assert sorted(a.output_tokens or 0 for a in drawn) == [3, 9, 9]


def test_bad_dataset(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(ConfigError, match="line 2"):
        next(from_dataset(file, 1.0, None, random.Random(0)))


def test_prompts_never_repeat_and_follow_the_seed() -> None:
    source = PromptSource("7")
    made = [str(source.make(Arrival(0, 2, 1))) for _ in range(500)]
    assert len(set(made)) == 500
    assert all(len(text.split()) == 2 for text in made)
    again = PromptSource("7")
    assert [again.make(Arrival(0, 2, 1)) for _ in range(500)] == made
    assert PromptSource("8").make(Arrival(0, 2, 1)) != made[0]


def test_running_out_of_prompts_is_said() -> None:
    source = PromptSource("7", vocabulary=FIRST_TOKEN_ID + 3)
    with pytest.raises(ConfigError, match="no more different prompts of 1"):
        for _ in range(4):
            source.make(Arrival(0, 1, 1))


def test_token_ids_are_exact_in_number_and_in_range() -> None:
    ids = PromptSource("7", vocabulary=200).make(Arrival(0, 1000, 1))
    assert isinstance(ids, list)
    assert len(ids) == 1000
    assert all(isinstance(i, int) and FIRST_TOKEN_ID <= i < 200 for i in ids)
    with pytest.raises(ConfigError, match="--token-ids"):
        PromptSource("7", vocabulary=5)


def test_equal_blocks_make_a_shared_prefix() -> None:
    source = PromptSource("7", vocabulary=4000)
    a = source.make(Arrival(0, 1100, 1, blocks=(1, 2), block_tokens=512))
    b = source.make(Arrival(0, 1500, 1, blocks=(1, 2), block_tokens=512))
    c = source.make(Arrival(0, 1500, 1, blocks=(8, 2), block_tokens=512))
    assert len(a) == 1100 and len(b) == len(c) == 1500
    assert a[:1024] == b[:1024]
    assert a[1024:1100] != b[1024:1100]
    assert c[:512] != a[:512]
    assert c[512:1024] == a[512:1024]
