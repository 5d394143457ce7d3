"""Deployments that may be chosen: unified, split and mixed ones, each with its counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from enum import Enum

import msgspec

from baton.config import Layout
from baton.core.cost import Link
from baton.planner.plan.kinds import Kind
from baton.types import Role


class Style(Enum):
    UNIFIED = "unified"
    SPLIT = "split"
    MIXED = "mixed"


class Way(msgspec.Struct, frozen=True):
    """How KV passes from prefill to decode workers.

    codec: raw, or a lossy one; wire_share: what it leaves of a block's bytes.
    """

    link: Link
    codec: str = "raw"
    wire_share: float = 1.0

    @property
    def name(self) -> str:
        rate = f"{self.link.bytes_per_s * 8e-9:.3g} Gbit/s"
        return rate if self.codec == "raw" else f"{rate}, {self.codec}"

    def transfer_s(self, num_bytes: float) -> float:
        """Seconds of a handoff that has the link to itself."""
        return self.link.latency_s + num_bytes * self.wire_share / self.link.bytes_per_s


class Candidate(msgspec.Struct, frozen=True):
    """Workers by role: (kind, how many). `way` is None where nothing is handed off."""

    workers: dict[Role, tuple[Kind, int]]
    way: Way | None = None

    @property
    def style(self) -> Style:
        if Role.UNIFIED not in self.workers:
            return Style.SPLIT
        return Style.MIXED if len(self.workers) > 1 else Style.UNIFIED

    @property
    def layout(self) -> Layout:
        return Layout(**{role.value: count for role, (_, count) in self.workers.items()})

    @property
    def num_workers(self) -> int:
        return sum(count for _, count in self.workers.values())

    @property
    def num_devices(self) -> int:
        return sum(count * kind.num_devices for kind, count in self.workers.values())

    def devices(self) -> Counter[str]:
        """By name."""
        found: Counter[str] = Counter()
        for kind, count in self.workers.values():
            found[kind.offer.name] += count * kind.num_devices
        return found

    @property
    def usd_per_hour(self) -> float:
        return sum(count * kind.usd_per_hour for kind, count in self.workers.values())

    @property
    def budget(self) -> int:
        return max(kind.budget for kind, _ in self.workers.values())

    @property
    def name(self) -> str:
        """Such as `1P2D H100 > L40S TP2, 8192 tokens, 100 Gbit/s`."""
        names = list(dict.fromkeys(kind.name for kind, _ in self.workers.values()))
        parts = [f"{self.layout} {' > '.join(names)}", f"{self.budget} tokens"]
        return ", ".join(parts if self.way is None else [*parts, self.way.name])


def unified(kind: Kind, counts: range) -> Iterator[Candidate]:
    for count in counts:
        yield Candidate({Role.UNIFIED: (kind, count)})


def split(
    prefill: Kind, decode: Kind, way: Way, num_prefill: range, num_decode: range
) -> Iterator[Candidate]:
    for first in num_prefill:
        for second in num_decode:
            yield Candidate({Role.PREFILL: (prefill, first), Role.DECODE: (decode, second)}, way)


def mixed(kind: Kind, way: Way, count: int) -> Iterator[Candidate]:
    """Some of `count` like workers do both, the others are split; in steps where they are many."""
    step = max(1, count // 4)
    for both in range(1, count - 1, step):
        for first in range(1, count - both, step):
            workers = {
                Role.PREFILL: (kind, first),
                Role.DECODE: (kind, count - both - first),
                Role.UNIFIED: (kind, both),
            }
            yield Candidate(workers, way)


def ways(
    prefill: Kind, decode: Kind, links: Sequence[Link], codecs: Sequence[tuple[str, float]]
) -> list[Way]:
    """Links that are given, else the slower of the two devices' networks."""
    own = min(
        each.offer.device.network_bytes_per_s * each.num_devices for each in (prefill, decode)
    )
    between = list(links) or [Link(own or 1.25e9, 20e-6)]
    return [Way(link, codec, share) for link in between for codec, share in codecs]
