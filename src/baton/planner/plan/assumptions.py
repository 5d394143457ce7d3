"""What a plan rests on: the section of its file that `baton serve` compares with what happens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from baton.config import PlanConfig
from baton.config.plan import PROFILE_FIELDS
from baton.core.cost import Profile
from baton.observe.audit import quantile
from baton.planner.plan.certainty import DECODE_KINDS, PROMPT_KINDS
from baton.planner.plan.verdict import Plan
from baton.twin.workload import TraceRequest
from baton.types import Role


def assumptions(
    plan: Plan, window: Sequence[TraceRequest], profile_files: Mapping[str, str] | None = None
) -> PlanConfig:
    """window: the requests that the twin ran; profile_files: where `profiles_of` the plan lie."""
    trial, rate = plan.chosen.trial, plan.traffic.rate
    low, high = rate_range(plan)
    assumed = PlanConfig(
        rate=_short(rate),
        min_rate=None if low is None else _short(low),
        max_rate=_short(high),
        prompt_tokens=deciles([each.num_prompt_tokens for each in window]),
        output_tokens=deciles([each.num_output_tokens for each in window]),
        slo=str(plan.wish.slo),
        attainment=plan.wish.attainment,
        predicted_attainment=_short(trial.attainment),
        predicted_ttft_s=_short(trial.ttft_s),
        predicted_tpot_s=_short(trial.tpot_s),
        prompt_step_error=_worst(_of_roles(plan, Role.PREFILL, Role.UNIFIED), PROMPT_KINDS),
        decode_step_error=_worst(_of_roles(plan, Role.DECODE, Role.UNIFIED), DECODE_KINDS),
    )
    return msgspec.structs.replace(assumed, **(profile_files or {}))


def profiles_of(plan: Plan) -> dict[str, Profile]:
    """What the chosen workers' steps cost, by the field of `PlanConfig` that names its file: one
    for all, or one a role where they are not the same."""
    workers = plan.chosen.candidate.workers
    mine = {role: kind.offer.profile_of(role) for role, (kind, _) in workers.items()}
    first = next(iter(mine.values()))
    if all(profile == first for profile in mine.values()):
        return {"profile_file": first}
    return {PROFILE_FIELDS.get(role, "profile_file"): profile for role, profile in mine.items()}


def rate_range(plan: Plan) -> tuple[float | None, float]:
    """Rates, in requests a second, at which the plan no longer is the one to have: downwards, if
    there is such a one, and upwards. It is not known to hold beyond what the twin tried."""
    rate, held = plan.traffic.rate, 1.0
    for factor, holds in plan.headroom:
        if not holds:
            break
        held = factor
    flips = [flip.factor for flip in plan.flips or () if flip.what == "rate"]
    high = min([held, *(factor for factor in flips if factor > 1)])
    low = [factor for factor in flips if factor < 1]
    return (max(low) * rate if low else None), high * rate


def deciles(values: Sequence[int]) -> str:
    """The first to the ninth, as `plan.prompt_tokens` has them."""
    numbers = [float(value) for value in values]
    return " ".join(f"{quantile(numbers, tenth / 10):.6g}" for tenth in range(1, 10))


def _of_roles(plan: Plan, *roles: Role) -> list[Profile]:
    """Of those of these roles that the plan has workers of."""
    workers = plan.chosen.candidate.workers
    return [workers[role][0].offer.profile_of(role) for role in roles if role in workers]


def _worst(profiles: Iterable[Profile], kinds: Sequence[str]) -> float | None:
    """Nine tenths of the held-out errors of each profile, of the first kind that it knows, are
    less."""
    found = []
    for profile in profiles:
        known = {each.kind: each.p90 for each in profile.held_out}
        found += [known[kind] for kind in kinds if kind in known][:1]
    return max(found, default=None)


def _short(value: float) -> float:
    return float(f"{value:.4g}")
