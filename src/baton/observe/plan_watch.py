"""Whether what was assumed in choosing a deployment still holds.

Each reason has a *strain*, measured / allowed: above 1 the assumption is broken. It is called
broken when the strain is above 1 by more than chance explains in so few requests, and whole again
when it is below 1: between the two it stays what it was, so that it does not flap. Nothing is
called anything before `MIN_REQUESTS`.

A role's workers are held to what a plan expects of them: prompt steps of decode workers, which are
what a failure or a preemption leaves, are not judged.

`PlanWatch` is told of requests and errors and owns the last `WINDOW` of them. It knows no clock.
"""

from __future__ import annotations

import enum
import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from baton.config import PlanConfig, parse_deciles
from baton.observe.audit import Stage, StageError
from baton.observe.slo import Slo
from baton.types import Role

WINDOW = 300
"""Requests that are looked at: as many as a plan is made for by default."""
MIN_REQUESTS = 50
LENGTH_SHIFT = 0.2
"""Share of requests that may lie elsewhere between the planned deciles."""
LEAST_ERROR = 0.05
"""A profile that claims to be better than this is not held to it."""
QUIET_S = 86400.0
"""For how long the rate must be low: nights are no news."""


class Reason(enum.StrEnum):
    """Why a plan is stale."""

    RATE_HIGH = "rate_high"
    RATE_LOW = "rate_low"
    PROMPT_LENGTHS = "prompt_lengths"
    OUTPUT_LENGTHS = "output_lengths"
    ATTAINMENT = "attainment"
    STEP_ERROR = "step_error"


NOISE = 2.0
"""Standard deviations above 1 that chance may bring a strain to."""

JUDGED = {
    Stage.PROMPT_STEP: (Role.PREFILL, Role.UNIFIED),
    Stage.DECODE_STEP: (Role.DECODE, Role.UNIFIED),
}
"""Whose steps the plan's errors are of."""


class _Strain(NamedTuple):
    """noise: what a standard deviation of the strain is, times the root of `num_seen`."""

    reason: Reason
    value: float
    num_seen: int
    says: str
    noise: float = 1.0


class Finding(msgspec.Struct, frozen=True):
    """One assumption as it is now. says: measured against planned, as a sentence's middle."""

    reason: Reason
    strain: float
    is_stale: bool
    says: str


class Ended(msgspec.Struct, frozen=True):
    """A request that ended, as far as the plan cares. Durations in seconds."""

    num_prompt_tokens: int
    num_output_tokens: int
    ttft_s: float
    e2e_s: float
    failed: bool = False

    def keeps(self, slo: Slo) -> bool:
        """Gaps between tokens are not known here: limits of them are left out."""
        gaps = self.num_output_tokens - 1
        values: dict[str, float | None] = dict.fromkeys(slo.limits)
        values["ttft"], values["e2e"] = self.ttft_s, self.e2e_s
        values["tpot"] = (self.e2e_s - self.ttft_s) / gaps if gaps > 0 else None
        return not self.failed and not slo.broken_by(values)


