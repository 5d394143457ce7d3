"""How sure a plan is: runs of the twin with cost models that are off as they were found to be.

Each draw takes, for every cost model (a device's, or those of its roles), one ratio measured /
predicted from its held-out errors for steps with prompts and one for steps without, and the twin
runs the trace again on steps that take so many times as long. An error is taken to hold for the
whole run, of all workers with this cost model: those of single steps would cancel out, which a
wrong profile does not.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec

from baton.core.cost import HeldOut, Profile
from baton.planner.plan.kinds import Offer
from baton.planner.plan.trials import Ratios, Trial

PROMPT_KINDS = ("prefill", "step", "ttft", "gemm")
DECODE_KINDS = ("decode", "step", "gemm")


class Certainty(msgspec.Struct, frozen=True):
    """probability: share of draws in which the promise is kept. low, high: attainment in the
    worst and the best tenth of them."""

    probability: float
    num_draws: int
    low: float
    high: float


def draws(offered: Sequence[Offer], count: int, seed: int) -> list[Ratios]:
    """Ratios for each draw; empty if no profile knows its error."""
    known = {
        name: errors
        for offer in offered
        for name, profile in offer.profiles().items()
        if (errors := _errors(profile)) is not None
    }
    rng = random.Random(seed)
    return [
        {
            name: (_between(prompt, rng.random()), _between(decode, rng.random()))
            for name, (prompt, decode) in known.items()
        }
        for _ in range(count if known else 0)
    ]


def certainty(trials: Sequence[Trial], attainment: float) -> Certainty | None:
    """Of the trials of one candidate, one a draw; None of none."""
    if not trials:
        return None
    reached = sorted(each.attainment for each in trials)
    tenth = len(reached) // 10
    kept = sum(each >= attainment for each in reached)
    return Certainty(kept / len(reached), len(reached), reached[tenth], reached[-1 - tenth])


def _errors(profile: Profile) -> tuple[Sequence[float], Sequence[float]] | None:
    prompt, decode = _of(profile, PROMPT_KINDS), _of(profile, DECODE_KINDS)
    if prompt is None or decode is None:
        return None
    return prompt.ratios, decode.ratios


def _of(profile: Profile, kinds: Sequence[str]) -> HeldOut | None:
    with_ratios = {each.kind: each for each in profile.held_out if each.ratios}
    for kind in kinds:
        if kind in with_ratios:
            return with_ratios[kind]
    return next(iter(with_ratios.values()), None)


def _between(quantiles: Sequence[float], place: float) -> float:
    at = place * (len(quantiles) - 1)
    low = int(at)
    high = min(low + 1, len(quantiles) - 1)
    return quantiles[low] + (quantiles[high] - quantiles[low]) * (at - low)
