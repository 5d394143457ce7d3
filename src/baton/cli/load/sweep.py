"""Raising the rate: which rates to try, and which points make the frontier."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec

from baton.errors import ConfigError
from baton.observe.results import RequestResult, Summary

ATTAINMENT = 0.9
"""A rate is sustained if this share of its requests met the SLOs (the field's custom)."""
SERVED = 0.8
"""Without SLOs: if requests ended at this share of the offered rate, the last ones included."""
MAX_DOUBLINGS = 12
MAX_HALVINGS = 5
NUM_BISECTIONS = 2


class Point(msgspec.Struct, frozen=True):
    """One run of a sweep; rate is what was asked for, in requests per second (None: a trace)."""

    rate: float | None
    summary: Summary
    results: list[RequestResult]


def parse_rates(text: str) -> list[float] | None:
    """`0.5,1,2` in rising order; None for `auto`.

    Raises:
        ConfigError: neither.
    """
    if text == "auto":
        return None
    try:
        rates = sorted({float(part) for part in text.split(",")})
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise ConfigError(f"--sweep {text!r}: write rates such as 0.5,1,2,4, or auto")
    return rates


def is_sustained(summary: Summary, rate: float) -> bool:
    """Whether the server keeps up at this rate."""
    if summary.slo:
        return summary.attainment >= ATTAINMENT
    return summary.requests_per_s >= SERVED * min(rate, summary.offered_per_s or rate)


def auto(start: float, run: Callable[[float], Point | None]) -> None:
    """Double the rate from `start` until it is not sustained, then bisect towards the knee.

    If `start` itself is too much, halve it first. `run` does one run and returns None to stop.
    """

    def sustained(rate: float) -> bool | None:
        point = run(rate)
        return None if point is None else is_sustained(point.summary, rate)

    good: float | None = None
    bad: float | None = None
    rate = start
    for _ in range(MAX_DOUBLINGS):
        verdict = sustained(rate)
        if verdict is None:
            return
        if verdict:
            good, rate = rate, rate * 2
            if bad is not None:
                break
        else:
            bad, rate = rate, rate / 2
            if good is not None or rate < start / 2**MAX_HALVINGS:
                break
    if good is None or bad is None:
        return
    for _ in range(NUM_BISECTIONS):
        middle = math.sqrt(good * bad)
        verdict = sustained(middle)
        if verdict is None:
            return
        good, bad = (middle, bad) if verdict else (good, middle)


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats: more done per second at no higher TTFT and TPOT (p99)."""
    usable = [point for point in points if point.summary.ttft is not None]
    return [p for p in usable if not any(_beats(q, p) for q in usable)]


def _beats(a: Point, b: Point) -> bool:
    ours, theirs = _costs(a.summary), _costs(b.summary)
    return ours != theirs and all(x <= y for x, y in zip(ours, theirs, strict=True))


def _costs(summary: Summary) -> tuple[float, float, float]:
    ttft = summary.ttft.p99 if summary.ttft else math.inf
    tpot = summary.tpot.p99 if summary.tpot else 0.0
    return (-summary.requests_per_s, ttft, tpot)


def knee(points: Sequence[Point]) -> Point | None:
    """The highest rate that was sustained."""
    held = [p for p in points if p.rate is not None and is_sustained(p.summary, p.rate)]
    return max(held, key=lambda p: p.rate or 0.0, default=None)
