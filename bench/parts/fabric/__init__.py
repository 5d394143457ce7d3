"""What a part of the fabric's measurements gives back, and how parts take their times.

A part is a module here with `measure(rounds) -> list[Row]`; it raises `Missing` where what it
needs is not there.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable

import msgspec
import numpy as np

_COMPARE = {"≥": operator.ge, "≤": operator.le}


class Row(msgspec.Struct, frozen=True):
    """One figure. target: "" or as "≥ 0.8", in `unit`. note: the conditions, ranges included."""

    name: str
    value: float
    unit: str = ""
    target: str = ""
    note: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether the value meets the target; None without one."""
        if not self.target:
            return None
        sign, bound = self.target.split()
        return bool(_COMPARE[sign](self.value, float(bound)))


class Missing(Exception):
    """The part cannot be measured here; the message says what is not there."""


def interleaved(
    cases: dict[str, Callable[[], object]], rounds: int
) -> dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """Wall seconds of every case in every round, [rounds]; a round before them is not counted.

    The cases take turns within a round, and each round begins with another one: the machine's
    drift, and what a case leaves in the caches for the next, are shared fairly.
    """
    taken: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    for turn in range(rounds + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            cases[name]()
            taken[name].append(time.perf_counter() - started)
    return {name: np.array(seconds[1:]) for name, seconds in taken.items()}


def middle(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[float, str]:
    """The median, and the range in words."""
    return float(np.median(values)), f"{values.min():.3g} to {values.max():.3g}"
