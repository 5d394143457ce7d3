"""A trace as it was read: requests in the order of their arrival, from 0 s on."""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import groupby

import msgspec

from baton.errors import ConfigError
from baton.planner.traces.checks import Place, is_epoch
from baton.twin.workload import TraceRequest

MAX_SPAN_S = 10 * 366 * 86400.0
COARSE = 0.5
"""Times are coarse when so few of them are distinct, as a share of the requests."""
UNSORTED = "--sort"


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """What a reader made of a file.

    has_arrivals: False for sets of lengths, whose requests all stand at 0 s. start_unix_s: when
    it began, if the trace says so (seconds since 1970). tick_s: the step of its clock where that
    is so coarse that many requests share one time, else 0. num_cached_tokens: prompt tokens that
    the server took from its cache, where the trace tells. notes: what the reader left out,
    assumed or found odd, in sentences.
    """

    source: str
    format: str
    requests: list[TraceRequest]
    has_arrivals: bool = True
    start_unix_s: float | None = None
    tick_s: float = 0.0
    num_cached_tokens: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def duration_s(self) -> float:
        """From the first arrival to the last."""
        return self.requests[-1].arrival_s


def finish(
    rows: Iterable[tuple[Place, TraceRequest]],
    *,
    source: str,
    format: str,
    in_order: bool,
    has_arrivals: bool = True,
    num_cached_tokens: int | None = None,
    notes: Iterable[str] = (),
) -> Trace:
    """Order the rows, shift their times to start at 0, and note what is odd.

    in_order: the form promises rising times, so that one that falls is an error; otherwise (logs
    are written when requests end) the rows are sorted.

    Raises:
        ConfigError: no rows, times that fall, or a span beyond all sense.
    """
    requests: list[TraceRequest] = []
    for place, row in rows:
        if in_order and requests and row.arrival_s < requests[-1].arrival_s:
            raise place.wrong(
                f"its time lies {requests[-1].arrival_s - row.arrival_s:.6g} s before that of the "
                f"line above; sort the file by time, or give {UNSORTED}"
            )
        requests.append(row)
    if not requests:
        raise ConfigError(f"{source} holds no requests: give a trace with at least one")
    requests.sort(key=lambda request: request.arrival_s)
    start, end = requests[0].arrival_s, requests[-1].arrival_s
    if end - start > MAX_SPAN_S:
        raise ConfigError(
            f"{source} spans {(end - start) / 86400:,.0f} days: check the unit of its times"
        )
    num_empty = sum(request.num_output_tokens == 0 for request in requests)
    remarks = list(notes)
    if num_empty:
        remarks.append(f"{num_empty:,} requests have no output token; each is counted as one token")
    shifted = [
        msgspec.structs.replace(
            request,
            arrival_s=request.arrival_s - start,
            num_output_tokens=max(1, request.num_output_tokens),
        )
        for request in requests
    ]
    return Trace(
        source=source,
        format=format,
        requests=shifted,
        has_arrivals=has_arrivals,
        start_unix_s=start if has_arrivals and is_epoch(start) else None,
        tick_s=tick([request.arrival_s for request in shifted]) if has_arrivals else 0.0,
        num_cached_tokens=num_cached_tokens,
        notes=tuple(remarks),
    )


def tick(times: list[float]) -> float:
    """The step of a coarse clock, from times in rising order; 0 if the times are fine.

    Coarse means: fewer than half of the times are distinct, and all gaps are multiples of the
    smallest one.
    """
    distinct = sorted(set(times))
    if len(distinct) < 3 or len(distinct) >= COARSE * len(times):
        return 0.0
    gaps = [b - a for a, b in zip(distinct, distinct[1:], strict=False)]
    least = min(gaps)
    steps = [gap / round(gap / least) for gap in gaps]
    step = sorted(steps)[len(steps) // 2]
    is_grid = all(abs(each / step - 1) < 0.01 for each in steps)
    return round(step, 6) if is_grid else 0.0


def spread(trace: Trace, seed: int = 0) -> Trace:
    """The trace with the requests of each tick at random times within it; itself if it is fine.

    Without this, a clock that ticks every 3 s makes bursts that nobody sent. Below a tick the
    traffic is Poisson then, by assumption. The same seed gives the same times.
    """
    if not trace.tick_s:
        return trace
    rng = random.Random(seed)
    spaced: list[TraceRequest] = []
    for time, group in groupby(trace.requests, key=lambda request: request.arrival_s):
        together = list(group)
        offsets = sorted(rng.random() * trace.tick_s for _ in together)
        spaced += [
            msgspec.structs.replace(request, arrival_s=time + offset)
            for request, offset in zip(together, offsets, strict=True)
        ]
    first = spaced[0].arrival_s
    spaced = [
        msgspec.structs.replace(request, arrival_s=request.arrival_s - first) for request in spaced
    ]
    note = (
        f"arrivals are told to {trace.tick_s:g} s; each batch is spread at random over that time, "
        "so that gaps below it are an assumption"
    )
    return msgspec.structs.replace(trace, requests=spaced, tick_s=0.0, notes=(*trace.notes, note))
