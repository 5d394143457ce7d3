"""Made-up workloads, and traces that cannot be served."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Iterator

import pytest

from baton.errors import ConfigError
from baton.twin.workload import (
    Among,
    Fixed,
    LogNormal,
    TraceRequest,
    Uniform,
    bursty,
    check_trace,
    gamma,
    poisson,
    scale,
    synthetic,
)


def gaps(times: Iterator[float], count: int = 20_000) -> list[float]:
    taken = list(itertools.islice(times, count))
    assert taken == sorted(taken)
    return [b - a for a, b in itertools.pairwise(taken)]


def variation(values: list[float]) -> float:
    return statistics.stdev(values) / statistics.mean(values)


def test_arrivals_have_their_rate_and_variation() -> None:
    exponential = gaps(poisson(4.0, random.Random(1)))
    assert statistics.mean(exponential) == pytest.approx(0.25, rel=0.05)
    assert variation(exponential) == pytest.approx(1.0, rel=0.05)
    for cv in (0.3, 2.5):
        drawn = gaps(gamma(4.0, cv, random.Random(1)))
        assert statistics.mean(drawn) == pytest.approx(0.25, rel=0.1)
        assert variation(drawn) == pytest.approx(cv, rel=0.1)
    burst = gaps(bursty(4.0, 5.0, 2.0, 18.0, random.Random(1)))
    assert statistics.mean(burst) == pytest.approx(0.25, rel=0.15)
    assert variation(burst) > 1.3


def test_bursts_may_take_everything() -> None:
    times = list(itertools.islice(bursty(2.0, 4.0, 1.0, 3.0, random.Random(2)), 500))
    assert len(set(times)) == 500


def test_lengths_are_of_their_kind() -> None:
    rng = random.Random(3)
    assert Fixed(7).draw(rng) == 7
    assert {Uniform(2, 4).draw(rng) for _ in range(200)} == {2, 3, 4}
    assert {Among((5, 9)).draw(rng) for _ in range(200)} == {5, 9}
    drawn = [LogNormal(100.0, 1.0, 900).draw(rng) for _ in range(5000)]
    assert statistics.median(drawn) == pytest.approx(100, rel=0.1)
    assert min(drawn) >= 1
    assert max(drawn) == 900


def test_same_seed_same_requests() -> None:
    def make(seed: int) -> list[TraceRequest]:
        rng = random.Random(seed)
        return synthetic(poisson(2.0, rng), Uniform(1, 99), Fixed(3), rng, duration_s=50.0)

    assert make(1) == make(1) != make(2)
    assert make(1)[-1].arrival_s <= 50.0


def test_a_trace_is_scaled_to_a_rate() -> None:
    trace = [TraceRequest(2.0 + i, 10, 10) for i in range(11)]
    fast = scale(trace, 5.0)
    assert fast[0].arrival_s == 0.0
    assert fast[-1].arrival_s == pytest.approx(2.0)


ONE = TraceRequest(0.0, 5, 5)


@pytest.mark.parametrize(
    ("trace", "words"),
    [
        ([], "is empty: give at least one request"),
        ([ONE, TraceRequest(-1.0, 5, 5)], "count from the start of the trace"),
        ([TraceRequest(float("nan"), 5, 5)], "count from the start of the trace"),
        ([TraceRequest(3.0, 5, 5), ONE], "sort the trace by arrival"),
        ([TraceRequest(0.0, 0, 5)], "0 prompt tokens: every request needs at least 1"),
        ([TraceRequest(0.0, 5, 0)], "0 output tokens: every request needs at least 1"),
        ([TraceRequest(0.0, 5, 5, blocks=(1,))], "block_size 0: set it"),
    ],
)
def test_bad_traces_get_a_sentence(trace: list[TraceRequest], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_trace(trace)


def test_bad_figures_get_a_sentence() -> None:
    rng = random.Random(0)
    for call in (
        lambda: poisson(0.0, rng),
        lambda: gamma(-1.0, 1.0, rng),
        lambda: gamma(1.0, 0.0, rng),
        lambda: bursty(1.0, 2.0, 0.0, 1.0, rng),
        lambda: scale([ONE, TraceRequest(1.0, 5, 5)], 0.0),
    ):
        with pytest.raises(ConfigError, match="give a number above 0"):
            call()
    with pytest.raises(ConfigError, match="lower the factor to 2"):
        bursty(1.0, 3.0, 1.0, 1.0, rng)
    with pytest.raises(ConfigError, match="leave the rate out"):
        scale([ONE], 1.0)
    with pytest.raises(ConfigError, match="give num_requests or duration_s"):
        synthetic(poisson(1.0, rng), Fixed(1), Fixed(1), rng)
