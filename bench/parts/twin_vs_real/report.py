"""What came out, as Markdown tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec

from parts.twin_vs_real.book import Replayed
from parts.twin_vs_real.cells import Cell, Server
from parts.twin_vs_real.judge import FIGURES, Compared, Run, Verdict, verdict


class Row(msgspec.Struct, frozen=True):
    """A cell whose repeats are there, beside the twin."""

    cell: Cell
    pair: tuple[Run, Run]
    compared: list[Compared]

    @property
    def verdict(self) -> Verdict:
        return verdict(self.pair, self.compared)


WORDS: dict[Verdict, str] = {
    "within": "within",
    "off": "**off**",
    "again": "to be run again",
    "failed": "requests failed",
}


def errors_table(rows: Sequence[Row], num_runs: Mapping[Cell, int]) -> str:
    """One line a cell: the twin's error of each figure, and how much is allowed."""
    lines = ["The twin's error, in brackets what is allowed (! is noise: to be run again):\n"]
    names = " | ".join(FIGURES)
    lines += [f"| cell | req/s | requests | runs | {names} | |"]
    lines += ["|---|---:|---:|---:" + "|---:" * len(FIGURES) + "|---|"]
    for row in rows:
        by_name = {each.name: each for each in row.compared}
        shown = [_error(by_name.get(name)) for name in FIGURES]
        first = row.pair[0]
        words = [str(row.cell), f"{first.rate:.3g}", str(len(first.requests))]
        words += [str(num_runs[row.cell]), *shown, WORDS[row.verdict]]
        lines.append("| " + " | ".join(words) + " |")
    return "\n".join(lines) + "\n"


def _error(compared: Compared | None) -> str:
    if compared is None:
        return "?"
    mark = "!" if compared.is_noisy else ""
    return f"{compared.error:+.1%} ({compared.allowed:.0%}{mark})"


def times_table(rows: Sequence[Row]) -> str:
    """One line a figure: both repeats and the twin, in ms."""
    lines = ["Milliseconds, both repeats and the twin:\n"]
    lines += ["| cell | figure | first | second | spread | twin | error |"]
    lines += ["|---|---|---:|---:|---:|---:|---:|"]
    for row in rows:
        for each in row.compared:
            times = [f"{1000 * each.first:.4g}", f"{1000 * each.second:.4g}"]
            times += [f"{each.spread:.1%}", f"{1000 * each.twin:.4g}", f"{each.error:+.1%}"]
            lines.append("| " + " | ".join([str(row.cell), each.name, *times]) + " |")
        for number, run in enumerate(row.pair, 1):
            if run.failures:
                lines.append(f"| {row.cell} | failed in repeat {number} | {run.failures} |")
    return "\n".join(lines) + "\n"


def capacity_table(
    real: Mapping[tuple[Server, str], float], twin: Mapping[tuple[Server, str], float | None]
) -> str:
    lines = [
        "100 % load: requests a second that the server ends while it is offered more, its client "
        "on the same machine; the twin's by the same search:\n"
    ]
    lines += ["| server | workload | real | twin | |", "|---|---|---:|---:|---:|"]
    for (server, workload), per_s in real.items():
        found = twin.get((server, workload))
        both = ["?", ""] if found is None else [f"{found:.3g}", f"{found / per_s - 1:+.1%}"]
        words = [str(server), workload, f"{per_s:.3g}", *both]
        lines.append("| " + " | ".join(words) + " |")
    return "\n".join(lines) + "\n"


def replay_table(replayed: Sequence[Replayed]) -> str:
    """Every log that was replayed, and their sum."""
    lines = ["Replayed with the measured step times:\n"]
    lines += ["| server | cells | process | inputs | decisions | differ |"]
    lines += ["|---|---:|---|---:|---:|---:|"]
    for start in replayed:
        for each in start.reports:
            counts = f"{each.num_records:,} | {each.num_decisions:,} | {each.num_differences:,}"
            lines.append(f"| {start.server} | {len(start.cells)} | {each.source} | {counts} |")
    reports = [each for start in replayed for each in start.reports]
    decisions = sum(each.num_decisions for each in reports)
    lines.append(f"\n{num_differing(replayed):,} of {decisions:,} decisions differ.")
    return "\n".join(lines) + "\n"


def num_differing(replayed: Sequence[Replayed]) -> int:
    return sum(each.num_differences for start in replayed for each in start.reports)


def total(rows: Sequence[Row], num_cells: int) -> str:
    counts = Counter(row.verdict for row in rows)
    parts = [f"{counts['within']} of {num_cells} cells within"]
    parts += [f"{counts[each]} {WORDS[each].strip('*')}" for each in ("off", "again", "failed")]
    parts.append(f"{num_cells - len(rows)} not measured twice")
    errors = [abs(each.error) for row in rows for each in row.compared]
    if errors:
        median = sorted(errors)[len(errors) // 2]
        parts.append(f"median error {median:.1%}, largest {max(errors):.1%}")
    return ", ".join(parts) + ".\n"
