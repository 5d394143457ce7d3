"""What is compared: models, layouts, workloads and loads; the requests of each; what comes next.

Pure: the same cell at the same rate has the same requests, in every repeat and on both sides.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence

import msgspec

from baton.twin.workload import LogNormal, TraceRequest, bursty, poisson, scale, synthetic

LAYOUTS = ("1U", "1P1D")
LOADS = (40, 70, 90)
REPEATS = 2
MAX_REPEATS = 6
"""Of a noisy cell: three pairs, then it stays noisy."""


class Bursts(msgspec.Struct, frozen=True):
    """Arrivals that come `factor` times as fast for `on_s`, then slower for `off_s`, on average."""

    factor: float
    on_s: float
    off_s: float


class Mix(msgspec.Struct, frozen=True):
    """The requests of a workload: lengths in tokens, and bursts if it has any."""

    prompt: LogNormal
    output: LogNormal
    bursts: Bursts | None = None


MIXES = {
    "chat": Mix(LogNormal(300, 0.7, 1200), LogNormal(64, 0.6, 256)),
    "summarisation": Mix(LogNormal(900, 0.4, 1600), LogNormal(48, 0.5, 160)),
    "code": Mix(LogNormal(500, 0.7, 1500), LogNormal(24, 0.8, 160), Bursts(2.5, 6.0, 14.0)),
}


class Server(msgspec.Struct, frozen=True, order=True):
    """A model (`demo`, or a shape of `big_model`) served in a layout."""

    model: str
    layout: str

    def __str__(self) -> str:
        return f"{self.model}-{self.layout}"


class Cell(msgspec.Struct, frozen=True, order=True):
    """One comparison. load: per cent of what the server can do, see `capacity`."""

    server: Server
    workload: str
    load: int

    def __str__(self) -> str:
        return f"{self.server}-{self.workload}-{self.load}"


CELLS = (
    *(
        Cell(Server("demo", layout), workload, load)
        for layout in LAYOUTS
        for workload in MIXES
        for load in LOADS
    ),
    *(Cell(Server("0.5B", layout), "chat", 70) for layout in LAYOUTS),
)


def requests(
    workload: str, rate: float, seconds: float, seed: str, steady: bool = False
) -> list[TraceRequest]:
    """Requests of a workload, `rate` a second over `seconds`, on average exactly.

    steady: without the workload's bursts.
    """
    mix, rng = MIXES[workload], random.Random(seed)
    bursts = None if steady else mix.bursts
    if bursts is None:
        arrivals = poisson(rate, rng)
    else:
        arrivals = bursty(rate, bursts.factor, bursts.on_s, bursts.off_s, rng)
    count = max(2, round(rate * seconds))
    return scale(synthetic(arrivals, mix.prompt, mix.output, rng, num_requests=count), rate)


def next_cell(
    cells: Sequence[Cell], num_runs: Mapping[Cell, int], noisy: Collection[Cell]
) -> Cell | None:
    """The cell to run next, or None when all is done.

    First every cell once, then every cell again, so that hours lie between two repeats rather
    than seconds. Then two more repeats of those whose last two differ too much.
    """

    def wanted(cell: Cell) -> int:
        done = num_runs.get(cell, 0)
        if done < REPEATS or done % REPEATS:
            return REPEATS * (done // REPEATS + 1)
        return min(done + REPEATS, MAX_REPEATS) if cell in noisy else done

    left = [cell for cell in cells if num_runs.get(cell, 0) < wanted(cell)]
    return min(left, key=lambda cell: num_runs.get(cell, 0), default=None)


def share_cores(num_workers: int, cores: Sequence[int]) -> list[tuple[int, ...]]:
    """Each worker's cores: as many for each, and none that another one has, if there are enough.

    The twin knows no contention, so one core is left to gateway and client where it can be.
    """
    spare = 1 if len(cores) > num_workers else 0
    usable = cores[spare:]
    each = max(1, len(usable) // num_workers)
    return [
        tuple(usable[(i * each + j) % len(usable)] for j in range(each)) for i in range(num_workers)
    ]
