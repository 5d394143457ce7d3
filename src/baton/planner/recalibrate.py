"""A profile brought in line with the steps that a running deployment told of.

Steps of real traffic do not span what a profile does: they tell how far off it is where they were,
and little of long contexts or large batches. So the whole profile is made slower or faster first,
and then fitted to them with every coefficient held near where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import msgspec

from baton.core.cost import Coefficients, HeldOut, ModelShape, Profile, StepCost
from baton.core.step_cost import MeasuredStep, Parallel
from baton.observe.audit import quantile
from baton.planner.calibrate import Observation, cross_validate, fit_steps

MIN_STEPS = 40
MAX_STEPS = 400
"""More take longer, and tell no more."""
HELD = 0.3
"""How far, as a relative error, a coefficient may easily be from where it was."""
FREE = (
    "flops_per_s",
    "weight_bytes_per_s",
    "attention_flops_per_s",
    "kv_bytes_per_s",
    "step_s",
    "sequence_s",
)


class Recalibrated(msgspec.Struct, frozen=True):
    """ratio: median of measured / predicted, by the profile as it was. before: its error then."""

    profile: Profile
    num_steps: int
    ratio: float
    before: float

    @property
    def says(self) -> str:
        """A sentence."""
        after = self.profile.error("step")
        held = "" if after is None else f"; held-out now {after.median:.0%}, p90 {after.p90:.0%}"
        return (
            f"{self.num_steps} measured steps took {self.ratio:.2f} times as long as predicted "
            f"(median error {self.before:.0%}); the cost model is recalibrated{held}"
        )


def recalibrate(
    profile: Profile, steps: Sequence[MeasuredStep], model: ModelShape | None = None
) -> Recalibrated | None:
    """The profile that these steps of `model` (the profile's own) ask for, with the error that it
    has on those which its fit did not see; None if there are too few."""
    if len(steps) < MIN_STEPS:
        return None
    every = -(-len(steps) // MAX_STEPS)
    observed = [
        Observation(each.shape, each.elapsed_s, _kind(each), each.shape, model or profile.model)
        for each in steps[::every]
    ]
    cost = profile.cost(model)
    ratios = [each.seconds / cost.step_s(each.shape) for each in observed]
    start = slower(profile.coefficients, quantile(ratios, 0.5))
    prior: dict[str, float | None] = {name: HELD for name in FREE if getattr(start, name) > 0}

    def predictor(seen: Sequence[Observation]) -> Callable[[Observation], float]:
        rates = fit_steps(seen, start, prior)
        fitted = StepCost(model or profile.model, rates, Parallel())
        return lambda step: fitted.step_s(step.shape)

    held: tuple[HeldOut, ...] = tuple(cross_validate(observed, predictor))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    fitted = msgspec.structs.replace(
        profile,
        coefficients=fit_steps(observed, start, prior),
        held_out=held,
        date=now,
        notes=f"Recalibrated with {len(observed)} steps of a deployment. {profile.notes}".strip(),
    )
    before = quantile([abs(ratio - 1) for ratio in ratios], 0.5)
    return Recalibrated(fitted, len(observed), quantile(ratios, 0.5), before)


def slower(rates: Coefficients, ratio: float) -> Coefficients:
    """Every step takes so many times as long."""
    changed = {
        name: value / ratio if name.endswith("_per_s") else value * ratio
        for name, value in msgspec.structs.asdict(rates).items()
        if name.endswith("_s") and value is not None
    }
    return msgspec.structs.replace(rates, **changed)


def _kind(step: MeasuredStep) -> str:
    return "prefill" if step.shape.has_prompt else "decode"
