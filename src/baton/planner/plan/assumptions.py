"""What a plan rests on: the section of its file that `baton serve` compares with what happens."""

from __future__ import annotations

from collections.abc import Sequence

from baton.config import PlanConfig
from baton.core.cost import Profile
from baton.observe.audit import quantile
from baton.planner.plan.certainty import DECODE_KINDS, PROMPT_KINDS
from baton.planner.plan.verdict import Plan
from baton.twin.workload import TraceRequest
from baton.types import Role


def assumptions(
    plan: Plan, window: Sequence[TraceRequest], profile_file: str | None = None
) -> PlanConfig:
    """window: the requests that the twin ran; profile_file: where `profile_of` the plan lies."""
    trial, rate = plan.chosen.trial, plan.traffic.rate
    workers = plan.chosen.candidate.workers
    decode = workers.get(Role.DECODE) or workers[Role.UNIFIED]
    low, high = rate_range(plan)
    return PlanConfig(
        profile_file=profile_file,
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
        prompt_step_error=_error(profile_of(plan), PROMPT_KINDS),
        decode_step_error=_error(decode[0].offer.profile, DECODE_KINDS),
    )


def profile_of(plan: Plan) -> Profile:
    """Of the workers that compute prompts: a deployment that Baton runs has like devices."""
    workers = plan.chosen.candidate.workers
    kind, _ = workers.get(Role.PREFILL) or workers[Role.UNIFIED]
    return kind.offer.profile


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


def _error(profile: Profile, kinds: Sequence[str]) -> float | None:
    """Nine tenths of the held-out errors of the first kind that is known are less."""
    known = {each.kind: each for each in profile.held_out}
    found = next((known[kind] for kind in kinds if kind in known), None)
    return None if found is None else found.p90


def _short(value: float) -> float:
    return float(f"{value:.4g}")
