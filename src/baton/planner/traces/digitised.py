"""Curves read off published figures, such as the Azure week of May 2024, and requests drawn from them.

    <name>_rate_7days_digitised.csv               hour_from_start,req_per_min_low,req_per_min,…
    <name>_input_tokens_cdf_digitised.csv         tokens,cdf_percent
    <name>_output_tokens_cdf_digitised.csv        the same, of outputs

The rate file is given; the other two must lie beside it (gzipped, if it is). Arrivals are Poisson
with the curve's rate, thinned by one factor to `MAX_REQUESTS`, so that the week's shape stays and its
height does not; lengths are drawn from the curves, independently of each other, which the real ones
are not. The same seed draws the same requests.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from baton.errors import ConfigError
from baton.planner.traces.checks import Place
from baton.planner.traces.source import Source
from baton.planner.traces.trace import Trace, finish
from baton.twin.workload import TraceRequest

NAME = "digitised"
RATE_COLUMNS = ("hour_from_start", "req_per_min")
MAX_REQUESTS = 50_000
_RATE = "_rate_"


def read(source: Source, *, seed: int = 0) -> Trace:
    """Draw requests from the curves.

    Raises:
        ConfigError: a file is missing or holds what it should not.
    """
    curve = _rate_curve(source)
    stem = source.file.name.partition(_RATE)[0]
    inputs = _Quantiles(_beside(source.file, f"{stem}_input_tokens_cdf_digitised.csv"))
    outputs = _Quantiles(_beside(source.file, f"{stem}_output_tokens_cdf_digitised.csv"))
    total = sum((b - a) * rate for (a, rate), (b, _) in pairwise(curve))
    if total <= 0:
        raise ConfigError(f"{source} has no request in it: every req_per_min is 0")
    keep = min(1.0, MAX_REQUESTS / total)
    rng = random.Random(seed)

    def rows() -> Iterator[tuple[Place, TraceRequest]]:
        for line, at_s in enumerate(_arrivals(curve, keep, rng), 1):
            request = TraceRequest(
                at_s, max(1, inputs.draw(rng)), max(1, outputs.draw(rng)), kind=stem
            )
            yield Place(str(source), line), request

    note = f"drawn from curves read off figures, {keep:.3g} of all requests; no trace of single ones"
    return finish(rows(), source=str(source), format=NAME, in_order=True, notes=(note,))


def _rate_curve(source: Source) -> list[tuple[float, float]]:
    """(start in seconds, requests per second until the next start), the last one repeated."""
    curve: list[tuple[float, float]] = []
    for line, row in source.records():
        place = Place(str(source), line)
        start = 3600 * place.number(row["hour_from_start"], "hour_from_start")
        rate = place.number(row["req_per_min"], "req_per_min") / 60
        if rate < 0:
            raise place.wrong("req_per_min is negative")
        if curve and start <= curve[-1][0]:
            raise place.wrong("hour_from_start does not rise")
        curve.append((start, rate))
    if len(curve) < 2:
        raise ConfigError(f"{source} has fewer than two points of a curve")
    return curve


def _arrivals(
    curve: list[tuple[float, float]], keep: float, rng: random.Random
) -> Iterator[float]:
    """A Poisson process with the curve's rate, piece by piece (gaps have no memory)."""
    for (start, rate), (end, _) in pairwise(curve):
        now = start
        while rate > 0:
            now += rng.expovariate(rate * keep)
            if now >= end:
                break
            yield now


def _beside(file: Path, name: str) -> Source:
    for candidate in (file.with_name(name), file.with_name(name + ".gz")):
        if candidate.exists():
            return Source(candidate)
    raise ConfigError(f"{file} needs {name} beside it")


class _Quantiles:
    """An inverse distribution function, linear between its points."""

    def __init__(self, source: Source) -> None:
        self._shares: list[float] = []
        self._tokens: list[float] = []
        for line, row in source.records():
            place = Place(str(source), line)
            share = place.number(row.get("cdf_percent"), "cdf_percent") / 100
            tokens = place.tokens(round(place.number(row.get("tokens"), "tokens")), "tokens")
            if self._shares and (share < self._shares[-1] or tokens < self._tokens[-1]):
                raise place.wrong("a distribution function cannot fall")
            self._shares.append(share)
            self._tokens.append(tokens)
        if not self._shares:
            raise ConfigError(f"{source} has no points")

    def draw(self, rng: random.Random) -> int:
        share = rng.random()
        i = bisect_left(self._shares, share)
        if i == 0:
            return round(self._tokens[0])
        if i == len(self._shares):
            return round(self._tokens[-1])
        low, high = self._shares[i - 1], self._shares[i]
        part = (share - low) / (high - low) if high > low else 0.0
        return round(self._tokens[i - 1] + part * (self._tokens[i] - self._tokens[i - 1]))
