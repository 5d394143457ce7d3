"""Service-level objectives of a request: `ttft=2s,tpot=40ms,itl_p99=60ms`."""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from baton.errors import ConfigError

METRICS = ("ttft", "tpot", "e2e", "itl_p50", "itl_p90", "itl_p99", "itl_max")
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


class Slo(msgspec.Struct, frozen=True):
    """Upper limits in seconds by metric; a request must keep all of them. None: all are kept."""

    limits: dict[str, float] = {}

    @classmethod
    def parse(cls, text: str) -> Slo:
        """Read `metric=limit,…`, each limit with its unit (us, ms, s).

        Raises:
            ConfigError: it states the grammar.
        """
        limits: dict[str, float] = {}
        for item in filter(None, (part.strip() for part in text.split(","))):
            match = re.fullmatch(r"(\w+)\s*=\s*(\d+(?:\.\d+)?)\s*(us|ms|s)", item)
            if not match or match[1] not in METRICS or match[1] in limits:
                raise ConfigError(
                    f"--slo {item!r}: write METRIC=LIMIT with a unit (us, ms, s), each metric "
                    f"once, such as ttft=2s,tpot=40ms; metrics are {', '.join(METRICS)}"
                )
            limits[match[1]] = float(match[2]) * _UNITS[match[3]]
        return cls(limits)

    def broken_by(self, values: Mapping[str, float | None]) -> list[str]:
        """The metrics over their limit; one that is undefined for this request breaks nothing."""
        return [
            name
            for name, limit in self.limits.items()
            if (value := values[name]) is not None and value > limit
        ]

    def __str__(self) -> str:
        return ",".join(f"{name}={duration(limit)}" for name, limit in self.limits.items())


def duration(seconds: float) -> str:
    """For people: `312us`, `41.2ms`, `2.05s`."""
    for unit, scale in (("us", 1e-6), ("ms", 1e-3)):
        if seconds < 999.5 * scale:  # above it, three digits would round to 1e+03
            return f"{seconds / scale:.3g}{unit}"
    return f"{seconds:.3g}s" if seconds < 100 else f"{seconds:.0f}s"
