"""What 100 % load is: the requests a second that a server ends while it is offered more.

Requests of the workload are sent evenly (Poisson) at rates that rise by a factor until the queue
grows, that is, until fewer than 85 % of what arrives in the window is ended in it. What is ended a
second then is the capacity. The same search finds the twin's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from baton.observe.results import RequestResult
from baton.twin.workload import TraceRequest
from parts.twin_vs_real.cells import requests
from parts.twin_vs_real.judge import KEPT_UP, throughput

LEAST_S, LEAST_REQUESTS = 20.0, 60
"""Of a window, whichever is longer."""
OVERLOAD = 1.25
MAX_TRIES = 16

Serve = Callable[[Sequence[TraceRequest]], Sequence[RequestResult]]


def find(serve: Serve, workload: str, rate: float, factor: float) -> float | None:
    """Requests a second; None if every rate that was tried was kept up with, or none at all."""
    for _ in range(MAX_TRIES):
        window_s = max(LEAST_S, LEAST_REQUESTS / rate)
        trace = requests(workload, rate, window_s, f"capacity/{workload}", steady=True)
        ended_per_s, kept_up = throughput(serve(trace), window_s)
        if kept_up < KEPT_UP:
            return ended_per_s or None
        rate *= factor
    return None


def of_twin(serve: Serve, workload: str) -> float | None:
    """The same, from no idea of it: a coarse search, and a finer one from what that finds."""
    coarse = find(serve, workload, 0.25, 2.0)
    return None if coarse is None else find(serve, workload, OVERLOAD * coarse, OVERLOAD)
