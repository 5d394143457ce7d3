"""The efficient frontier: how fast answers come against how many of them a dollar buys."""

from __future__ import annotations

from collections.abc import Sequence

from baton.planner.analyze.charts import Chart
from baton.planner.analyze.page import STYLE
from baton.planner.plan.candidates import Style
from baton.planner.plan.rows import Row
from baton.planner.plan.verdict import Plan

SERIES = {Style.UNIFIED: 1, Style.SPLIT: 2, Style.MIXED: 3}
MOST_STRAIN = 3.0
"""What misses its limits by more is not drawn."""


def frontier(rows: Sequence[Row]) -> list[Row]:
    """Those that no other one beats in both latency and cost, the cheapest first."""
    found: list[Row] = []
    for row in sorted(rows, key=lambda each: (each.usd_per_million, each.trial.strain)):
        if not found or row.trial.strain < found[-1].trial.strain:
            found.append(row)
    return found


def tokens_per_usd(row: Row) -> float:
    return 1e6 / row.usd_per_million


def plot(plan: Plan) -> str:
    """A picture that needs nothing else: latency as a share of its limit, output tokens a dollar.

    The line is the frontier, and what is on it has its name; the styles have colours of their own.
    """
    drawn = [row for row in plan.rows if row.trial.strain <= MOST_STRAIN] or [plan.chosen]
    most = max(tokens_per_usd(row) for row in drawn)
    chart = Chart(
        "Latency against throughput per money",
        (0, max(1.1, 1.05 * max(row.trial.strain for row in drawn))),
        (0, 1.1 * most),
        x_label="latency / limit (1: just kept)",
        y_label="output tokens per $",
        y_format=short,
    )
    edge = frontier(drawn)
    chart.line([_point(row) for row in edge], 1, dashed=True)
    for style, series in SERIES.items():
        mine = [row for row in drawn if row.style is style]
        chart.dots([_point(row) for row in mine], series, [row.candidate.name for row in mine])
    styles = {row.style for row in drawn}
    chart.legend([(SERIES[style], style.value) for style in SERIES if style in styles])
    chart.rule(1.0, "limit")
    if plan.chosen in drawn:
        chart.ring(*_point(plan.chosen))
        chart.label(*_point(plan.chosen), f"chosen: {_short_name(plan.chosen)}")
    for row in edge:
        if row is not plan.chosen:
            chart.label(*_point(row), _short_name(row))
    head, rest = chart.svg().split(">", 1)
    head = head.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" width="920" ', 1)
    ground = '<rect width="100%" height="100%" style="fill:var(--card)"/>'
    return f"{head}><style>{STYLE}</style>{ground}{rest}\n"


def _point(row: Row) -> tuple[float, float]:
    return row.trial.strain, tokens_per_usd(row)


def _short_name(row: Row) -> str:
    """Layout and devices."""
    return row.candidate.name.partition(",")[0]


def short(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
