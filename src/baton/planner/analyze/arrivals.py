"""When requests come: rate, burstiness, and the shape of the day."""

from __future__ import annotations

import math

import msgspec
import numpy as np

from baton.planner.traces import Trace

MIN_DAY_S = 6 * 3600.0
"""Below this, a trace says nothing about the day."""
MAX_POINTS = 360
DAY_S = 86400.0

Array = np.ndarray[tuple[int], np.dtype[np.float64]]


class Arrivals(msgspec.Struct, frozen=True):
    """Rates are requests per second.

    cv: standard deviation of the gaps between arrivals over their mean; 1 is Poisson.
    dispersion_1s, _60s: variance over mean of the counts in windows of that length, 1 for Poisson
    (the index of dispersion). peak_1s, peak_60s: the highest rate in one window. Windows are
    counted from the first arrival; the last, incomplete one is left out where others are there.
    series: the rate in equal windows of `series_s` seconds over the whole trace.
    by_hour: mean rate in each hour of the day, UTC if `hours_are_utc`, else counted from the
    start; empty where the trace is shorter than six hours. None in it: the trace misses that hour.
    """

    duration_s: float
    rate_per_s: float
    per_day: float
    cv: float
    dispersion_1s: float
    dispersion_60s: float
    peak_1s: float
    peak_60s: float
    peak_over_mean_60s: float
    empty_minutes: float
    series_s: float
    series: tuple[float, ...]
    by_hour: tuple[float | None, ...]
    hours_are_utc: bool
    hour_peak_over_mean: float | None
    kind: str

    @property
    def is_bursty(self) -> bool:
        return self.kind != "steady"


def arrivals(trace: Trace) -> Arrivals | None:
    """None where the trace has no times, or a single one."""
    duration = trace.duration_s if trace.has_arrivals else 0.0
    if duration <= 0:
        return None
    times = np.asarray([request.arrival_s for request in trace.requests])
    rate = len(times) / duration
    seconds, minutes = _counts(times, 1.0, duration), _counts(times, 60.0, duration)
    gaps = np.diff(times)
    cv = float(gaps.std() / gaps.mean())
    width = max(1.0, math.ceil(duration / MAX_POINTS))
    hours = _by_hour(times, duration, trace.start_unix_s)
    known = [value for value in hours if value is not None]
    mean_hour = sum(known) / len(known) if known else 0.0
    dispersion = _dispersion(minutes)
    return Arrivals(
        duration_s=duration,
        rate_per_s=rate,
        per_day=rate * DAY_S,
        cv=cv,
        dispersion_1s=_dispersion(seconds),
        dispersion_60s=dispersion,
        peak_1s=float(seconds.max()),
        peak_60s=float(minutes.max()) / min(60.0, duration),
        peak_over_mean_60s=float(minutes.max()) / min(60.0, duration) / rate,
        empty_minutes=float((minutes == 0).mean()),
        series_s=width,
        series=tuple(float(count) / width for count in _counts(times, width, duration)),
        by_hour=hours,
        hours_are_utc=trace.start_unix_s is not None,
        hour_peak_over_mean=max(known) / mean_hour if mean_hour else None,
        kind="steady" if cv < 1.3 else "bursty" if cv < 3 else "very bursty",
    )


def _counts(times: Array, width: float, duration: float) -> Array:
    """Arrivals in each whole window; in the one that there is, if none is whole."""
    num_windows = max(1, int(duration / width))
    index = (times / width).astype(np.int64)
    counts = np.bincount(index, minlength=num_windows)[:num_windows]
    return counts.astype(np.float64)


def _dispersion(counts: Array) -> float:
    return float(counts.var() / counts.mean()) if len(counts) > 1 and counts.mean() > 0 else 1.0


def _by_hour(times: Array, duration: float, start: float | None) -> tuple[float | None, ...]:
    """Mean rate by hour of the day; the seconds that the trace spends in each hour are counted."""
    if duration < MIN_DAY_S:
        return ()
    offset = (start or 0.0) % DAY_S
    hits = np.bincount(((times + offset) % DAY_S // 3600).astype(np.int64), minlength=24)
    spent = np.zeros(24)
    now, end = offset, offset + duration
    while now < end:
        until = min(end, (now // 3600 + 1) * 3600)
        spent[int(now % DAY_S // 3600)] += until - now
        now = until
    return tuple(
        float(count) / seconds if seconds > 60 else None
        for count, seconds in zip(hits[:24], spent.tolist(), strict=True)
    )
