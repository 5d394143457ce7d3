"""The arithmetic of a load test, against cases worked out by hand."""

from __future__ import annotations

import random

import msgspec
import numpy as np
import pytest

from baton.cli.load.sweep import Point, auto, frontier, is_sustained, knee, parse_rates
from baton.errors import ConfigError
from baton.observe.results import RequestResult, Stats, percentile, stats, summarize
from baton.observe.slo import Slo, duration

# Sent at 10.0; tokens at 10.5, 10.6, 10.8; TTFT 0.5, gaps 0.1 and 0.2, E2E 0.8.
RESULT = RequestResult(
    index=0, planned_s=9.9, sent_s=10.0, end_s=10.8, event_s=(10.5, 10.6, 10.8),
    prompt_tokens=7, cached_tokens=2, output_tokens=3, counted_by="usage",
)  # fmt: skip


def test_one_request() -> None:
    assert RESULT.ttft_s == pytest.approx(0.5)
    assert RESULT.tpot_s == pytest.approx(0.15)
    assert RESULT.itl_s == pytest.approx([0.1, 0.2])
    assert RESULT.e2e_s == pytest.approx(0.8)
    values = RESULT.values()
    assert values["itl_p50"] == pytest.approx(0.15)
    assert values["itl_p99"] == pytest.approx(0.199)
    assert values["itl_max"] == pytest.approx(0.2)


def test_tpot_divides_by_tokens_not_by_events() -> None:
    bundled = msgspec.structs.replace(RESULT, output_tokens=7)
    assert bundled.tpot_s == pytest.approx(0.3 / 6)


def test_tpot_lasts_until_the_last_token_even_if_nobody_saw_it() -> None:
    hidden = msgspec.structs.replace(RESULT, output_tokens=7, last_s=11.0)
    assert hidden.tpot_s == pytest.approx(0.5 / 6)
    assert hidden.itl_s == pytest.approx([0.1, 0.2])


def test_a_run_is_counted_by_the_least_exact_of_its_counts() -> None:
    def counted_by(*ways: str) -> str:
        results = [msgspec.structs.replace(RESULT, counted_by=way) for way in ways]
        return summarize(results, Slo()).counted_by

    assert counted_by("token ids", "token ids") == "token ids"
    assert counted_by("token ids", "usage") == "usage"
    assert counted_by("usage", "events", "token ids") == "events"


def test_a_single_token_has_no_tpot_and_no_gap() -> None:
    single = msgspec.structs.replace(RESULT, event_s=(10.5,), output_tokens=1)
    assert single.tpot_s is None
    assert single.itl_s == []
    assert Slo.parse("tpot=1us,itl_p99=1us,ttft=1s").broken_by(single.values()) == []


def test_percentile_is_numpys() -> None:
    values = sorted(random.Random(1).random() for _ in range(57))
    for q in (0, 1, 50, 90, 99, 100):
        assert percentile(values, q) == pytest.approx(float(np.percentile(values, q)))
    assert percentile([3.0], 99) == 3.0
    with pytest.raises(ValueError, match="nothing"):
        percentile([], 50)


def test_stats() -> None:
    assert stats([]) is None
    assert stats([4.0, 1.0, 2.0, 3.0]) == Stats(
        count=4, mean=2.5, p50=2.5, p90=pytest.approx(3.7), p99=pytest.approx(3.97), max=4.0
    )


def test_summary_of_three_good_one_slow_one_failed() -> None:
    results = [
        msgspec.structs.replace(
            RESULT,
            index=i,
            planned_s=float(i),
            sent_s=i + 0.01,
            end_s=i + 1.01,
            event_s=(i + 0.11, i + 1.01),
            output_tokens=10,
        )
        for i in range(4)
    ]
    slow = results[3]
    results[3] = msgspec.structs.replace(slow, event_s=(4.51, 4.99), end_s=5.0)
    results.append(RequestResult(index=4, planned_s=4.0, sent_s=4.0, end_s=4.5, failure="http 429"))
    summary = summarize(results, Slo.parse("ttft=1s,tpot=200ms"))
    assert summary.num_requests == 5
    assert summary.num_ok == 4
    assert summary.failures == {"http 429": 1}
    assert summary.duration_s == pytest.approx(5.0)
    assert summary.offered_per_s == pytest.approx(1.0)
    assert summary.requests_per_s == pytest.approx(0.8)
    assert summary.output_tokens_per_s == pytest.approx(8.0)
    assert summary.input_tokens_per_s == pytest.approx(5.6)
    assert summary.cached_tokens == 8
    assert summary.num_good == 3
    assert summary.goodput_per_s == pytest.approx(0.6)
    assert summary.attainment == pytest.approx(0.6)
    assert summary.missed == {"ttft": 1}
    assert summary.mean_concurrency == pytest.approx((3 * 1.0 + 1.99 + 0.5) / 5)
    assert summary.ttft is not None
    assert summary.ttft.mean == pytest.approx((0.1 * 3 + 1.5) / 4)
    assert summary.send_lag_p99_s == pytest.approx(0.01)
    assert summary.counted_by == "usage"


