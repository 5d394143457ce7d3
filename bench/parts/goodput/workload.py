"""The workload file, and the arrivals made from it."""

from __future__ import annotations

import math
import random
from pathlib import Path

import msgspec
import yaml

from baton.cli.load.workload import Arrival, Range, poisson
from baton.errors import ConfigError
from baton.observe.slo import Slo

GROUP = 5


class RequestClass(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`of_five` of every five requests; lengths are tokens, `N` or `LOW-HIGH`."""

    of_five: int
    prompt_tokens: str
    output_tokens: int


class Bursty(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Arrivals in the first `share` of each period only, so many times as dense."""

    rate: float
    period_s: float
    share: float


class Tail(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Streams that run while long prompts arrive, one every `every_s` from `start_s` on."""

    streams: int
    prompt_tokens: int
    output_tokens: int
    prompts: int
    long_tokens: int
    start_s: float
    every_s: float


class Workload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file; `objectives` hold an SLO by class, as `baton bench --slo` takes it."""

    classes: dict[str, RequestClass]
    attainment: float
    objectives: dict[str, dict[str, str]]
    rates: list[float]
    first_rate: float
    min_requests: int
    window_s: float
    timeout_s: float
    bursty: Bursty
    tail: Tail
    budgets: dict[str, list[int]]

    def slo(self, objective: str, name: str) -> Slo:
        return Slo.parse(self.objectives[objective][name])


def load_workload(file: Path) -> Workload:
    """Raises: ConfigError: what does not fit together."""
    try:
        found = msgspec.convert(yaml.safe_load(file.read_text()), Workload)
    except (msgspec.ValidationError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: {error}") from None
    if sum(c.of_five for c in found.classes.values()) != GROUP:
        raise ConfigError(f"{file}: the classes' of_five do not add up to {GROUP}")
    for objective, limits in found.objectives.items():
        if set(limits) != set(found.classes):
            raise ConfigError(f"{file}: objective {objective} must name every class once")
        for name in limits:
            found.slo(objective, name)
    if found.first_rate not in found.rates or found.rates != sorted(found.rates):
        raise ConfigError(f"{file}: rates must rise, and first_rate be one of them")
    return found


class Planned(msgspec.Struct, frozen=True):
    """One request and the class that it is judged by."""

    name: str
    arrival: Arrival


def num_requests(workload: Workload, rate: float) -> int:
    """Enough for `window_s`, at least `min_requests`, and whole groups of five."""
    wanted = max(workload.min_requests, rate * workload.window_s)
    return GROUP * math.ceil(wanted / GROUP)


def mixed(workload: Workload, rate: float, seed: str, bursty: bool = False) -> list[Planned]:
    """Arrivals at `rate`. The same seed gives the same lengths and, scaled, the same times."""
    rng = random.Random(seed)
    count = num_requests(workload, rate)
    names: list[str] = []
    while len(names) < count:
        group = [name for name, c in workload.classes.items() for _ in range(c.of_five)]
        rng.shuffle(group)
        names += group
    planned = []
    for name, at_s in zip(names, poisson(rate, rng), strict=False):
        found = workload.classes[name]
        num_prompt = Range.parse(found.prompt_tokens, "prompt_tokens").draw(rng)
        when = squeeze(at_s, workload.bursty) if bursty else at_s
        planned.append(Planned(name, Arrival(when, num_prompt, found.output_tokens)))
    return planned


def squeeze(at_s: float, bursty: Bursty) -> float:
    """Move a time into the first `share` of its period; order is kept."""
    start = at_s // bursty.period_s * bursty.period_s
    return start + (at_s - start) * bursty.share


def tail(workload: Workload) -> list[Planned]:
    """The streams at once, then the long prompts; classes `stream` and `prompt`."""
    t = workload.tail
    stream = Planned("stream", Arrival(0.0, t.prompt_tokens, t.output_tokens))
    prompts = [
        Planned("prompt", Arrival(t.start_s + i * t.every_s, t.long_tokens, 16))
        for i in range(t.prompts)
    ]
    return [stream] * t.streams + prompts
