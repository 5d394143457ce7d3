"""What to measure next, from what has been measured: pure, so that a run resumes anywhere.

    1  each engine at each of its budgets, at the first rate        → a budget for each objective
    2  the tail of ITL, each engine at its budget for `smooth`
    3  rates swept, each engine at the chosen budgets, round by round
    4  bursty arrivals, each engine at its budget for `firm`

A sweep goes down from the first rate while an objective of that budget is missed, and up while
one is held; later rounds repeat its rates. A visit is all that is to be measured on one server
before it is stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

from parts.goodput.judge import Key, Measured, choose_budget, curve
from parts.goodput.workload import Workload

TAIL_ENGINES = ("baton-1P1D", "baton-1U", "vllm")


def next_window(
    workload: Workload, engines: Sequence[str], rounds: int, measured: Sequence[Measured]
) -> Key | None:
    """The next window, or None when all is done. Windows of one server follow each other."""
    done = {m.key for m in measured}
    first = workload.first_rate
    for engine in engines:
        for budget in workload.budgets[engine]:
            if (key := Key(engine, budget, "poisson", first, 0)) not in done:
                return key
    for engine in (e for e in TAIL_ENGINES if e in engines):
        budget = _chosen(workload, "smooth", measured, engine)
        if (key := Key(engine, budget, "tail", 0.0, 0)) not in done:
            return key
    for number in range(rounds):
        for engine in _turned(engines, number):
            for budget in sorted(set(budgets_of(workload, measured, engine).values())):
                for rate in _wanted_rates(workload, measured, engine, budget):
                    if (key := Key(engine, budget, "poisson", rate, number)) not in done:
                        return key
        for engine in _turned(engines, number):
            budget = _chosen(workload, "firm", measured, engine)
            if (key := Key(engine, budget, "bursty", workload.bursty.rate, number)) not in done:
                return key
    return None


def budgets_of(workload: Workload, measured: Sequence[Measured], engine: str) -> dict[str, int]:
    """The budget chosen for each objective."""
    return {name: _chosen(workload, name, measured, engine) for name in workload.objectives}


def _chosen(workload: Workload, objective: str, measured: Sequence[Measured], engine: str) -> int:
    # Round 0 alone decides, so that later rounds do not change what is being measured.
    first = [m for m in measured if m.key.round == 0]
    budget = choose_budget(workload, objective, first, engine)
    assert budget is not None, "every budget has been measured at the first rate"
    return budget


def _wanted_rates(
    workload: Workload, measured: Sequence[Measured], engine: str, budget: int
) -> list[float]:
    """Those measured, and the next one down or up that an objective of this budget asks for."""
    chosen = budgets_of(workload, measured, engine)
    wanted = {workload.first_rate}
    for objective in (name for name, b in chosen.items() if b == budget):
        attained = curve(workload, objective, measured, engine, budget)
        start = workload.rates.index(workload.first_rate)
        for step in (-1, 1):
            index = start
            while 0 <= index < len(workload.rates):
                rate = workload.rates[index]
                wanted.add(rate)
                if rate not in attained:
                    break
                if (attained[rate] >= workload.attainment) != (step > 0):
                    break  # down from a rate that holds, up from one that does not: no use
                index += step
    return sorted(wanted)


def _turned(engines: Sequence[str], number: int) -> list[str]:
    start = number % max(1, len(engines))  # all may have failed
    return [*engines[start:], *engines[:start]]
