"""The verdict: arithmetic leaves out, the twin decides, and errors are drawn to see if it holds.

survey ─▶ the cheapest survivors of each style run in the twin until some keep the promise
       ─▶ the best of each style run again under drawn errors ─▶ the choice
       ─▶ head-room, flips, today's deployment
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import msgspec

from baton.errors import ConfigError
from baton.observe.slo import Slo
from baton.planner.plan.bounds import Arithmetic, Prediction
from baton.planner.plan.candidates import Candidate, Style
from baton.planner.plan.certainty import Certainty, certainty, draws
from baton.planner.plan.flips import BEYOND, Flip, price_flips, thresholds
from baton.planner.plan.kinds import Offer
from baton.planner.plan.search import ORDER, Found, Space, batches, check, simplest, survey
from baton.planner.plan.traffic import Traffic, busiest, rate_of
from baton.planner.plan.trials import Bench, Question, Trial
from baton.twin.workload import TraceRequest, check_trace, scale

ENOUGH = 3
"""Candidates of a style that keep the promise, after which no dearer ones are run."""
BATCH, MAX_BATCHES = 6, 5
ROOMIER = 0.8
"""Of the strain: what is run when nothing that keeps the promise is sure to."""
HEADROOM = (1.1, 1.25, 1.5, 2.0, 3.0)
Tell = Callable[[str, int, int], None]
"""Hears (stage, done, in all)."""


class Wish(msgspec.Struct, frozen=True):
    """What is asked for. attainment: share of requests that must keep `slo`. confidence: a
    candidate that holds with less probability is passed over where another one does not.
    usd_per_gb: of KV that leaves a worker. num_requests: of the trace, that the twin runs."""

    slo: Slo
    attainment: float = 0.9
    confidence: float = 0.8
    num_draws: int = 24
    num_requests: int = 300
    usd_per_gb: float = 0.0
    seed: int = 0


class Row(msgspec.Struct, frozen=True):
    """A candidate that the twin ran. Costs are spread over the trace's mean rate."""

    candidate: Candidate
    prediction: Prediction
    trial: Trial
    usd_per_hour: float
    usd_per_million: float
    joules_per_token: float | None
    certainty: Certainty | None = None

    @property
    def style(self) -> Style:
        return self.candidate.style

    @property
    def probability(self) -> float | None:
        return None if self.certainty is None else self.certainty.probability


class Plan(msgspec.Struct, frozen=True):
    """flips is None where the arithmetic does not share the twin's verdict. headroom: multiples of
    the rate and whether the choice still keeps the promise. rows: all that ran."""

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


class Asked(NamedTuple):
    """The bench, and what turns its trials into rows."""

    bench: Bench
    wish: Wish
    traffic: Traffic
    arithmetic: Arithmetic

    def rows(self, candidates: Sequence[Candidate]) -> list[Row]:
        trials = self.bench.ask([Question(each) for each in candidates])
        return [self.row(*pair) for pair in zip(candidates, trials, strict=True)]

    def row(self, candidate: Candidate, trial: Trial) -> Row:
        prediction, traffic = self.arithmetic.predict(candidate), self.traffic
        usd = candidate.usd_per_hour
        if candidate.way is not None:
            model = next(iter(candidate.workers.values()))[0].model
            moved = traffic.mean_rate * traffic.mean_prompt * model.kv_bytes_per_token
            usd += moved * candidate.way.wire_share / 1e9 * 3600 * self.wish.usd_per_gb
        return Row(
            candidate, prediction, trial, usd,
            usd / traffic.tokens_per_hour * 1e6, _joules(candidate, prediction, trial, traffic),
        )  # fmt: skip


def _joules(
    candidate: Candidate, prediction: Prediction, trial: Trial, traffic: Traffic
) -> float | None:
    """Per output token, while the window's load is served."""
    watts = 0.0
    for role, (_, count) in candidate.workers.items():
        drawn = prediction.watts.get(role)
        if drawn is None or role.value not in trial.utilisation:
            return None
        busy = min(trial.utilisation[role.value], 1.0)
        watts += count * (drawn.idle + busy * (drawn.busy - drawn.idle))
    return watts / (traffic.rate * traffic.mean_output)


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
    rows = _run(asked, seen.survivors, tell)
    chosen, holds, best, rows = _choose(asked, rows, seen.survivors, space, tell)
    others = [row.candidate for style, row in best.items() if style is not chosen.style]
    others += [row.candidate for row in rows if _keeps(row, wish) and row.style is not chosen.style]
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
    )


def _run(asked: Asked, survivors: Sequence[Found], tell: Tell) -> list[Row]:
    """The twin on the survivors of each style, the cheapest first, until enough keep it."""
    wish = asked.wish
    rows: list[Row] = []
    total = len(ORDER) * MAX_BATCHES
    for place, style in enumerate(ORDER):
        kept = 0
        for number, batch in enumerate(batches(survivors, wish.slo, style, BATCH)):
            if number >= MAX_BATCHES or kept >= ENOUGH:
                break
            tell("running candidates in the twin", place * MAX_BATCHES + number, total)
            found = asked.rows([each.candidate for each in batch])
            kept += sum(_keeps(row, wish) for row in found)
            rows += found
    tell("running candidates in the twin", total, total)
    return rows


def _keeps(row: Row, wish: Wish) -> bool:
    return row.trial.attainment >= wish.attainment


