"""What would flip a verdict: the least change of traffic, link or price after which another wins.

Rate, prompt length and link come from the arithmetic, by bisection, over all candidates for each
changed traffic; where the arithmetic does not share the verdict as things are, it has no thresholds
to tell. Each threshold is then put to the twin. Prices are exact, from what the twin decided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import msgspec

from baton.core.cost import Link
from baton.observe.slo import Slo
from baton.planner.plan.bounds import Arithmetic
from baton.planner.plan.candidates import Candidate, Style
from baton.planner.plan.search import Found, Space, cheapest, simplest, survey
from baton.planner.plan.traffic import Traffic

STEPS = 4
"""Of bisection, within one factor of 2."""
REACH = {"rate": 3, "prompt": 2, "link": 5}
"""Factors of 2 that are looked at, each way."""
BEYOND = 1.1
"""How far past a threshold the twin is asked."""
MOST_LOOKS = 2 + sum(2 * (reach + STEPS + 1) for reach in REACH.values())
"""At all candidates under changed conditions, if every threshold is at the end of its reach."""


class Flip(msgspec.Struct, frozen=True):
    """factor: of what is changed (for a price: of the device's). to: which style wins then; empty
    if none can do it. holds: whether the twin lets that winner keep the promise just beyond."""

    what: str
    factor: float
    to: str
    candidate: Candidate | None = None
    holds: bool | None = None


class Change(msgspec.Struct, frozen=True):
    what: str
    factor: float


def thresholds(
    space: Space, traffic: Traffic, slo: Slo, attainment: float, style: Style,
    tell: Callable[[], None] = lambda: None,
) -> list[Flip] | None:  # fmt: skip
    """The nearest flips of each kind, either way; None if arithmetic has another verdict."""

    def winner(change: Change) -> tuple[Style | None, dict[Style, Found]]:
        tell()
        best = _best(space, traffic, slo, attainment, change)
        usd = {each: found.candidate.usd_per_hour for each, found in best.items()}
        return simplest(usd), best

    if winner(Change("", 1.0))[0] is not style:
        return None
    found = []
    for what, reach in REACH.items():
        ways = (0.5, 2.0)
        if what == "link" and not space.links:
            space = msgspec.structs.replace(space, links=(_usual(space),))
            if winner(Change("link", 1.0))[0] is not style:
                continue
        for way in ways:
            flip = _threshold(what, way, reach, style, winner)
            if flip is not None:
                found.append(flip)
    return found


def _threshold(
    what: str, way: float, reach: int, style: Style,
    winner: Callable[[Change], tuple[Style | None, dict[Style, Found]]],
) -> Flip | None:  # fmt: skip
    near = 1.0
    for step in range(1, reach + 1):
        far = way**step
        if winner(Change(what, far))[0] is not style:
            break
        near = far
    else:
        return None
    for _ in range(STEPS):
        middle = math.sqrt(near * far)
        if winner(Change(what, middle))[0] is style:
            near = middle
        else:
            far = middle
    other, best = winner(Change(what, far * (BEYOND if way > 1 else 1 / BEYOND)))
    if other is None or other is style:
        return Flip(what, far, "" if other is None else other.value)
    return Flip(what, far, other.value, best[other].candidate)


def _best(
    space: Space, traffic: Traffic, slo: Slo, attainment: float, change: Change
) -> dict[Style, Found]:
    if change.what == "rate":
        traffic = traffic.changed(rate=change.factor)
    elif change.what == "prompt":
        traffic = traffic.changed(prompt=change.factor)
    elif change.what == "link":
        links = tuple(slower(each, change.factor) for each in space.links)
        space = msgspec.structs.replace(space, links=links)
    # What grows with the traffic must have room to grow.
    space = msgspec.structs.replace(space, max_devices=space.max_devices * 2)
    return cheapest(survey(space, Arithmetic(traffic, attainment), slo), slo)


def slower(link: Link, factor: float) -> Link:
    return msgspec.structs.replace(link, bytes_per_s=link.bytes_per_s * factor)


def _usual(space: Space) -> Link:
    """The slowest network of the devices."""
    networks = [kind.offer.device.network_bytes_per_s for kind in space.kinds]
    return Link(min((each for each in networks if each), default=1.25e9), 20e-6)


def price_flips(chosen: Candidate, others: Sequence[Candidate]) -> Iterator[Flip]:
    """For each device, the nearest price at which one of the others costs less."""
    for device, count in sorted(chosen.devices().items()):
        best: Flip | None = None
        for other in others:
            flip = _price_flip(chosen, other, device, count)
            if flip is not None and (best is None or flip.factor < best.factor):
                best = flip
        if best is not None:
            yield best


def _price_flip(chosen: Candidate, other: Candidate, device: str, count: int) -> Flip | None:
    more = count - other.devices()[device]
    usd = next(
        kind.offer.usd_per_hour for kind, _ in chosen.workers.values() if kind.offer.name == device
    )
    gap = other.usd_per_hour - chosen.usd_per_hour
    if more <= 0 or gap < 0:
        return None
    return Flip(f"price of {device}", 1 + gap / (more * usd), other.style.value, other)
