"""What the twin is given to serve: requests with their times and lengths.

A workload is a list of `TraceRequest`, read from a trace or made up here: arrival times (`poisson`,
`gamma`, `bursty`) and lengths (`Fixed`, `Uniform`, `LogNormal`, `Among`), drawn from one seeded
generator, so that the same seed gives the same requests.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Protocol

import msgspec

from baton.errors import ConfigError


class TraceRequest(msgspec.Struct, frozen=True):
    """One request of a trace. Times in seconds from the start of the trace.

    blocks: ids of the prompt's full blocks of `block_size` tokens, equal id = equal prefix up to
    there; block_size 0: no sharing is known. session: turns of one conversation. kind: workload
    class, such as chat. ttft_s, tpot_s, e2e_s: measured, where the trace has them.
    """

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    id: str = ""
    blocks: tuple[int, ...] = ()
    block_size: int = 0
    session: str = ""
    kind: str = ""
    tenant: str = ""
    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None


def check_trace(trace: Sequence[TraceRequest], name: str = "the trace") -> None:
    """Refuse what cannot be served in any deployment.

    Raises:
        ConfigError: it says which request, and what to change.
    """
    if not trace:
        raise ConfigError(f"{name} is empty: give at least one request")
    before = 0.0
    for number, request in enumerate(trace, 1):
        where = f"request {number} of {name}"
        if not (math.isfinite(request.arrival_s) and request.arrival_s >= 0):
            raise ConfigError(
                f"{where} arrives at {request.arrival_s} s: count from the start of the trace, "
                "from 0 on"
            )
        if request.arrival_s < before:
            raise ConfigError(
                f"{where} arrives at {request.arrival_s:g} s, before the one that stands before "
                f"it ({before:g} s): sort the trace by arrival"
            )
        before = request.arrival_s
        for what, count in (
            ("prompt", request.num_prompt_tokens),
            ("output", request.num_output_tokens),
        ):
            if count < 1:
                raise ConfigError(
                    f"{where} has {count} {what} tokens: every request needs at least 1, leave "
                    "such rows out"
                )
        if request.blocks and request.block_size < 1:
            raise ConfigError(f"{where} has blocks, but block_size {request.block_size}: set it")


# Arrivals -------------------------------------------------------------------------------------


def poisson(rate: float, rng: random.Random) -> Iterator[float]:
    """Endless arrival times from 0 on, `rate` a second, exponential gaps.

    Raises:
        ConfigError: the rate is not above 0.
    """
    return gamma(rate, 1.0, rng)


def gamma(rate: float, cv: float, rng: random.Random) -> Iterator[float]:
    """Gaps of mean 1/rate from a gamma distribution whose coefficient of variation is `cv`.

    Above 1 is burstier than Poisson, below 1 is more regular.

    Raises:
        ConfigError: rate or cv is not above 0.
    """
    _check_above_zero("the arrival rate", rate)
    _check_above_zero("the variation of gaps", cv)
    shape = 1 / cv**2
    return _gaps(lambda: rng.gammavariate(shape, 1 / (rate * shape)))


def bursty(
    rate: float, factor: float, on_s: float, off_s: float, rng: random.Random
) -> Iterator[float]:
    """Poisson arrivals of mean `rate` that come `factor` times as fast in bursts.

    Bursts last `on_s` and the pauses between them `off_s` on average, both exponential; the rate
    in the pauses is what is left over.

    Raises:
        ConfigError: a figure is not above 0, or bursts alone would exceed the rate.
    """
    _check_above_zero("the arrival rate", rate)
    for what, value in (("the factor", factor), ("on_s", on_s), ("off_s", off_s)):
        _check_above_zero(f"{what} of bursts", value)
    share = on_s / (on_s + off_s)
    if factor * share > 1:
        raise ConfigError(
            f"bursts of {factor:g} times the rate for {share:.0%} of the time are more than all "
            f"arrivals: lower the factor to {1 / share:.3g}, or make bursts shorter"
        )
    return _bursts(rate * factor, rate * (1 - factor * share) / (1 - share), on_s, off_s, rng)


def _bursts(
    fast: float, slow: float, on_s: float, off_s: float, rng: random.Random
) -> Iterator[float]:
    now, end, is_on = 0.0, rng.expovariate(1 / off_s), False
    while True:
        rate = fast if is_on else slow
        gap = rng.expovariate(rate) if rate > 0 else math.inf
        if now + gap < end:
            now += gap
            yield now
        else:  # exponential gaps remember nothing: go on from the border
            now, is_on = end, not is_on
            end += rng.expovariate(1 / (on_s if is_on else off_s))


def _gaps(draw: _Draw) -> Iterator[float]:
    now = 0.0
    while True:
        yield now
        now += draw()


class _Draw(Protocol):
    def __call__(self) -> float: ...


# Lengths --------------------------------------------------------------------------------------


class Lengths(Protocol):
    """A distribution of lengths in tokens, at least 1."""

    def draw(self, rng: random.Random) -> int: ...


class Fixed(msgspec.Struct, frozen=True):
    num_tokens: int

    def draw(self, rng: random.Random) -> int:
        return self.num_tokens


class Uniform(msgspec.Struct, frozen=True):
    low: int
    high: int

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


class LogNormal(msgspec.Struct, frozen=True):
    """`sigma` of the logarithm; cut off at `longest`."""

    median: float
    sigma: float
    longest: int

    def draw(self, rng: random.Random) -> int:
        drawn = self.median * math.exp(rng.gauss(0.0, self.sigma))
        return min(self.longest, max(1, round(drawn)))


class Among(msgspec.Struct, frozen=True):
    """One of the lengths that were seen."""

    seen: tuple[int, ...]

    def draw(self, rng: random.Random) -> int:
        return rng.choice(self.seen)


def synthetic(
    arrivals: Iterator[float],
    prompt: Lengths,
    output: Lengths,
    rng: random.Random,
    *,
    num_requests: int | None = None,
    duration_s: float | None = None,
) -> list[TraceRequest]:
    """Requests at these times until `num_requests` or `duration_s`, whichever comes first.

    Raises:
        ConfigError: neither is given.
    """
    if num_requests is None and duration_s is None:
        raise ConfigError("a made-up workload needs an end: give num_requests or duration_s")
    trace: list[TraceRequest] = []
    for arrival_s in arrivals:
        if len(trace) == num_requests or (duration_s is not None and arrival_s > duration_s):
            break
        trace.append(TraceRequest(arrival_s, prompt.draw(rng), output.draw(rng)))
    return trace


def scale(trace: Sequence[TraceRequest], rate: float) -> list[TraceRequest]:
    """The same requests, so many times as fast that `rate` arrive a second on average.

    Raises:
        ConfigError: the rate is not above 0, or the trace has no duration to scale.
    """
    _check_above_zero("the arrival rate", rate)
    span = trace[-1].arrival_s - trace[0].arrival_s if trace else 0.0
    if span <= 0:
        raise ConfigError("the trace has no duration that a rate could scale: leave the rate out")
    factor = (len(trace) - 1) / span / rate
    first = trace[0].arrival_s
    return [
        msgspec.structs.replace(each, arrival_s=(each.arrival_s - first) * factor) for each in trace
    ]


def _check_above_zero(what: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{what} is {value:g}: give a number above 0")