def _choose(
    asked: Asked, rows: list[Row], survivors: Sequence[Found], space: Space, tell: Tell
) -> tuple[Row, bool, dict[Style, Row], list[Row]]:
    """(the choice, whether it keeps the promise, the best of each style, all rows)."""
    wish = asked.wish
    keeping = [row for row in rows if _keeps(row, wish)]
    if not keeping:  # nothing does: the nearest is told as such
        nearest = min(rows, key=lambda row: (-row.trial.attainment, row.usd_per_hour))
        return nearest, False, {}, rows
    offered = list({kind.offer.device.name: kind.offer for kind in space.kinds}.values())
    best: dict[Style, Row] = {}
    drawing = _Drawing(asked, offered, tell)
    for style in ORDER:
        mine = drawing.weigh(row for row in keeping if row.style is style)
        if mine and not drawing.is_sure(mine):
            # The cheapest barely keep it: with more room they cost more and hold more surely.
            more = _roomier(survivors, mine, rows, wish)
            added = asked.rows([each.candidate for each in more])
            rows += added
            mine += drawing.weigh(row for row in added if _keeps(row, wish))
            mine.sort(key=lambda row: row.usd_per_hour)
        if mine:
            best[style] = _surest(mine, wish.confidence)
    rows = [drawing.weighed.get(row.candidate.name, row) for row in rows]
    reliable = {
        style: row for style, row in best.items()
        if row.probability is None or row.probability >= wish.confidence
    }  # fmt: skip
    if reliable:
        winner = simplest({style: row.usd_per_hour for style, row in reliable.items()})
        assert winner is not None  # there are some
        return reliable[winner], True, best, rows
    chosen = max(best.values(), key=lambda row: (row.probability or 0.0, -row.usd_per_hour))
    return chosen, True, best, rows


def _surest(rows: Sequence[Row], confidence: float) -> Row:
    """The cheapest that is sure enough, else the surest. Rows are sorted by cost."""
    for row in rows:
        if row.probability is None or row.probability >= confidence:
            return row
    return max(rows, key=lambda row: (row.probability or 0.0, -row.usd_per_hour))


class _Drawing:
    """Runs candidates again under the same drawn errors; keeps what they came to by name."""

    def __init__(self, asked: Asked, offered: Sequence[Offer], tell: Tell) -> None:
        self.weighed: dict[str, Row] = {}
        self._asked, self._tell = asked, tell
        self._drawn = draws(offered, asked.wish.num_draws, asked.wish.seed)
        self._num_done = 0

    def weigh(self, rows: Iterable[Row]) -> list[Row]:
        """The best of each of the lowest prices, cheapest first, with their certainty."""
        levels: dict[float, Row] = {}
        for row in sorted(rows, key=lambda row: (row.usd_per_hour, row.trial.strain)):
            levels.setdefault(row.usd_per_hour, row)
        found: list[Row] = []
        for row in list(levels.values())[:ENOUGH]:
            if not self.is_sure(found):  # a dearer one would not be chosen
                found.append(self._weigh(row))
        self.weighed.update((row.candidate.name, row) for row in found)
        return found

    def is_sure(self, rows: Sequence[Row]) -> bool:
        confidence = self._asked.wish.confidence
        return any(row.probability is None or row.probability >= confidence for row in rows)

    def _weigh(self, row: Row) -> Row:
        before, total = self._num_done, len(ORDER) * ENOUGH * len(self._drawn)

        def told(done: int) -> None:
            self._tell("drawing errors", before + done, max(total, before + done))

        questions = [Question(row.candidate, ratios=ratios) for ratios in self._drawn]
        trials = self._asked.bench.ask(questions, told)
        self._num_done += len(questions)
        sure = certainty(trials, self._asked.wish.attainment)
        return msgspec.structs.replace(row, certainty=sure)


def _roomier(
    survivors: Sequence[Found], mine: Sequence[Row], rows: Sequence[Row], wish: Wish
) -> list[Found]:
    """Survivors of the same style, not run yet, that arithmetic gives clearly more room."""
    known = {row.candidate.name for row in rows}
    limit = ROOMIER * min(row.prediction.strain(wish.slo) for row in mine)
    found = [
        each
        for each in survivors
        if each.candidate.style is mine[0].style
        and each.candidate.name not in known
        and each.prediction.strain(wish.slo) <= limit
    ]
    return found[:BATCH]


def _headroom(
    asked: Asked, candidate: Candidate, window: Sequence[TraceRequest], tell: Tell
) -> list[tuple[float, bool]]:
    tell("looking for head-room", 0, 1)
    bench, rate = asked.bench, rate_of(window)
    for factor in HEADROOM:
        bench.traces[f"x{factor:g}"] = scale(window, rate * factor)
    trials = bench.ask([Question(candidate, f"x{factor:g}") for factor in HEADROOM])
    tell("looking for head-room", 1, 1)
    kept = [trial.attainment >= asked.wish.attainment for trial in trials]
    return list(zip(HEADROOM, kept, strict=True))


def _flips(
    asked: Asked, space: Space, style: Style, window: Sequence[TraceRequest], tell: Tell
) -> list[Flip] | None:
    wish, looked = asked.wish, 0

    def told() -> None:
        nonlocal looked
        looked += 1
        tell("looking for what would flip it", looked, max(looked, 45))

    found = thresholds(space, asked.traffic, wish.slo, wish.attainment, style, told)
    if not found:
        return found
    questions: list[Question] = []
    asking: list[int] = []
    for number, flip in enumerate(found):
        if flip.candidate is not None:
            name = f"flip {number}"
            asked.bench.traces[name] = _changed(window, flip)
            questions.append(Question(flip.candidate, name))
            asking.append(number)
    for number, trial in zip(asking, asked.bench.ask(questions), strict=True):
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
