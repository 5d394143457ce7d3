"""What is asked of a plan, and a row for each candidate that the twin ran."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from baton.observe.slo import Slo
from baton.planner.plan.bounds import Arithmetic, Prediction
from baton.planner.plan.candidates import Candidate, Style
from baton.planner.plan.certainty import Certainty
from baton.planner.plan.traffic import Traffic
from baton.planner.plan.trials import Bench, Question, Trial

Tell = Callable[[str, int, int], None]
"""Hears (stage, done, in all)."""


class Wish(msgspec.Struct, frozen=True):
    """What is asked for. attainment: share of requests that must keep `slo`. confidence: a
    candidate that holds with less probability is passed over where another one does not.
    usd_per_gb: of KV that leaves a worker. num_requests: of the trace, that the twin runs.
    thorough: the twin runs every candidate, under all drawn errors, whatever came of the others."""

    slo: Slo
    attainment: float = 0.9
    confidence: float = 0.8
    num_draws: int = 24
    num_requests: int = 300
    usd_per_gb: float = 0.0
    seed: int = 0
    thorough: bool = False


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
    def cost(self) -> tuple[float, float]:
        """Which of two is to be preferred, if both are sure: the smaller."""
        return self.usd_per_hour, self.trial.strain

    @property
    def probability(self) -> float | None:
        return None if self.certainty is None else self.certainty.probability


class Bar:
    """One stage's progress: runs of the twin that are done, of as many as there may still be."""

    def __init__(self, tell: Tell, stage: str, total: int) -> None:
        self._tell, self._stage = tell, stage
        self._done, self._total = 0, total
        tell(stage, 0, total)

    def ran(self) -> None:
        self._done += 1
        self._total = max(self._total, self._done)
        self._tell(self._stage, self._done, self._total)

    def more(self, count: int) -> None:
        """So many may be needed besides."""
        self._total += count
        self._tell(self._stage, self._done, self._total)

    def spare(self, count: int) -> None:
        """So many will not be needed."""
        self.more(-count)

    def left(self, count: int) -> None:
        """So many are still to come, and no more."""
        self.more(self._done + count - self._total)


class Asked(NamedTuple):
    """The bench, and what turns its trials into rows."""

    bench: Bench
    wish: Wish
    traffic: Traffic
    arithmetic: Arithmetic

    def rows(self, candidates: Sequence[Candidate], bar: Bar | None = None) -> list[Row]:
        ran = None if bar is None else bar.ran
        trials = self.bench.ask([Question(each) for each in candidates], ran)
        return [self.row(*pair) for pair in zip(candidates, trials, strict=True)]

    def row(self, candidate: Candidate, trial: Trial) -> Row:
        prediction, traffic = self.arithmetic.predict(candidate), self.traffic
        usd = self.usd(candidate)
        return Row(
            candidate, prediction, trial, usd,
            usd / traffic.tokens_per_hour * 1e6, _joules(candidate, prediction, trial, traffic),
        )  # fmt: skip

    def usd(self, candidate: Candidate) -> float:
        """Per hour, with what its transfers cost."""
        usd = candidate.usd_per_hour
        if candidate.way is not None and self.wish.usd_per_gb:
            model = next(iter(candidate.workers.values()))[0].model
            moved = self.traffic.mean_rate * self.traffic.mean_prompt * model.kv_bytes_per_token
            usd += moved * candidate.way.wire_share / 1e9 * 3600 * self.wish.usd_per_gb
        return usd

    def keeps(self, row: Row) -> bool:
        return row.trial.attainment >= self.wish.attainment


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
