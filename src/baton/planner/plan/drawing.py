"""Which rows are sure enough: all run again under the same drawn errors.

A row's draws stop when it can no longer be as sure as is asked for: whether it is has then the
same answer as after all of them, and its probability is that of fewer draws. If nothing turns out
sure, probabilities decide, and rows are drawn on as far as they may still be the surest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from baton.planner.plan.certainty import certainty, draws
from baton.planner.plan.kinds import Offer
from baton.planner.plan.rows import Asked, Bar, Row
from baton.planner.plan.trials import Question, Trial

AT_ONCE = 6
"""Draws between two looks at whether it is clear."""


class Drawing:
    """Keeps, by name, the trials of each row and what they came to."""

    def __init__(self, asked: Asked, offered: Sequence[Offer], bar: Bar) -> None:
        self.weighed: dict[str, Row] = {}
        self._asked, self._bar = asked, bar
        wish = asked.wish
        self._drawn = draws(offered, wish.num_draws, wish.seed)
        self._trials: dict[str, list[Trial]] = {}

    def weigh(self, row: Row) -> Row:
        """The row with its certainty, as far as it has to be known."""
        return self._draw(row, to_the_end=self._asked.wish.thorough)

    def is_sure(self, row: Row) -> bool:
        """Also where no profile knows its error: then nothing can be told apart."""
        return row.probability is None or row.probability >= self._asked.wish.confidence

    def surest(self, rows: Iterable[Row]) -> Row:
        """Of rows that are not sure, the one with the highest probability; then the cheapest."""
        best: Row | None = None
        for row in sorted(rows, key=lambda row: (-self._most(row), *row.cost)):
            if best is None or self._most(row) >= (best.probability or 0.0):
                drawn = self._draw(row, to_the_end=True)
                best = drawn if best is None else min(best, drawn, key=by_probability)
        assert best is not None, "there is one"
        return best

    def _draw(self, row: Row, *, to_the_end: bool) -> Row:
        trials, wanted = self._trials.setdefault(row.candidate.name, []), len(self._drawn)
        self._bar.more(wanted - len(trials))
        while len(trials) < wanted and (to_the_end or self._may_be_sure(trials)):
            ratios = self._drawn[len(trials) : len(trials) + AT_ONCE]
            questions = [Question(row.candidate, ratios=each) for each in ratios]
            trials += self._asked.bench.ask(questions, self._bar.ran)
        self._bar.more(len(trials) - wanted)
        sure = certainty(trials, self._asked.wish.attainment)
        self.weighed[row.candidate.name] = msgspec.structs.replace(row, certainty=sure)
        return self.weighed[row.candidate.name]

    def _may_be_sure(self, trials: Sequence[Trial]) -> bool:
        return 1 - self._share_lost(trials) >= self._asked.wish.confidence

    def _most(self, row: Row) -> float:
        """Its probability, should it hold in all draws to come."""
        return 1 - self._share_lost(self._trials.get(row.candidate.name, ()))

    def _share_lost(self, trials: Sequence[Trial]) -> float:
        lost = sum(trial.attainment < self._asked.wish.attainment for trial in trials)
        return lost / max(1, len(self._drawn))


def by_probability(row: Row) -> tuple[float, float, float]:
    """To sort by: the highest probability first, then the least cost."""
    return (-(row.probability or 0.0), *row.cost)
