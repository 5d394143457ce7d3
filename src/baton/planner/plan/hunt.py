"""The cheapest candidate of one style that keeps the promise and is sure to.

    candidates in order of worth ──twin──▶ rows ──those that keep it──▶ draws ──▶ sure: the best

What costs more than the best so far is left out, and what cannot win against another style's best;
everything else runs. So what is found is what a search that leaves nothing out would find.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from baton.planner.plan.candidates import Style
from baton.planner.plan.drawing import Drawing, by_probability
from baton.planner.plan.rows import Asked, Bar, Row
from baton.planner.plan.search import Found, in_order

BATCH = 6
"""Candidates between two looks at what has been found."""


class Hunt:
    """One style. best: the sure row of the least cost."""

    def __init__(
        self, style: Style, found: Sequence[Found], asked: Asked, drawing: Drawing, bar: Bar
    ) -> None:
        self.style = style
        self.best: Row | None = None
        self._ran: list[Row] = []
        self._weighed: list[Row] = []
        self._asked, self._drawing, self._bar = asked, drawing, bar
        self._left = in_order(found, asked.wish.slo, style)

    @property
    def rows(self) -> list[Row]:
        """All that ran, with their certainty where it was looked for."""
        weighed = self._drawing.weighed
        return [weighed.get(row.candidate.name, row) for row in self._ran]

    @property
    def usd_per_hour(self) -> float:
        """Of the best; infinite if there is none yet."""
        return math.inf if self.best is None else self.best.usd_per_hour

    def num_left(self, limit_usd: float) -> int:
        """Candidates that did not run, cost no more than that, and might be the best."""
        return len(self._open(limit_usd))

    def run(self, limit_usd: float) -> bool:
        """Run the next few that cost no more than that; False if there are none."""
        batch = self._open(limit_usd)[:BATCH]
        if not batch:
            return False
        names = {each.candidate.name for each in batch}
        self._left = [each for each in self._left if each.candidate.name not in names]
        rows = self._asked.rows([each.candidate for each in batch], self._bar)
        self._ran += rows
        for row in sorted(filter(self._asked.keeps, rows), key=lambda row: row.cost):
            if self._asked.wish.thorough or self.best is None or row.cost < self.best.cost:
                weighed = self._drawing.weigh(row)
                self._weighed.append(weighed)
                if self._drawing.is_sure(weighed) and (
                    self.best is None or weighed.cost < self.best.cost
                ):
                    self.best = weighed
        return True

    def surest(self, *, decides: bool) -> Row | None:
        """The best; if nothing is sure, what keeps the promise with the highest probability.

        decides: all draws that could change that are made first.
        """
        if self.best is not None or not self._weighed:
            return self.best
        if decides:
            return self._drawing.surest(self._weighed)
        return min(self._weighed, key=by_probability)

    def _open(self, limit_usd: float) -> list[Found]:
        if self._asked.wish.thorough:
            return self._left
        limit = min(limit_usd, self.usd_per_hour)
        return [each for each in self._left if self._asked.usd(each.candidate) <= limit]
