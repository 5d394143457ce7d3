"""When a plan is stale: each reason, that it does not flap, and that few requests say nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import msgspec
import pytest

from baton.config import PlanConfig
from baton.errors import ConfigError
from baton.observe.audit import Stage, StageError
from baton.observe.plan_watch import (
    MIN_REQUESTS,
    QUIET_S,
    WINDOW,
    Ended,
    Finding,
    PlanWatch,
    Reason,
    shift,
)
from baton.types import Role

PROMPTS = "100 200 300 400 500 600 700 800 900"
OUTPUTS = "10 20 30 40 50 60 70 80 90"
DECILES = tuple(100.0 * i for i in range(1, 10))


def request(prompt: int = 500, output: int = 50, ttft_s: float = 0.1) -> Ended:
    return Ended(prompt, output, ttft_s, ttft_s + 0.01 * (output - 1))


def of(findings: Iterable[Finding], reason: Reason) -> Finding:
    (found,) = (each for each in findings if each.reason is reason)
    return found


def spread(rng: random.Random, factor: float = 1.0) -> Ended:
    return request(int(factor * rng.uniform(1, 1000)), int(factor * rng.uniform(1, 100)))


class Arrivals:
    """Requests that come evenly, at rates that change."""

    def __init__(self, watch: PlanWatch) -> None:
        self.watch, self.now = watch, 0.0

    def come(self, count: int, rate: float) -> list[Finding]:
        for _ in range(count):
            self.now += 1 / rate
            self.watch.arrived(self.now)
        return self.watch.judge(self.now)


def test_few_requests_say_nothing() -> None:
    watch = PlanWatch(
        PlanConfig(max_rate=1.0, prompt_tokens=PROMPTS, slo="ttft=1s", attainment=0.9)
    )
    arrivals = Arrivals(watch)
    for _ in range(MIN_REQUESTS - 1):
        watch.ended(request(prompt=5000, ttft_s=9.0))
    assert arrivals.come(MIN_REQUESTS - 1, rate=100.0) == []
    watch.ended(request(prompt=5000, ttft_s=9.0))
    stale = {each.reason for each in arrivals.come(1, rate=100.0) if each.is_stale}
    assert stale == {Reason.RATE_HIGH, Reason.PROMPT_LENGTHS, Reason.ATTAINMENT}


def test_a_plan_without_assumptions_is_never_stale() -> None:
    watch = PlanWatch(PlanConfig())
    for _ in range(WINDOW):
        watch.ended(request())
    assert Arrivals(watch).come(WINDOW, rate=1e6) == []


def test_the_rate_is_told_and_does_not_flap() -> None:
    arrivals = Arrivals(PlanWatch(PlanConfig(max_rate=10.0)))
    assert not of(arrivals.come(WINDOW, 9.9), Reason.RATE_HIGH).is_stale
    # Above it by no more than chance may bring.
    assert not of(arrivals.come(WINDOW, 11.0), Reason.RATE_HIGH).is_stale
    found = of(arrivals.come(WINDOW, 13.0), Reason.RATE_HIGH)
    assert found.is_stale
    assert found.strain == pytest.approx(1.3, rel=0.01)
    assert "13 requests/s over the last 300, planned for up to 10" in found.says
    assert of(arrivals.come(WINDOW, 11.0), Reason.RATE_HIGH).is_stale  # not below it yet
    assert of(arrivals.come(WINDOW, 10.5), Reason.RATE_HIGH).is_stale
    assert not of(arrivals.come(WINDOW, 9.5), Reason.RATE_HIGH).is_stale
    assert not of(arrivals.come(WINDOW, 11.0), Reason.RATE_HIGH).is_stale


def test_a_burst_that_is_over_fades() -> None:
    arrivals = Arrivals(PlanWatch(PlanConfig(max_rate=10.0)))
    assert of(arrivals.come(WINDOW, 100.0), Reason.RATE_HIGH).is_stale
    found = arrivals.watch.judge(arrivals.now + WINDOW)
    assert not of(found, Reason.RATE_HIGH).is_stale


def test_a_night_is_no_low_rate_and_a_day_is() -> None:
    arrivals = Arrivals(PlanWatch(PlanConfig(min_rate=1.0)))
    assert not of(arrivals.come(WINDOW, 2.0), Reason.RATE_LOW).is_stale
    rate = 0.01
    assert not of(arrivals.come(WINDOW, rate), Reason.RATE_LOW).is_stale
    assert not of(arrivals.come(int(0.5 * QUIET_S * rate), rate), Reason.RATE_LOW).is_stale
    assert of(arrivals.come(int(0.6 * QUIET_S * rate), rate), Reason.RATE_LOW).is_stale
    assert not of(arrivals.come(WINDOW, 2.0), Reason.RATE_LOW).is_stale


@pytest.mark.parametrize(
    ("reason", "changed"),
    [
        (Reason.PROMPT_LENGTHS, lambda rng: request(int(rng.uniform(1, 2000)), 50)),
        (Reason.OUTPUT_LENGTHS, lambda rng: request(500, int(rng.uniform(1, 30)))),
    ],
)
def test_lengths_that_change_and_come_back(
    reason: Reason, changed: Callable[[random.Random], Ended]
) -> None:
    rng = random.Random(7)
    watch = PlanWatch(PlanConfig(prompt_tokens=PROMPTS, output_tokens=OUTPUTS))

    def served(draw: Callable[[random.Random], Ended], count: int) -> Finding:
        for _ in range(count):
            watch.ended(draw(rng))
        return of(watch.judge(0.0), reason)

    assert not served(spread, WINDOW).is_stale
    found = served(changed, WINDOW)
    assert found.is_stale
    assert "the median of the last 300 requests is" in found.says
    assert not served(spread, WINDOW).is_stale


def test_the_planned_lengths_are_no_news_however_few_they_are() -> None:
    wrong = 0
    for seed in range(200):
        rng = random.Random(seed)
        watch = PlanWatch(PlanConfig(prompt_tokens=PROMPTS, output_tokens=OUTPUTS))
        for _ in range(MIN_REQUESTS):
            watch.ended(spread(rng))
        wrong += any(each.is_stale for each in watch.judge(0.0))
    assert wrong <= 4


def test_lengths_that_are_all_alike() -> None:
    watch = PlanWatch(PlanConfig(prompt_tokens="512 " * 9))
    for _ in range(WINDOW):
        watch.ended(request(prompt=512))
    assert of(watch.judge(0.0), Reason.PROMPT_LENGTHS).strain == 0.0
    for _ in range(WINDOW):
        watch.ended(request(prompt=513))
    assert of(watch.judge(0.0), Reason.PROMPT_LENGTHS).is_stale


def test_how_far_lengths_have_shifted() -> None:
    assert shift(DECILES, range(1000)) == pytest.approx(0.0, abs=0.01)
    assert shift(DECILES, [x / 2 for x in range(1000)]) == pytest.approx(0.5, abs=0.01)
    assert shift(DECILES, [10_000]) == pytest.approx(0.9)
    assert shift(DECILES, [0]) == pytest.approx(0.9)
    # Half of them moved.
    assert shift(DECILES, [*range(1000), *([10_000] * 1000)]) == pytest.approx(0.45, abs=0.01)


def test_the_promise() -> None:
    watch = PlanWatch(PlanConfig(slo="ttft=1s,tpot=20ms,itl_p99=1us", attainment=0.9))

    def served(late: Ended, share: float) -> Finding:
        for i in range(WINDOW):
            watch.ended(late if i < share * WINDOW else request())
        return of(watch.judge(0.0), Reason.ATTAINMENT)

    slow = Ended(500, 50, 0.1, 0.1 + 49 * 0.03)
    assert not served(request(ttft_s=2.0), 0.05).is_stale
    found = served(request(ttft_s=2.0), 0.2)
    assert found.is_stale
    assert found.says == (
        "80.0% of the last 300 requests kept ttft=1s,tpot=20ms,itl_p99=1us, promised 90.0%"
    )
    assert not served(slow, 0.05).is_stale
    assert served(slow, 0.2).is_stale
    assert not served(request(), 1.0).is_stale
    assert served(msgspec.structs.replace(request(), failed=True), 0.2).is_stale


def test_chance_alone_does_not_break_a_promise_of_nearly_all() -> None:
    """Of 300 requests, 3 may be late; by chance 6 are in one window of 12."""
    watch = PlanWatch(PlanConfig(slo="ttft=1s", attainment=0.99))

    def late(count: int) -> Finding:
        for i in range(WINDOW):
            watch.ended(request(ttft_s=2.0 if i < count else 0.1))
        return of(watch.judge(0.0), Reason.ATTAINMENT)

    assert not late(6).is_stale
    assert late(7).is_stale
    assert late(6).is_stale  # until it is kept again
    assert not late(2).is_stale


def error(median: float, count: int = 100, stage: Stage = Stage.DECODE_STEP) -> StageError:
    return StageError("d0", Role.DECODE, stage, count, count, median, 2 * median, 1 + median, 1, 2)


def test_errors_that_the_profile_does_not_explain() -> None:
    watch = PlanWatch(PlanConfig(decode_step_error=0.2, prompt_step_error=0.5))

    def judged(*errors: StageError) -> bool:
        return of(watch.judge(0.0, errors), Reason.STEP_ERROR).is_stale

    assert not judged(error(0.19))
    assert not judged(error(0.21))
    assert judged(error(0.3))
    assert judged(error(0.21))
    assert not judged(error(0.15))
    worse = error(0.7, stage=Stage.PROMPT_STEP)
    assert judged(error(0.1), msgspec.structs.replace(worse, role=Role.UNIFIED))  # the worst counts
    # What a decode worker computes of prompts is none of its business, and not judged.
    assert not judged(error(0.1), worse)
    assert watch.judge(0.0, [error(0.9, count=MIN_REQUESTS - 1)]) == []
    assert watch.judge(0.0, [error(9.0, stage=Stage.QUEUE)]) == []


def test_a_profile_that_claims_to_be_perfect_is_not_held_to_it() -> None:
    watch = PlanWatch(PlanConfig(decode_step_error=0.001))
    assert not of(watch.judge(0.0, [error(0.04)]), Reason.STEP_ERROR).is_stale


@pytest.mark.parametrize("plan", [PlanConfig(slo="fast"), PlanConfig(prompt_tokens="1 2 3")])
def test_a_plan_that_cannot_be_read(plan: PlanConfig) -> None:
    with pytest.raises(ConfigError):
        PlanWatch(plan)
