"""Medians and ranges of the cells, beside the roofline of their windows."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import msgspec

from parts.peers.cells import Cell, Cost
from parts.peers.engines import Missing


class Window(msgspec.Struct, frozen=True):
    """What the machine gave just before one cell of one round."""

    bytes_per_s: float
    torch_flops_per_s: float
    native_flops_per_s: float

    @property
    def flops_per_s(self) -> float:
        return max(self.torch_flops_per_s, self.native_flops_per_s)


class Result(msgspec.Struct, frozen=True):
    """One engine in one cell in one round; `window` is the cell's, the same for all engines.

    `summed`: a mixed cell's time that was not measured as one, but is the sum of its prompts and
    of its steps, each by themselves.
    """

    engine: str
    cell: Cell
    round: int
    seconds: float
    window: Window
    summed: bool = False


SUMMED = "†"
FOOTNOTE = (
    f"{SUMMED} Not measured as one: this tool takes no prompts in while other sequences decode, so "
    "the time is the sum of those for the prompts and for the steps."
)


def roofline_share(result: Result, cost: Cost) -> float:
    """The least time that the window allowed ÷ the time taken."""
    return cost.floor_s(result.window.bytes_per_s, result.window.flops_per_s) / result.seconds


def render(
    results: Sequence[Result],
    costs: dict[str, Cost],
    missing: Sequence[Missing],
    baseline: str = "baton",
) -> str:
    """A Markdown table: a row for each cell and engine. Ratios are medians of rounds' ratios.

    `ratio` is `baseline`'s speed over this engine's, in the same rounds: above 1, it is faster. A
    row whose time is a sum of phases has a dagger, which a line below explains.
    """
    lines = [
        "| cell | engine | ms | range | tokens/s | roofline | baton ÷ it | GB/s | GFLOP/s |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in dict.fromkeys(r.cell.name for r in results):
        rows = [r for r in results if r.cell.name == name]
        for engine in dict.fromkeys(r.engine for r in rows):
            own = [r for r in rows if r.engine == engine]
            lines += [_row(own, rows, costs[name], baseline)]
    lines += [f"| all | {gone.name} | not measured: {gone.reason} ||||||| " for gone in missing]
    if any(result.summed for result in results):
        lines += ["", FOOTNOTE]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _row(own: Sequence[Result], rows: Sequence[Result], cost: Cost, baseline: str) -> str:
    cell = own[0].cell
    seconds = sorted(r.seconds for r in own)
    share = median(roofline_share(r, cost) for r in own)
    ratio = speed_ratio(own, [r for r in rows if r.engine == baseline])
    bandwidth = median(r.window.bytes_per_s for r in own) / 1e9
    peak = median(r.window.flops_per_s for r in own) / 1e9
    words = [
        cell.name,
        own[0].engine + (f" {SUMMED}" if own[0].summed else ""),
        milliseconds(median(seconds)),
        f"{milliseconds(seconds[0])}–{milliseconds(seconds[-1])}",
        f"{cell.num_tokens / median(seconds):,.0f}",
        f"{share:.2f}",
        "" if ratio is None or own[0].engine == baseline else f"{ratio:.2f}",
        f"{bandwidth:.0f}",
        f"{peak:.0f}",
    ]
    return "| " + " | ".join(words) + " |"


def speed_ratio(own: Sequence[Result], baseline: Sequence[Result]) -> float | None:
    """How many times as fast `baseline` is: the median over the rounds that both were in."""
    theirs = {r.round: r.seconds for r in baseline}
    ratios = [r.seconds / theirs[r.round] for r in own if r.round in theirs]
    return median(ratios) if ratios else None


def milliseconds(seconds: float) -> str:
    value = 1000 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
