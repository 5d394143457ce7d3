"""From the times of requests to a verdict: pure arithmetic.

figures       mean and p90 of TTFT, TPOT and E2E of one run
spread        |first - second| / their mean, of the two repeats of a cell
error         twin / mean of the repeats - 1
allowed       max(10 %, 1.5 × spread), never more than 20 %
noisy         1.5 × spread is above 20 %: the repeats tell too little, the cell is run again
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from baton.observe.results import RequestResult, stats
from baton.twin.workload import TraceRequest
from parts.twin_vs_real.cells import REPEATS, Cell

LEAST_ALLOWED, MOST_ALLOWED, SPREADS = 0.10, 0.20, 1.5
METRICS = ("ttft", "tpot", "e2e")
FIGURES = tuple(f"{metric} {what}" for metric in METRICS for what in ("mean", "p90"))
KEPT_UP = 0.85
"""Of the arrivals in a window: a server that ends fewer has a growing queue."""

Verdict = Literal["within", "off", "again", "failed"]


class Run(msgspec.Struct, frozen=True, tag="run"):
    """One run of the real server: its figures in seconds, and each request's TTFT, TPOT and E2E.

    rate: requests a second, offered. lag_s: p99 of how late the client sent. load_average: of the
    machine, in the minute before the run.
    """

    cell: Cell
    rate: float
    figures: dict[str, float]
    requests: list[tuple[float | None, float | None, float]]
    failures: dict[str, int]
    lag_s: float
    load_average: float
    when: str


class Compared(msgspec.Struct, frozen=True):
    """One figure of a cell: two real values and the twin's, in seconds; the rest are shares."""

    name: str
    first: float
    second: float
    twin: float

    @property
    def real(self) -> float:
        return (self.first + self.second) / 2

    @property
    def spread(self) -> float:
        return abs(self.first - self.second) / self.real if self.real > 0 else math.inf

    @property
    def error(self) -> float:
        return self.twin / self.real - 1 if self.real > 0 else math.inf

    @property
    def allowed(self) -> float:
        return min(MOST_ALLOWED, max(LEAST_ALLOWED, SPREADS * self.spread))

    @property
    def is_noisy(self) -> bool:
        return SPREADS * self.spread > MOST_ALLOWED


def figures(results: Sequence[RequestResult]) -> dict[str, float]:
    """Mean and p90 by name (see FIGURES), of the requests that went well; absent without any."""
    ok = [each for each in results if each.failure is None]
    values = {
        "ttft": [each.ttft_s for each in ok],
        "tpot": [each.tpot_s for each in ok],
        "e2e": [each.e2e_s for each in ok],
    }
    found = {}
    for metric, times in values.items():
        of_all = stats(time for time in times if time is not None)
        if of_all is not None:
            found[f"{metric} mean"], found[f"{metric} p90"] = of_all.mean, of_all.p90
    return found


def failures(trace: Sequence[TraceRequest], results: Sequence[RequestResult]) -> dict[str, int]:
    """How many requests failed, by kind; an answer or a prompt of another length is one, too."""
    found: dict[str, int] = {}
    for asked, got in zip(trace, results, strict=True):
        kind = got.failure
        lengths = (got.prompt_tokens, got.output_tokens)
        if kind is None and lengths != (asked.num_prompt_tokens, asked.num_output_tokens):
            kind = "other length"
        if kind is not None:
            found[kind] = found.get(kind, 0) + 1
    return found


def last_pair(runs: Sequence[Run], cell: Cell) -> tuple[Run, Run] | None:
    """The newest two repeats that belong together; None if there are none yet."""
    own = [run for run in runs if run.cell == cell]
    own = own[: len(own) - len(own) % REPEATS]
    return (own[-2], own[-1]) if own else None


def compare(pair: tuple[Run, Run], twin: Mapping[str, float]) -> list[Compared]:
    """Every figure that all three have."""
    first, second = pair[0].figures, pair[1].figures
    return [
        Compared(name, first[name], second[name], twin[name])
        for name in FIGURES
        if name in first and name in second and name in twin
    ]


def is_noisy(pair: tuple[Run, Run]) -> bool:
    """The cell has to be run again, whatever the twin says of it."""
    alone = compare(pair, pair[0].figures)
    return any(run.failures for run in pair) or any(each.is_noisy for each in alone)


def verdict(pair: tuple[Run, Run], compared: Sequence[Compared]) -> Verdict:
    if any(run.failures for run in pair) or len(compared) < len(FIGURES):
        return "failed"
    if any(each.is_noisy for each in compared):
        return "again"
    return "within" if all(abs(each.error) <= each.allowed for each in compared) else "off"


def throughput(results: Sequence[RequestResult], window_s: float) -> tuple[float, float]:
    """(requests ended a second, that as a share of those which arrived) after a quarter.

    Over the last three quarters of the `window_s` in which requests arrive; share 1 if none did.
    """
    start = min(each.planned_s for each in results)
    begin, end = start + window_s / 4, start + window_s
    arrived = sum(begin < each.planned_s <= end for each in results)
    ended = sum(begin < each.end_s <= end for each in results if each.failure is None)
    return ended / (end - begin), ended / arrived if arrived else 1.0
