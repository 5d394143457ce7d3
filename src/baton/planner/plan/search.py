"""All candidates for a traffic, and which of them are worth a run of the twin."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import msgspec

from baton.config.layout import MAX_WORKERS
from baton.core.cost import Link
from baton.errors import ConfigError
from baton.observe.slo import Slo
from baton.planner.plan.bounds import Arithmetic, Prediction
from baton.planner.plan.candidates import Candidate, Style, mixed, split, unified, ways
from baton.planner.plan.kinds import Kind
from baton.types import Role

MORE = 4
"""Counts that are tried of each role, from the least that keeps up."""
NEAREST = 6
"""Candidates that cost less than any that arithmetic believes in, and are run before those."""
SAME_COST = 1.03
"""Within so much of the price, the simpler style is taken."""


class Space(msgspec.Struct, frozen=True):
    """What may be used. codecs: (name, share of the bytes that it leaves)."""

    kinds: tuple[Kind, ...]
    links: tuple[Link, ...] = ()
    codecs: tuple[tuple[str, float], ...] = (("raw", 1.0),)
    max_devices: int = 64

    def candidates(self, arithmetic: Arithmetic) -> Iterator[Candidate]:
        """For the counts around the least that keep up with the traffic."""
        for each in self._all(arithmetic):
            if each.num_devices <= self.max_devices and each.num_workers <= MAX_WORKERS:
                yield each

    def _all(self, arithmetic: Arithmetic) -> Iterator[Candidate]:
        def counts(kind: Kind, role: Role) -> range:
            least = arithmetic.least_workers(kind, role)
            return range(least, least + MORE) if least else range(0)

        first = {kind.key(Role.PREFILL): counts(kind, Role.PREFILL) for kind in self.kinds}
        second = {kind.key(Role.DECODE): counts(kind, Role.DECODE) for kind in self.kinds}
        for kind in self.kinds:
            both = counts(kind, Role.UNIFIED)
            yield from unified(kind, both)
            if both:
                way = ways(kind, kind, self.links, self.codecs)[0]
                yield from mixed(kind, way, max(3, both[0]))
        for prefill in self.kinds:
            for decode in self.kinds:
                if prefill.budget != decode.budget:
                    continue  # a configuration has one token budget
                for way in ways(prefill, decode, self.links, self.codecs):
                    num_first = first[prefill.key(Role.PREFILL)]
                    num_second = second[decode.key(Role.DECODE)]
                    yield from split(prefill, decode, way, num_first, num_second)


class Found(msgspec.Struct, frozen=True):
    """A candidate and what arithmetic says of it."""

    candidate: Candidate
    prediction: Prediction


class Survey(msgspec.Struct, frozen=True):
    """num_candidates: of which `survivors` may hold, the cheapest first."""

    num_candidates: int
    survivors: tuple[Found, ...]
    all: tuple[Found, ...]


def survey(space: Space, arithmetic: Arithmetic, slo: Slo) -> Survey:
    """Predict every candidate."""
    found = [Found(each, arithmetic.predict(each)) for each in space.candidates(arithmetic)]
    survivors = [each for each in found if each.prediction.may_hold(slo)]
    survivors.sort(key=lambda each: (each.candidate.usd_per_hour, _strain(each, slo)))
    return Survey(len(found), tuple(survivors), tuple(found))


def check(survey: Survey, space: Space, arithmetic: Arithmetic, slo: Slo) -> None:
    """Refuse where nothing can hold.

    Raises:
        ConfigError: it says whether devices or limits are at fault, and what would do.
    """
    if not survey.num_candidates:
        least = [
            count * kind.num_devices
            for kind in space.kinds
            if (count := arithmetic.least_workers(kind, Role.UNIFIED))
        ]
        most = f"at least {min(least)}" if least else "more than any layout has"
        raise ConfigError(
            f"this traffic needs {most} devices, and --max-devices is {space.max_devices}: raise "
            "it, lower --rate, or add faster hardware"
        )
    if survey.survivors:
        return
    able = [each.prediction for each in survey.all if math.isfinite(each.prediction.ttft_s)]
    if not able:
        raise ConfigError(
            f"none of {survey.num_candidates:,} layouts keeps up with the traffic: raise "
            "--max-devices, or add faster hardware"
        )
    fastest = {
        "ttft": min(each.least_ttft_s for each in able),
        "tpot": min(each.least_tpot_s for each in able),
        "e2e": min(each.least_e2e_s for each in able),
    }
    wanted = [f"{name}={fastest[name]:.3g}s" for name in slo.limits if name in fastest]
    raise ConfigError(
        f"no layout here can keep --slo {slo}: the fastest, each at its best and without any "
        f"queue, reach {', '.join(wanted)}; raise the limits, or add faster hardware"
    )


def cheapest(survey: Survey, slo: Slo) -> dict[Style, Found]:
    """By arithmetic alone, the cheapest of each style that keeps the limits."""
    best: dict[Style, Found] = {}
    for each in survey.survivors:
        if _strain(each, slo) <= 1 and each.candidate.style not in best:
            best[each.candidate.style] = each
    return best


ORDER = (Style.UNIFIED, Style.SPLIT, Style.MIXED)
"""From the simplest."""


def simplest(usd: dict[Style, float]) -> Style | None:
    """The cheapest style, or a simpler one that costs the same; None of nothing."""
    if not usd:
        return None
    least = min(usd.values())
    return next(style for style in ORDER if usd.get(style, math.inf) <= least * SAME_COST)


def in_order(found: Sequence[Found], slo: Slo, style: Style) -> list[Found]:
    """Those of one style in the order in which they are worth a run.

    The cheapest that arithmetic believes in come first, then those that it doubts: it can be wrong
    either way.
    """
    mine = [each for each in found if each.candidate.style is style]
    believed = [each for each in mine if _strain(each, slo) <= 1]
    doubted = [each for each in mine if _strain(each, slo) > 1]
    if not believed:
        return doubted
    least = believed[0].candidate.usd_per_hour
    below = [each for each in doubted if each.candidate.usd_per_hour < least]
    above = [each for each in doubted if each.candidate.usd_per_hour >= least]
    below.sort(key=lambda each: _strain(each, slo))
    return [*below[:NEAREST], *believed, *above, *below[NEAREST:]]


def _strain(each: Found, slo: Slo) -> float:
    return each.prediction.strain(slo)
