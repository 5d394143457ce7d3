"""From measured times to coefficients, by least squares in relative error, with held-out error.

Every coefficient is positive and may be off by factors, so what is solved for is its logarithm,
and what is made small is the logarithm of predicted / measured: the relative error to first order,
the same for a step of a millisecond and one of a second. A few wild points bend the fit little
(`soft_l1`). Where data determine a coefficient badly, a prior holds it near a known value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence

import msgspec
import numpy as np
import scipy.optimize
from numpy.typing import NDArray

from baton.core.cost import Coefficients, HeldOut, ModelShape, Parallel, StepCost, StepShape
from baton.errors import ConfigError

Array = NDArray[np.float64]

NUM_QUANTILES = 41
SOFT = 0.1
"""Relative errors beyond this count less than their square."""
TINY = 1e-12


class Observation(msgspec.Struct, frozen=True):
    """A step that was measured. group: observations alike enough to be held out together."""

    shape: StepShape
    seconds: float
    kind: str = "step"
    group: Hashable = ()
    model: ModelShape | None = None
    parallel: Parallel = Parallel()


def minimise(
    predict: Callable[[Array], Array],
    measured: Array,
    start: Sequence[float],
    prior: Sequence[float | None] = (),
) -> Array:
    """Positive parameters that predict best.

    predict: parameters, shape (p,), to times, shape (n,). prior: for each parameter how far, as a
    relative error, it may easily be from `start`; None for as far as it likes.

    Raises:
        ConfigError: nothing was measured, or a time is not positive.
    """
    if not len(measured) or not np.all(np.isfinite(measured)) or np.min(measured) <= 0:
        raise ConfigError("nothing can be fitted: times must be there, finite and more than zero")
    origin = np.log(np.maximum(np.asarray(start, float), TINY))
    held = [(i, 1 / sigma) for i, sigma in enumerate(prior) if sigma is not None]
    # Beside n points the prior weighs as one observation with its own error.
    index, weight = np.array([i for i, _ in held], int), np.array([w for _, w in held]) * SOFT

    def residuals(logs: Array) -> Array:
        ratios = np.log(np.maximum(predict(np.exp(logs)), TINY) / measured)
        return np.concatenate([ratios, (logs[index] - origin[index]) * weight])

    found = scipy.optimize.least_squares(
        residuals, origin, loss="soft_l1", f_scale=SOFT, bounds=(origin - 9, origin + 9)
    )
    return np.asarray(np.exp(found.x), float)


def fit_steps(
    observations: Sequence[Observation],
    start: Coefficients,
    prior: Mapping[str, float | None],
    model: ModelShape | None = None,
) -> Coefficients:
    """Fit the coefficients that `prior` names; the others stay as in `start`.

    model: of observations that name none.

    Raises:
        ConfigError: as in `minimise`.
    """
    names = list(prior)
    worlds: dict[tuple[ModelShape, Parallel], list[int]] = {}
    for i, each in enumerate(observations):
        shape = each.model or model
        assert shape is not None, "neither the observation nor the call names a model"
        worlds.setdefault((shape, each.parallel), []).append(i)

    def predict(values: Array) -> Array:
        rates = replace(start, names, values)
        times = np.empty(len(observations))
        for (shape, parallel), members in worlds.items():
            cost = StepCost(shape, rates, parallel)
            for i in members:
                times[i] = cost.step_s(observations[i].shape)
        return times

    measured = np.array([each.seconds for each in observations])
    begin = [float(getattr(start, name)) for name in names]
    return replace(start, names, minimise(predict, measured, begin, [prior[n] for n in names]))


def replace(rates: Coefficients, names: Sequence[str], values: Array) -> Coefficients:
    """`rates` with some coefficients set."""
    changes = {name: float(value) for name, value in zip(names, values, strict=True)}
    return msgspec.structs.replace(rates, **changes)


def cross_validate(
    observations: Sequence[Observation],
    fit: Callable[[Sequence[Observation]], Callable[[Observation], float]],
    num_folds: int = 5,
) -> list[HeldOut]:
    """The error on groups that the fit did not see: of each kind, and of all (`step`).

    fit: observations to a function that predicts the seconds of one. Which group is in which fold
    follows from a hash of its name, never from what was measured.
    """
    ratios: dict[str, list[float]] = {"step": []}
    for fold in range(num_folds):
        seen = [each for each in observations if _fold(each.group, num_folds) != fold]
        held = [each for each in observations if _fold(each.group, num_folds) == fold]
        if not seen or not held:
            continue
        predict = fit(seen)
        for each in held:
            ratio = each.seconds / predict(each)
            ratios["step"].append(ratio)
            if each.kind != "step":
                ratios.setdefault(each.kind, []).append(ratio)
    return [held_out(kind, values) for kind, values in ratios.items() if values]


def held_out(kind: str, ratios: Sequence[float]) -> HeldOut:
    """Summarise measured / predicted."""
    values = np.asarray(ratios, float)
    errors = np.abs(values - 1)
    quantiles = np.quantile(values, np.linspace(0, 1, NUM_QUANTILES))
    return HeldOut(
        kind,
        len(values),
        round(float(np.median(errors)), 4),
        round(float(np.quantile(errors, 0.9)), 4),
        tuple(round(float(value), 4) for value in quantiles),
    )


def hash_fraction(name: Hashable) -> float:
    """A number in [0, 1) that depends on the name alone; for splits that look at no answers."""
    return int.from_bytes(hashlib.sha256(repr(name).encode()).digest()[:6]) / 2**48


def _fold(group: Hashable, num_folds: int) -> int:
    return int(hash_fraction(group) * num_folds)
