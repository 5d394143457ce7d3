"""A plan in words, rows and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from baton.core.cost import Profile
from baton.observe.slo import duration
from baton.planner.plan.candidates import Candidate, Style
from baton.planner.plan.flips import Flip
from baton.planner.plan.frontier import frontier
from baton.planner.plan.kinds import Offer
from baton.planner.plan.plan_file import needs
from baton.planner.plan.rows import Row
from baton.planner.plan.verdict import Plan
from baton.types import Role

SAYS = {
    Style.UNIFIED: "stay unified",
    Style.SPLIT: "split prefill from decode",
    Style.MIXED: "mix: some workers split, the others do both",
}
COLUMNS = ("candidate", "$/h", "$/M out", "J/token", "TTFT", "TPOT", "attained", "holds")
MAX_RUNNERS_UP = 8


def sentences(plan: Plan) -> Iterator[str]:
    """The verdict and what it rests on, the most important first."""
    chosen, wish = plan.chosen, plan.wish
    promise = f"{wish.slo} for {wish.attainment:.0%} of requests"
    if not plan.holds:
        yield (
            f"Verdict: nothing that was run keeps {promise}; nearest is {chosen.candidate.name} "
            f"with {chosen.trial.attainment:.1%}. Allow more devices, add faster hardware, or "
            "raise the limits."
        )
    else:
        yield f"Verdict: {SAYS[chosen.style]}: {chosen.candidate.name}."
    energy = "" if chosen.joules_per_token is None else f", {chosen.joules_per_token:.3g} J a token"
    yield (
        f"It costs {_usd(chosen.usd_per_hour)} an hour, {_usd(chosen.usd_per_million)} a million "
        f"output tokens at the trace's mean rate{energy}."
    )
    yield (
        f"In the twin {chosen.trial.attainment:.1%} of requests keep {wish.slo}; at "
        f"{wish.attainment:.0%} of them the worst latency is {chosen.trial.strain:.0%} of its "
        f"limit.{_headroom(plan.headroom)}"
    )
    yield _sureness(plan)
    if plan.num_unseen:
        yield (
            f"{plan.num_unseen:,} candidates that might do it for less were not run, as the search "
            "was long enough: give less hardware or fewer links to choose from, or --thorough."
        )
    yield from _comparison(plan)
    if plan.holds:
        yield from _flip_lines(plan)
    if plan.today is not None and plan.holds:
        yield _today(plan.today, plan)
    if (reason := needs(chosen.candidate)) is not None:
        yield f"Baton cannot run this yet: it needs {reason}. baton serve refuses the file with it."


def _headroom(tried: Sequence[tuple[float, bool]]) -> str:
    if not tried:
        return ""
    held = 1.0
    for factor, holds in tried:
        if not holds:
            return f" It still holds at {held:g} times the rate, not at {factor:g} times."
        held = factor
    return f" It still holds at {held:g} times the rate, the most that was tried."


def _sureness(plan: Plan) -> str:
    sure = plan.chosen.certainty
    if sure is None:
        return "How sure that is cannot be told: no profile here knows its held-out error."
    doubt = ""
    if sure.probability < plan.wish.confidence:
        doubt = f" That is less than the {plan.wish.confidence:.0%} asked for, and the most found."
    return (
        f"It holds with probability {sure.probability:.0%}: in so many of {sure.num_draws} runs of "
        "the twin with errors drawn from the profiles' held-out ones (attainment "
        f"{sure.low:.0%} to {sure.high:.0%} in the middle 80 %)." + doubt
    )


def _comparison(plan: Plan) -> Iterator[str]:
    mine = plan.chosen
    for style, row in plan.best.items():
        if style is mine.style:
            continue
        gap = row.usd_per_hour / mine.usd_per_hour - 1
        cost = "the same" if abs(gap) < 0.005 else f"{abs(gap):.0%} {'more' if gap > 0 else 'less'}"
        sure = "" if row.probability is None else f", and holds with {row.probability:.0%}"
        yield f"The best {style.value} one that ran, {row.candidate.name}, costs {cost}{sure}."
    for style in (Style.UNIFIED, Style.SPLIT):
        if plan.holds and style not in plan.best:
            yield f"No {style.value} layout that was run keeps the promise."


def _flip_lines(plan: Plan) -> Iterator[str]:
    if plan.flips is None:
        yield (
            "The arithmetic alone would choose otherwise, so it tells no thresholds of rate, "
            "prompt length or link."
        )
    for flip in [*(plan.flips or ()), *plan.price_flips]:
        yield f"{flip_line(flip)}."
    if plan.flips is not None and not plan.flips and not plan.price_flips:
        yield (
            "Nothing nearby flips it: not 8 times the rate, 4 times the prompts or 32 times the "
            "link's rate, either way."
        )


def flip_line(flip: Flip) -> str:
    """Such as `From 2.3 times the rate on, split wins (the twin agrees)`."""
    names = {"rate": "the rate", "prompt": "the prompt length", "link": "the link's rate"}
    what = names.get(flip.what, f"the {flip.what}")
    reach = "on" if flip.factor > 1 else "down"
    then = f"{flip.to} wins" if flip.to else "nothing holds"
    checked = {None: "", True: " (and holds in the twin)", False: " (but not so in the twin)"}
    return f"From {flip.factor:.2g} times {what} {reach}, {then}{checked[flip.holds]}"


def _today(today: Row, plan: Plan) -> str:
    saved = today.usd_per_hour - plan.chosen.usd_per_hour
    kept = today.trial.attainment >= plan.wish.attainment
    if today.trial.refused:
        return f"Today's {today.candidate.name} cannot serve this trace: {today.trial.refused}."
    does = (
        f"Today's {today.candidate.name} costs {_usd(today.usd_per_hour)} an hour and "
        f"{'keeps' if kept else 'breaks'} the promise ({today.trial.attainment:.1%})"
    )
    if abs(saved) < 0.005:
        return f"{does}; moving costs and saves nothing."
    return f"{does}; moving {'saves' if saved > 0 else 'costs'} {_usd(abs(saved))} an hour."


def runners_up(plan: Plan) -> list[tuple[str, ...]]:
    """Rows of `COLUMNS`: the choice, the best of each style, then the cheapest that keep it."""
    shown = [plan.chosen, *plan.best.values()]
    keeping = [row for row in plan.rows if row.trial.attainment >= plan.wish.attainment]
    shown += sorted(keeping, key=lambda row: row.usd_per_hour)
    shown += sorted(plan.rows, key=lambda row: -row.trial.attainment)[:3]
    unique = {row.candidate.name: row for row in reversed(shown)}
    ordered = list(dict.fromkeys(row.candidate.name for row in shown))
    return [cells(unique[name]) for name in ordered[:MAX_RUNNERS_UP]]


def cells(row: Row) -> tuple[str, ...]:
    trial = row.trial
    late = trial.strain > 1e6
    return (
        row.candidate.name + (" *" if needs(row.candidate) else ""),
        f"{row.usd_per_hour:.2f}",
        f"{row.usd_per_million:.3g}",
        "-" if row.joules_per_token is None else f"{row.joules_per_token:.3g}",
        "-" if late else duration(trial.ttft_s),
        "-" if late else duration(trial.tpot_s),
        f"{trial.attainment:.1%}",
        "-" if row.probability is None else f"{row.probability:.0%}",
    )


def basis(offered: Sequence[Offer]) -> Iterator[str]:
    """Where prices and cost models come from, a line a device, and one a role of its own."""
    for offer in offered:
        price = f"{_usd(offer.usd_per_hour)} a device and hour"
        yield f"{offer.name}: {price}; {_cost_model(offer.profile)}"
        for role, profile in offer.own.items():
            yield f"{offer.name}, {role.value} workers: {_cost_model(profile)}"


def _cost_model(profile: Profile) -> str:
    how = f"{profile.engine}, {profile.model.name}, {profile.date}"
    if not profile.measured:
        how = "a datasheet estimate, nothing measured"
    errors = ", ".join(f"{each.kind} {each.median:.0%}" for each in profile.held_out)
    return f"cost model: {how}" + (f"; held-out median error: {errors}" if errors else "")


def document(plan: Plan, offered: Sequence[Offer]) -> dict[str, object]:
    """Everything, for machines."""
    edge = {id(row) for row in frontier(plan.rows)}
    return {
        "verdict": plan.chosen.style.value if plan.holds else "none",
        "says": list(sentences(plan)),
        "slo": str(plan.wish.slo),
        "attainment": plan.wish.attainment,
        "num_candidates": plan.num_candidates,
        "num_survivors": plan.num_survivors,
        "num_runs": plan.num_runs,
        "num_unseen": plan.num_unseen,
        "traffic": {
            "rate": plan.traffic.rate,
            "mean_rate": plan.traffic.mean_rate,
            "mean_prompt_tokens": plan.traffic.mean_prompt,
            "mean_output_tokens": plan.traffic.mean_output,
        },
        "chosen": _row(plan.chosen),
        "today": None if plan.today is None else _row(plan.today),
        "headroom": [{"rate_factor": factor, "holds": holds} for factor, holds in plan.headroom],
        "flips": [
            {"what": flip.what, "factor": flip.factor, "to": flip.to, "holds_in_twin": flip.holds}
            for flip in [*(plan.flips or ()), *plan.price_flips]
        ],
        "candidates": [{**_row(row), "is_efficient": id(row) in edge} for row in plan.rows],
        "basis": list(basis(offered)),
    }


def _row(row: Row) -> dict[str, object]:
    prediction = row.prediction
    return {
        "name": row.candidate.name,
        "style": row.style.value,
        "layout": str(row.candidate.layout),
        "workers": _workers(row.candidate),
        "usd_per_hour": row.usd_per_hour,
        "usd_per_million_output_tokens": row.usd_per_million,
        "joules_per_output_token": row.joules_per_token,
        "arithmetic": {
            "load": prediction.load,
            "ttft_s": prediction.ttft_s,
            "tpot_s": prediction.tpot_s,
        },
        "twin": msgspec.to_builtins(row.trial),
        "certainty": msgspec.to_builtins(row.certainty),
        "needs": needs(row.candidate),
    }


def _workers(candidate: Candidate) -> list[dict[str, object]]:
    order = (Role.PREFILL, Role.DECODE, Role.UNIFIED)
    return [
        {
            "role": role.value,
            "count": count,
            "device": kind.offer.device.name,
            "tensor": kind.parallel.tensor,
            "pipeline": kind.parallel.pipeline,
            "max_num_batched_tokens": kind.budget,
            "kv_tokens": kind.kv_tokens,
        }
        for role in order
        if role in candidate.workers
        for kind, count in [candidate.workers[role]]
    ]


def _usd(amount: float) -> str:
    return f"${amount:,.2f}" if amount >= 0.1 else f"${amount:.2g}"
