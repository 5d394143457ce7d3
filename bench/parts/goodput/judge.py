"""From requests to attainment, and from attainments to goodput. Pure arithmetic.

stress of a request      the largest of its values ÷ their limits; infinite if it failed
attainment of a window   the share of requests with stress ≤ 1
goodput                  the highest rate with attainment ≥ the target (0.9): rates are walked
                         upwards, and the rate at which the line between the last one that
                         held and the first one that did not crosses the target is taken
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from baton.observe.results import RequestResult, percentile
from baton.observe.slo import Slo
from parts.goodput.workload import Workload


class Outcome(msgspec.Struct, frozen=True):
    """One request: its class and its values in seconds; failure is None if it went well."""

    name: str
    values: dict[str, float | None]
    output_tokens: int
    failure: str | None = None
    cached_tokens: int | None = None


class Key(msgspec.Struct, frozen=True, order=True):
    """Which window: `kind` is poisson, bursty or tail; rates are requests a second."""

    engine: str
    budget: int
    kind: str
    rate: float
    round: int


class Measured(msgspec.Struct, frozen=True):
    """One window of one engine; `bytes_per_s` is the memory's bandwidth just before it.

    `gaps_s`: of a tail window, the streams' gaps while prompts were in flight.
    """

    key: Key
    outcomes: list[Outcome]
    bytes_per_s: float
    when: str
    flags: str
    gaps_s: list[float] = []


def outcome(name: str, result: RequestResult) -> Outcome:
    return Outcome(
        name, result.values(), result.output_tokens, result.failure, result.cached_tokens
    )


def stress(found: Outcome, slo: Slo) -> float:
    if found.failure is not None:
        return math.inf
    values = ((found.values[metric], limit) for metric, limit in slo.limits.items())
    return max((value / limit for value, limit in values if value is not None), default=0.0)


def stresses(workload: Workload, objective: str, outcomes: Iterable[Outcome]) -> list[float]:
    """Of each request against the limits of its class, sorted."""
    slos = {name: workload.slo(objective, name) for name in workload.classes}
    return sorted(stress(o, slos[o.name]) for o in outcomes)


def attainment(workload: Workload, objective: str, outcomes: Sequence[Outcome]) -> float:
    found = stresses(workload, objective, outcomes)
    return sum(value <= 1 for value in found) / len(found)


def choose_budget(
    workload: Workload, objective: str, measured: Sequence[Measured], engine: str
) -> int | None:
    """The budget with the lowest stress at `first_rate`, at the rank that decides.

    That rank is the target's: with 20 requests and 0.9 the 18th lowest. None without windows.
    """
    best: dict[int, float] = {}
    at_first = [m for m in measured if m.key.engine == engine and m.key.kind == "poisson"]
    for budget in sorted({m.key.budget for m in at_first}):
        outcomes = [
            o
            for m in at_first
            if m.key.budget == budget and m.key.rate == workload.first_rate
            for o in m.outcomes
        ]
        if outcomes:
            found = stresses(workload, objective, outcomes)
            best[budget] = found[max(0, math.ceil(workload.attainment * len(found)) - 1)]
    return min(best, key=lambda budget: best[budget]) if best else None


def curve(
    workload: Workload, objective: str, measured: Sequence[Measured], engine: str, budget: int
) -> dict[float, float]:
    """Attainment by rate, rounds pooled."""
    pooled: dict[float, list[Outcome]] = {}
    for m in measured:
        if (m.key.engine, m.key.budget, m.key.kind) == (engine, budget, "poisson"):
            pooled.setdefault(m.key.rate, []).extend(m.outcomes)
    return {rate: attainment(workload, objective, pooled[rate]) for rate in sorted(pooled)}


class Goodput(msgspec.Struct, frozen=True):
    """`rate` in requests a second; `at_least` if even the highest rate measured held.

    `at_most`: if not even the lowest held, that rate; `rate` is then 0.
    """

    rate: float
    at_least: bool = False
    at_most: float | None = None


def goodput(attained: Mapping[float, float], target: float) -> Goodput | None:
    """None if nothing was measured."""
    held: tuple[float, float] | None = None
    for rate in sorted(attained):
        share = attained[rate]
        if share < target:
            if held is None:
                return Goodput(0.0, at_most=rate)
            low, before = held
            return Goodput(low + (rate - low) * (before - target) / (before - share))
        held = (rate, share)
    return None if held is None else Goodput(held[0], at_least=True)


def p99(values: Iterable[float]) -> float | None:
    ordered = sorted(values)
    return percentile(ordered, 99) if ordered else None
