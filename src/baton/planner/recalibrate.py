"""Profiles brought in line with the steps that a running deployment told of.

Steps of real traffic do not span what a profile does: they tell how far off it is where they were,
and little of long contexts or large batches. So the whole profile is made slower or faster first,
and then fitted to them with every coefficient held near where it is.

Workers of one role are like each other, and those of another one may be unlike them: other cores,
another device. So each role has a fit of its own, to what its own workers told of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime

import msgspec

from baton.core.cost import Coefficients, HeldOut, ModelShape, Profile, StepCost
from baton.core.step_cost import MeasuredStep, Parallel
from baton.observe.audit import quantile
from baton.planner.calibrate import Observation, cross_validate, fit_steps
from baton.types import Role

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
    """ratio: median of measured / predicted, by the profile as it was. before: its error then, the
    median of |measured / predicted - 1|."""

    profile: Profile
    num_steps: int
    ratio: float
    before: float

    def says(self, whose: str) -> str:
        """A sentence without its stop. whose: such as `prefill workers`."""
        after = self.profile.error("step")
        held = "" if after is None else f"; held-out now {after.median:.0%}, p90 {after.p90:.0%}"
        return (
            f"{self.num_steps} measured steps of {whose} took {self.ratio:.2f} times as long as "
            f"predicted (median error {self.before:.0%}); their cost model is recalibrated{held}"
        )


class RoleProfiles(msgspec.Struct, frozen=True):
    """by_role: of each role that was asked for. together: by the device of those profiles, one for
    workers of any other role. notes: sentences without their stops."""

    by_role: dict[Role, Profile]
    together: dict[str, Profile]
    notes: list[str]


def recalibrate_roles(
    bases: Mapping[Role, Profile],
    steps: Mapping[Role, Sequence[MeasuredStep]],
    model: ModelShape | None = None,
) -> RoleProfiles:
    """Recalibrate what each role's steps were thought to cost, by the steps of its own workers.

    Where these are too few, the role has what the steps of all workers with the same base ask for,
    or the base as it is.
    """
    by_role: dict[Role, Profile] = {}
    together: dict[str, Profile] = {}
    notes: list[str] = []
    for base in _distinct(bases.values()):
        roles = [role for role, profile in bases.items() if profile == base]
        fits = {role: recalibrate(base, steps.get(role, ()), model) for role in roles}
        if len(roles) == 1:
            whole = fits[roles[0]]
        else:
            whole = recalibrate(base, [each for r in roles for each in steps.get(r, ())], model)
        for role, fit in fits.items():
            if fit is not None:
                by_role[role] = fit.profile
                notes.append(fit.says(f"{role.value} workers"))
                continue
            by_role[role] = base if whole is None else whole.profile
            then = "is as it was" if whole is None else "is that of all workers together"
            notes.append(
                f"{len(steps.get(role, ()))} measured steps of {role.value} workers are too few "
                f"to recalibrate with ({MIN_STEPS} are not): their cost model {then}"
            )
        if whole is not None and None in fits.values():
            notes.append(whole.says("all these workers"))
        if base.device in together:
            like = next(r for r, profile in bases.items() if profile.device == base.device)
            notes.append(
                f"unified workers on {base.device} are taken to cost what {like.value} ones do"
            )
        else:
            together[base.device] = base if whole is None else whole.profile
    return RoleProfiles(by_role, together, notes)


def _distinct(profiles: Iterable[Profile]) -> list[Profile]:
    found: list[Profile] = []
    for profile in profiles:
        if profile not in found:
            found.append(profile)
    return found


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
