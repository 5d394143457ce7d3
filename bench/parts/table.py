"""What a part measured, and how it is printed."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec
import numpy as np


class Row(msgspec.Struct, frozen=True):
    """One line: `part` and `case` say what was done, the values are by column, with units."""

    part: str
    case: str
    values: dict[str, float]


class Samples(msgspec.Struct, frozen=True):
    """CPU and wall time of single calls, in microseconds."""

    cpu_us: list[float]
    wall_us: list[float]

    def values(self) -> dict[str, float]:
        return {
            "cpu_p50_us": float(np.median(self.cpu_us)),
            "cpu_p99_us": float(np.percentile(self.cpu_us, 99)),
            "wall_p50_us": float(np.median(self.wall_us)),
        }


def timed(call: Callable[[], object], num_calls: int) -> Samples:
    """Time `num_calls` calls one by one, on this thread's CPU clock and by the wall."""
    cpu, wall = [], []
    for _ in range(num_calls):
        cpu_start, wall_start = time.thread_time(), time.perf_counter()
        call()
        wall.append(1e6 * (time.perf_counter() - wall_start))
        cpu.append(1e6 * (time.thread_time() - cpu_start))
    return Samples(cpu, wall)


def render(rows: list[Row]) -> str:
    """Markdown tables, one for each run of rows with the same part and columns."""
    lines: list[str] = []
    before: tuple[str, ...] = ()
    for row in rows:
        head = (row.part, *row.values)
        if head != before:
            lines += ["", f"| {row.part} | " + " | ".join(row.values) + " |"]
            lines += ["|---" + "|---:" * len(row.values) + "|"]
            before = head
        values = " | ".join(
            f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in row.values.values()
        )
        lines.append(f"| {row.case} | {values} |")
    return "\n".join(lines[1:]) + "\n"
