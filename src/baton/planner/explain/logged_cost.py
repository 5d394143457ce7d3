"""What a step costs, from the steps that were logged.

    step = fixed + tokens x a + sequences x b + KV tokens read x c + query-key pairs x d

First one fit for all workers, then one for each, held near the common one where a worker's own
steps do not determine it: a decode worker has computed few prompts, and is asked what one would
take. The fit goes by what is usual, so that a few wild steps do not bend it; then it is scaled to
the total of all steps, since the wild ones take their time too. Where workers are on unlike
hardware, give a profile instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec
import numpy as np

from baton.core.cost import HeldOut, StepShape
from baton.errors import ConfigError
from baton.planner.calibrate import TINY, Array, Observation, cross_validate, minimise

MIN_STEPS = 24
MAX_STEPS = 2000
"""Of one worker: those of a long log are thinned out evenly."""
WEAK, NEAR = 3.0, 0.3
"""How far, as a relative error, coefficients may easily be from a guess, and from all workers'."""


class LoggedCost(msgspec.Struct, frozen=True):
    """A `CostModel`. Seconds a step, token, sequence, token of KV read, and query-key pair."""

    fixed_s: float
    token_s: float
    sequence_s: float
    kv_token_s: float
    pair_s: float

    def step_s(self, shape: StepShape) -> float:
        return (
            self.fixed_s
            + self.token_s * shape.num_tokens
            + self.sequence_s * shape.num_seqs
            + self.kv_token_s * shape.kv_tokens
            + self.pair_s * shape.attention_pairs
        )


def fit_logged(
    steps: Mapping[str, Sequence[Observation]],
) -> dict[str, tuple[LoggedCost, HeldOut | None]]:
    """By worker: what its steps cost, and the error on its steps that the fit had not seen.

    Raises:
        ConfigError: too few steps were logged.
    """
    thin = {name: _thinned(each) for name, each in steps.items()}
    everyone = [step for each in thin.values() for step in each]
    if len(everyone) < MIN_STEPS:
        raise ConfigError(
            f"{len(everyone)} logged steps are too few to tell what a step costs: give --profile"
        )
    common = _fit(everyone, _guess(everyone), WEAK)
    found: dict[str, tuple[LoggedCost, HeldOut | None]] = {}
    for name, own in thin.items():
        if len(own) < MIN_STEPS:
            found[name] = (_cost(common), None)
            continue
        errors = cross_validate(own, _predictor(common))
        found[name] = (_cost(_fit(own, common, NEAR)), errors[0] if errors else None)
    return found


def _predictor(
    common: Array,
) -> Callable[[Sequence[Observation]], Callable[[Observation], float]]:
    def fit(seen: Sequence[Observation]) -> Callable[[Observation], float]:
        cost = _cost(_fit(seen, common, NEAR))
        return lambda step: cost.step_s(step.shape)

    return fit


def _fit(steps: Sequence[Observation], start: Array, prior: float) -> Array:
    sides = _sides(steps)
    measured = np.array([step.seconds for step in steps])
    found = minimise(lambda each: sides @ each, measured, list(start), [prior] * len(start))
    return np.asarray(found * measured.sum() / (sides @ found).sum(), float)


def _guess(steps: Sequence[Observation]) -> Array:
    """As if each cause took as long as any other, in a usual step."""
    usual = np.median(_sides(steps), axis=0)
    seconds = float(np.median([step.seconds for step in steps]))
    return np.asarray(seconds / len(usual) / np.maximum(usual, 1.0), float)


def _sides(steps: Sequence[Observation]) -> Array:
    shapes = [step.shape for step in steps]
    return np.array(
        [(1, s.num_tokens, s.num_seqs, s.kv_tokens, s.attention_pairs) for s in shapes], float
    )


def _cost(values: Array) -> LoggedCost:
    return LoggedCost(*(float(value) if value > TINY else 0.0 for value in values))


def _thinned(steps: Sequence[Observation]) -> Sequence[Observation]:
    return steps[:: -(-len(steps) // MAX_STEPS) or 1]
