"""The verdict: arithmetic leaves out, the twin decides, and errors are drawn to see if it holds.

survey ─▶ survivors of each style run in the twin, those that keep the promise again under drawn
          errors, until the cheapest that is sure is known (`hunt`) ─▶ the choice
       ─▶ head-room, flips, today's deployment
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from baton.errors import ConfigError
from baton.planner.plan.bounds import Arithmetic
from baton.planner.plan.candidates import Candidate, Style
from baton.planner.plan.drawing import Drawing, by_probability
from baton.planner.plan.flips import BEYOND, MOST_LOOKS, Flip, price_flips, thresholds
from baton.planner.plan.hunt import Hunt
from baton.planner.plan.rows import Asked, Bar, Row, Tell, Wish
from baton.planner.plan.search import ORDER, SAME_COST, Space, Survey, check, simplest, survey
from baton.planner.plan.traffic import Traffic, busiest, rate_of
from baton.planner.plan.trials import Bench, Question
from baton.twin.workload import TraceRequest, check_trace, scale

FIRST_RUNS = 60
"""Runs of the twin in which each style may look for something that is sure, before all that could
cost less is run."""
MAX_RUNS = 600
"""Of a style, draws included: so long is looked for what is cheaper."""
LAST_RUNS = 60
"""Of a style that cannot win: the best of it is told beside the choice."""
HEADROOM = (1.1, 1.25, 1.5, 2.0, 3.0)


class Plan(msgspec.Struct, frozen=True):
    """flips is None where the arithmetic does not share the twin's verdict. headroom: multiples of
    the rate and whether the choice still keeps the promise. rows: all that ran. num_unseen: what
    might have cost less, and was not run because `MAX_RUNS` were over."""

    wish: Wish
    traffic: Traffic
    num_candidates: int
    num_survivors: int
    num_runs: int
    chosen: Row
    holds: bool
    best: dict[Style, Row]
    rows: list[Row]
    headroom: list[tuple[float, bool]]
    flips: list[Flip] | None
    price_flips: list[Flip]
    today: Row | None = None
    num_unseen: int = 0


def plan(
    trace: Sequence[TraceRequest], space: Space, wish: Wish, *, num_processes: int = 1,
    today: Candidate | None = None, tell: Tell = lambda stage, done, total: None,
) -> Plan:  # fmt: skip
    """Find the deployment for a trace.

    Raises:
        ConfigError: the trace is empty or has no rate, no limit is given, or nothing can hold.
    """
    check_trace(trace)
    if not wish.slo.limits:
        raise ConfigError("a plan needs a promise to keep: give --slo such as ttft=2s,tpot=50ms")
    window = busiest(trace, wish.num_requests)
    traffic = Traffic.of(window, rate_of(trace))
    arithmetic = Arithmetic(traffic, wish.attainment)
    tell("predicting candidates", 0, 1)
    seen = survey(space, arithmetic, wish.slo)
    check(seen, space, arithmetic, wish.slo)
    tell("predicting candidates", 1, 1)
    bench = Bench(wish.slo, wish.attainment, num_processes)
    bench.traces[""] = window
    asked = Asked(bench, wish, traffic, arithmetic)
    hunts = _search(asked, seen, space, tell)
    chosen, holds, best = _choose(asked, hunts)
    rows = [row for hunt in hunts for row in hunt.rows]
    others = [row.candidate for style, row in best.items() if style is not chosen.style]
    others += [row.candidate for row in rows if asked.keeps(row) and row.style is not chosen.style]
    headroom = _headroom(asked, chosen.candidate, window, tell) if holds else []
    flips = _flips(asked, space, chosen.style, window, tell) if holds else []
    compared = None if today is None else asked.rows([today])[0]
    return Plan(
        wish,
        traffic,
        seen.num_candidates,
        len(seen.survivors),
        bench.num_runs,
        chosen,
        holds,
        best,
        rows,
        headroom,
        flips,
        list(price_flips(chosen.candidate, others)) if holds else [],
        compared,
        sum(hunt.num_left(_limit_usd(hunts)) for hunt in hunts),
    )


def _search(asked: Asked, seen: Survey, space: Space, tell: Tell) -> list[Hunt]:
    """What each style has to offer: first something that is sure, then whatever might win, then
    what else might be the best of a style that has lost."""
    considered = seen.all if asked.wish.thorough else seen.survivors
    offered = list({kind.offer.device.name: kind.offer for kind in space.kinds}.values())
    bar = Bar(tell, "running candidates in the twin", len(considered))
    drawing = Drawing(asked, offered, bar)
    hunts = [Hunt(style, considered, asked, drawing, bar) for style in ORDER]
    for turn, most in enumerate((FIRST_RUNS, MAX_RUNS, LAST_RUNS)):
        for hunt in hunts:
            begun = asked.bench.num_runs
            while asked.wish.thorough or asked.bench.num_runs - begun < most:
                limit = _limit_usd(hunts) if turn == 1 else math.inf
                if (turn == 0 and hunt.best) or (turn == 2 and not hunt.best):
                    break
                if not hunt.run(limit):
                    break
                bar.left(sum(min(most, each.num_left(limit)) for each in hunts))
    bar.left(0)
    return hunts


def _limit_usd(hunts: Sequence[Hunt]) -> float:
    """What costs more cannot win."""
    return SAME_COST * min(hunt.usd_per_hour for hunt in hunts)


def _choose(asked: Asked, hunts: Sequence[Hunt]) -> tuple[Row, bool, dict[Style, Row]]:
    """(the choice, whether it keeps the promise, the best of each style)."""
    sure = {hunt.style: hunt.best for hunt in hunts if hunt.best is not None}
    offered = {hunt.style: hunt.surest(decides=not sure) for hunt in hunts}
    best = {style: row for style, row in offered.items() if row is not None}
    if sure:
        winner = simplest({style: row.usd_per_hour for style, row in sure.items()})
        assert winner is not None  # there are some
        return sure[winner], True, best
    if best:
        return min(best.values(), key=by_probability), True, best
    # Nothing keeps it: the nearest is told as such.
    rows = [row for hunt in hunts for row in hunt.rows]
    return min(rows, key=lambda row: (-row.trial.attainment, *row.cost)), False, {}


def _headroom(
    asked: Asked, candidate: Candidate, window: Sequence[TraceRequest], tell: Tell
) -> list[tuple[float, bool]]:
    bench, rate = asked.bench, rate_of(window)
    bar = Bar(tell, "looking for head-room", len(HEADROOM))
    for factor in HEADROOM:
        bench.traces[f"x{factor:g}"] = scale(window, rate * factor)
    trials = bench.ask([Question(candidate, f"x{factor:g}") for factor in HEADROOM], bar.ran)
    kept = [trial.attainment >= asked.wish.attainment for trial in trials]
    return list(zip(HEADROOM, kept, strict=True))


def _flips(
    asked: Asked, space: Space, style: Style, window: Sequence[TraceRequest], tell: Tell
) -> list[Flip] | None:
    wish = asked.wish
    bar = Bar(tell, "looking for what would flip it", MOST_LOOKS)
    found = thresholds(space, asked.traffic, wish.slo, wish.attainment, style, bar.ran)
    questions: list[Question] = []
    asking: list[int] = []
    for number, flip in enumerate(found or ()):
        if flip.candidate is not None:
            name = f"flip {number}"
            asked.bench.traces[name] = _changed(window, flip)
            questions.append(Question(flip.candidate, name))
            asking.append(number)
    bar.left(len(questions))
    if not found:
        return found
    for number, trial in zip(asking, asked.bench.ask(questions, bar.ran), strict=True):
        holds = trial.attainment >= wish.attainment
        found[number] = msgspec.structs.replace(found[number], holds=holds)
    return found


def _changed(window: Sequence[TraceRequest], flip: Flip) -> list[TraceRequest]:
    """The window just past a threshold; a link's is in the candidate."""
    beyond = flip.factor * (BEYOND if flip.factor > 1 else 1 / BEYOND)
    if flip.what == "rate":
        return scale(window, rate_of(window) * beyond)
    if flip.what == "prompt":
        return [
            msgspec.structs.replace(
                each, num_prompt_tokens=max(1, round(each.num_prompt_tokens * beyond)),
                blocks=(), block_size=0,
            )
            for each in window
        ]  # fmt: skip
    return list(window)