class PlanWatch:
    """Compares traffic and errors with a plan. `now`: any clock that does not go back."""

    def __init__(self, plan: PlanConfig) -> None:
        """Raises ConfigError if the plan's promise or lengths cannot be read."""
        self._plan = plan
        self._slo = Slo.parse(plan.slo or "")
        self._prompts = parse_deciles(plan.prompt_tokens, "prompt_tokens")
        self._outputs = parse_deciles(plan.output_tokens, "output_tokens")
        self._arrivals: deque[float] = deque(maxlen=WINDOW)
        self._ended: deque[Ended] = deque(maxlen=WINDOW)
        self._stale: set[Reason] = set()
        self._low_since: float | None = None

    def arrived(self, now: float) -> None:
        """A request was placed."""
        self._arrivals.append(now)

    def ended(self, request: Ended) -> None:
        """A request has ended, well or badly."""
        self._ended.append(request)

    def judge(self, now: float, errors: Sequence[StageError] = ()) -> list[Finding]:
        """Every assumption of which enough is known, as of now, in the order of `Reason`."""
        found = [*self._rates(now), *self._lengths(), *self._promise(), *self._steps(errors)]
        judged = [self._settle(each) for each in found]
        known = {each.reason for each in judged}
        self._stale &= known
        return judged

    def _settle(self, strain: _Strain) -> Finding:
        reason = strain.reason
        if strain.value > 1 + NOISE * strain.noise / math.sqrt(strain.num_seen):
            self._stale.add(reason)
        elif strain.value < 1:
            self._stale.discard(reason)
        return Finding(reason, strain.value, reason in self._stale, strain.says)

    def _rates(self, now: float) -> list[_Strain]:
        plan, count = self._plan, len(self._arrivals)
        span = now - self._arrivals[0] if count else 0.0
        if count < MIN_REQUESTS or span <= 0:
            return []
        rate = (count - 1) / span
        says = f"{rate:.3g} requests/s over the last {count}"
        found = []
        if plan.max_rate:
            limit = f"{says}, planned for up to {plan.max_rate:.3g}"
            found.append(_Strain(Reason.RATE_HIGH, rate / plan.max_rate, count, limit))
        if plan.min_rate:
            strain = plan.min_rate / rate
            if strain <= 1:
                self._low_since = None
            elif self._low_since is None:
                self._low_since = now
            quiet_s = 0.0 if self._low_since is None else now - self._low_since
            lasts = f", less for {quiet_s / 3600:.1f} h" if quiet_s else ""
            limit = f"{says}, planned for {plan.min_rate:.3g} or more{lasts}"
            # Below it for less than a day, it is on the border.
            border = min(strain, 1.0) if quiet_s < QUIET_S else strain
            found.append(_Strain(Reason.RATE_LOW, border, count, limit))
        return found

    def _lengths(self) -> list[_Strain]:
        whole = [each for each in self._ended if not each.failed]
        found = []
        prompts = [each.num_prompt_tokens for each in whole]
        outputs = [each.num_output_tokens for each in whole]
        for reason, of, planned, values in (
            (Reason.PROMPT_LENGTHS, "prompt", self._prompts, prompts),
            (Reason.OUTPUT_LENGTHS, "output", self._outputs, outputs),
        ):
            if planned and len(values) >= MIN_REQUESTS:
                middle = sorted(values)[len(values) // 2]
                says = (
                    f"the median of the last {len(values)} requests is {middle} {of} tokens, "
                    f"planned for {planned[len(planned) // 2]:.6g}"
                )
                strain = shift(planned, values) / LENGTH_SHIFT
                found.append(_Strain(reason, strain, len(values), says))
        return found

    def _promise(self) -> list[_Strain]:
        share, count = self._plan.attainment, len(self._ended)
        if share is None or not self._slo.limits or count < MIN_REQUESTS:
            return []
        kept = sum(each.keeps(self._slo) for each in self._ended) / count
        says = f"{kept:.1%} of the last {count} requests kept {self._slo}, promised {share:.1%}"
        if (foreseen := self._plan.predicted_attainment) is not None:
            says += f", foreseen {foreseen:.1%}"
        # One late request in the window is none too many.
        allowed = max(1 - share, 1 / WINDOW)
        # Of requests that break it with this probability, each on its own.
        noise = math.sqrt((1 - allowed) / allowed)
        return [_Strain(Reason.ATTAINMENT, (1 - kept) / allowed, count, says, noise)]

    def _steps(self, errors: Sequence[StageError]) -> list[_Strain]:
        """The worst worker's, of steps with prompts or without."""
        limits = {
            Stage.PROMPT_STEP: self._plan.prompt_step_error,
            Stage.DECODE_STEP: self._plan.decode_step_error,
        }
        found = []
        for each in errors:
            limit = limits.get(each.stage)
            if limit is None or each.role not in JUDGED[each.stage]:
                continue
            if each.num_recent < MIN_REQUESTS:
                continue
            says = (
                f"{each.stage} on {each.worker} is off by {each.median:.0%} (measured / predicted "
                f"{each.ratio:.2f}), and the profile was off by less than {limit:.0%}"
            )
            strain = each.median / max(limit, LEAST_ERROR)
            found.append(_Strain(Reason.STEP_ERROR, strain, each.num_recent, says))
        return [max(found, key=lambda each: each.value)] if found else []


def shift(deciles: Sequence[float], values: Sequence[float]) -> float:
    """The most by which the share of values up to a decile is not what it was: 0 to 1."""
    worst, count, ordered = 0.0, len(values), sorted(values)
    for number, decile in enumerate(deciles, 1):
        share = number / (len(deciles) + 1)
        below = bisect_left(ordered, decile) / count
        up_to = bisect_right(ordered, decile) / count
        worst = max(worst, below - share, share - up_to)
    return worst
