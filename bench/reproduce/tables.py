"""Interpolation in measured tables: along one axis, and in a grid with holes."""

from __future__ import annotations

import csv
import gzip
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path


def read_rows(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a CSV file, compressed if its name ends in `.gz`."""
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    yield from csv.DictReader(text.splitlines())


class Curve:
    """y over x, straight between the points and on beyond the last two; below the first, the first.

    Raises:
        ValueError: there is no point.
    """

    def __init__(self, points: dict[float, float]) -> None:
        if not points:
            raise ValueError("a curve needs at least one point")
        self.xs = sorted(points)
        self.ys = [points[x] for x in self.xs]

    def __call__(self, x: float) -> float:
        xs, ys = self.xs, self.ys
        if x <= xs[0] or len(xs) == 1:
            return ys[0]
        i = min(bisect_right(xs, x), len(xs) - 1)
        part = (x - xs[i - 1]) / (xs[i] - xs[i - 1])
        return ys[i - 1] + part * (ys[i] - ys[i - 1])


class Grid:
    """Values at the corners of a grid, straight along each axis between them.

    Below an axis' first point that one counts; beyond its last the line of the last two goes on.
    A hole counts as the nearest corner with smaller coordinates that is there.
    """

    def __init__(self, values: dict[tuple[float, ...], float]) -> None:
        if not values:
            raise ValueError("a grid needs at least one corner")
        self._values = values
        self._axes = [sorted({key[i] for key in values}) for i in range(len(next(iter(values))))]

    def __call__(self, *point: float) -> float:
        sides = [_bracket(axis, x) for axis, x in zip(self._axes, point, strict=True)]
        total = 0.0
        for corner in product(*sides):
            weight = math.prod(share for _, share in corner)
            if weight:
                total += weight * self._at([i for i, _ in corner])
        return total

    def _at(self, indices: list[int]) -> float:
        axes = self._axes
        value = self._values.get(tuple(axis[i] for axis, i in zip(axes, indices, strict=True)))
        if value is not None:
            return value
        for steps in range(1, max(map(len, axes))):
            lower = [max(0, i - steps) for i in indices]
            value = self._values.get(tuple(axis[i] for axis, i in zip(axes, lower, strict=True)))
            if value is not None:
                return value
        raise ValueError("the grid has no value at or below this corner")


def _bracket(axis: Sequence[float], x: float) -> list[tuple[int, float]]:
    if x <= axis[0] or len(axis) == 1:
        return [(0, 1.0)]
    i = min(bisect_right(axis, x), len(axis) - 1)
    part = (x - axis[i - 1]) / (axis[i] - axis[i - 1])
    return [(i - 1, 1.0 - part), (i, part)]
