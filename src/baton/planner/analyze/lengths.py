"""How long prompts and answers are."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

QUANTILES = (1, 10, 25, 50, 75, 90, 95, 99)
NUM_BINS = 40


class Histogram(msgspec.Struct, frozen=True):
    """Counts between rising edges (one more than counts), which are spaced evenly in logarithm."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


class Lengths(msgspec.Struct, frozen=True):
    """A distribution of lengths in tokens. cv: standard deviation over mean."""

    count: int
    total: int
    mean: float
    cv: float
    min: int
    max: int
    quantiles: dict[str, float]
    histogram: Histogram

    def quantile(self, q: int) -> float:
        return self.quantiles[f"p{q}"]


def lengths(values: Sequence[int]) -> Lengths:
    """Of at least one length, each at least 1."""
    array = np.asarray(values, dtype=np.int64)
    mean = float(array.mean())
    points = np.percentile(array, QUANTILES)
    return Lengths(
        count=len(array),
        total=int(array.sum()),
        mean=mean,
        cv=float(array.std()) / mean,
        min=int(array.min()),
        max=int(array.max()),
        quantiles={f"p{q}": float(point) for q, point in zip(QUANTILES, points, strict=True)},
        histogram=_histogram(array),
    )


def _histogram(array: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Histogram:
    low, high = int(array.min()), int(array.max()) + 1
    # Whole numbers: edges below a distance of 1 would leave holes among short lengths.
    edges = np.unique(np.round(np.geomspace(low, high, NUM_BINS + 1)))
    counts, _ = np.histogram(array, edges)
    return Histogram(tuple(map(float, edges)), tuple(map(int, counts)))
