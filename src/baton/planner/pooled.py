"""One fit for many families of measurements that share what they can.

A family alone (one engine, device and model) has few points; all together have one answer for
everybody. In between: each parameter is a common value times a factor for every level that a point
belongs to, such as its device, its engine, its family. Factors are held near one by a prior of
their level, so a family with many points gets its own values and one with few, or none, gets those
of its kind.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import msgspec
import numpy as np
import scipy.optimize

from baton.errors import ConfigError
from baton.planner.calibrate import SOFT, TINY, Array

STEP = 1e-4
"""Of a logarithm, for slopes."""
COMMON = 0.5
"""How far, in logarithms, the common values may easily be from where they start."""


class Point(msgspec.Struct, frozen=True):
    """A measurement. predict: parameters, shape (p,), to the same quantity.

    levels: what it belongs to, each with the name of its kind first.
    """

    measured: float
    levels: tuple[tuple[Hashable, ...], ...]
    predict: Callable[[Array], float]


class Pooled:
    """What was found: parameters for whatever levels a new point has."""

    def __init__(self, common: Array, effects: Mapping[tuple[Hashable, ...], Array]) -> None:
        self._common, self._effects = common, effects

    @property
    def common(self) -> Array:
        """What all share, shape (p,)."""
        return np.exp(self._common)

    def parameters(self, levels: Sequence[tuple[Hashable, ...]]) -> Array:
        """Shape (p,); levels that were not seen change nothing."""
        known = [self._effects[level] for level in levels if level in self._effects]
        return np.exp(self._common + sum(known, np.zeros_like(self._common)))


def fit_pooled(
    points: Sequence[Point], start: Sequence[float], priors: Mapping[Hashable, float]
) -> Pooled:
    """Fit all points at once.

    start: common values to begin at. priors: for each kind of level how far, as a relative error,
    its factors may easily be from one.

    Raises:
        ConfigError: there are no points, or a time is not positive.
    """
    if not points or min(point.measured for point in points) <= 0:
        raise ConfigError("nothing can be fitted: times must be there, and more than zero")
    levels = sorted({level for point in points for level in point.levels}, key=repr)
    place = {level: i + 1 for i, level in enumerate(levels)}
    rows = [np.array([0, *(place[level] for level in point.levels)]) for point in points]
    width, origin = len(start), np.log(np.asarray(start, float))
    logs = np.log([point.measured for point in points])
    weights = np.repeat([1 / COMMON] + [1 / priors[level[0]] for level in levels], width) * SOFT

    def log_of(point: Point, theta: Array) -> float:
        return float(np.log(max(point.predict(np.exp(theta)), TINY)))

    def thetas(x: Array) -> list[Array]:
        effects = x.reshape(-1, width)
        return [origin + effects[row].sum(axis=0) for row in rows]

    def residuals(x: Array) -> Array:
        pairs = zip(points, thetas(x), strict=True)
        predicted = np.array([log_of(point, theta) for point, theta in pairs])
        return np.concatenate([predicted - logs, x * weights])

    def slopes(x: Array) -> Array:
        jacobian = np.zeros((len(points) + len(x), len(x)))
        for i, (point, theta) in enumerate(zip(points, thetas(x), strict=True)):
            here = log_of(point, theta)
            for j in range(width):
                moved = theta.copy()
                moved[j] += STEP
                jacobian[i, rows[i] * width + j] = (log_of(point, moved) - here) / STEP
        np.fill_diagonal(jacobian[len(points) :], weights)
        return jacobian

    found = scipy.optimize.least_squares(
        residuals, np.zeros((len(levels) + 1) * width), jac=slopes, loss="soft_l1", f_scale=SOFT,
        max_nfev=60, xtol=1e-5, ftol=1e-5,
    )  # fmt: skip
    effects = found.x.reshape(-1, width)
    return Pooled(origin + effects[0], {level: effects[i] for level, i in place.items()})