def test_every_slo_must_hold_and_a_limit_is_inclusive() -> None:
    exact = dict.fromkeys(("ttft", "tpot", "e2e", "itl_p99"), 1.0)
    assert Slo.parse("ttft=1s,e2e=1s").broken_by(exact) == []
    assert Slo.parse("ttft=1s,tpot=999ms,e2e=0.5s").broken_by(exact) == ["tpot", "e2e"]
    assert summarize([RESULT], Slo()).attainment == 1.0


def test_a_failed_request_is_never_good_even_without_slo() -> None:
    failed = msgspec.structs.replace(RESULT, failure="cut short")
    summary = summarize([RESULT, failed], Slo())
    assert summary.attainment == 0.5
    assert summary.output_tokens == 3
    assert summary.ttft is not None and summary.ttft.count == 1


def test_nothing_sent_is_an_error() -> None:
    with pytest.raises(ValueError, match="no requests"):
        summarize([], Slo())


@pytest.mark.parametrize("text", ["ttft=2", "ttft", "itl=3ms", "ttft=-1s", "ttft=1s,ttft=2s", "x"])
def test_bad_slo(text: str) -> None:
    with pytest.raises(ConfigError, match="METRIC=LIMIT"):
        Slo.parse(text)


def test_slo_text() -> None:
    slo = Slo.parse(" ttft = 2s, tpot=40ms,itl_p99=1500us")
    assert slo.limits == {"ttft": 2.0, "tpot": 0.04, "itl_p99": pytest.approx(0.0015)}
    assert Slo.parse(str(slo)) == slo


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0003, "300us"), (0.04125, "41.2ms"), (0.9999, "1s"), (2.05, "2.05s"), (123.4, "123s"),
     (0.00099999, "1ms"), (0, "0us")],
)  # fmt: skip
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def point(rate: float, done: float, ttft: float, tpot: float, attainment: float = 1.0) -> Point:
    base = summarize([RESULT], Slo.parse("ttft=1s"))
    assert base.ttft is not None
    summary = msgspec.structs.replace(
        base,
        requests_per_s=done,
        ttft=msgspec.structs.replace(base.ttft, p99=ttft),
        tpot=msgspec.structs.replace(base.ttft, p99=tpot),
        attainment=attainment,
    )
    return Point(rate, summary, [])


def test_frontier_leaves_out_what_is_worse_in_every_respect() -> None:
    slow = point(1, 1, 1.0, 0.1)
    fast = point(2, 2, 2.0, 0.2)
    beaten = point(4, 1.9, 5.0, 0.3)
    traded = point(3, 1.9, 1.5, 0.3)
    assert frontier([slow, fast, beaten, traded]) == [slow, fast, traded]
    assert frontier([slow, slow]) == [slow, slow]


def test_knee_is_the_highest_sustained_rate() -> None:
    points = [point(1, 1, 1, 1, 1.0), point(2, 2, 1, 1, 0.9), point(4, 3, 1, 1, 0.89)]
    best = knee(points)
    assert best is not None and best.rate == 2
    assert knee(points[2:]) is None


def test_without_slo_a_rate_is_sustained_if_requests_end_as_they_come() -> None:
    summary = msgspec.structs.replace(point(4, 0, 1, 1).summary, slo="", offered_per_s=3.0)
    assert is_sustained(msgspec.structs.replace(summary, requests_per_s=2.5), 4)
    assert not is_sustained(msgspec.structs.replace(summary, requests_per_s=2.3), 4)


@pytest.mark.parametrize(("capacity", "start"), [(5.0, 1.0), (5.0, 16.0), (1.0, 1.0)])
def test_auto_sweep_closes_in_on_the_capacity(capacity: float, start: float) -> None:
    tried: list[float] = []

    def run(rate: float) -> Point:
        tried.append(rate)
        return point(rate, rate, 1, 1, 1.0 if rate <= capacity else 0.0)

    auto(start, run)
    held = max(rate for rate in tried if rate <= capacity)
    broke = min(rate for rate in tried if rate > capacity)
    assert broke / held <= 2**0.25 + 1e-9
    assert len(tried) == len(set(tried)) <= 8


def test_auto_sweep_stops_when_told() -> None:
    tried: list[float] = []

    def run(rate: float) -> None:
        tried.append(rate)

    auto(1.0, run)
    assert tried == [1.0]


def test_auto_sweep_ends_on_a_server_that_never_or_always_keeps_up() -> None:
    for attainment, most in ((0.0, 8), (1.0, 12)):
        tried: list[float] = []

        def run(rate: float, attainment: float = attainment, tried: list[float] = tried) -> Point:
            tried.append(rate)
            return point(rate, rate, 1, 1, attainment)

        auto(1.0, run)
        assert 2 < len(tried) <= most


def test_rates() -> None:
    assert parse_rates("4,1,0.5,1") == [0.5, 1.0, 4.0]
    assert parse_rates("auto") is None
    for text in ("", "1,x", "0,1", "-1", "inf", "nan"):
        with pytest.raises(ConfigError, match="--sweep"):
            parse_rates(text)
