"""What was predicted next to what then happened, per worker and stage.

`Audit` is told of both and keeps the last `WINDOW` pairs of each stage of each worker that is
there; it owns nothing else, knows no clock and decides nothing. Stages of requests are predicted by
the router when it places them, steps by a cost model if there is one.
"""

from __future__ import annotations

import enum
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping

import msgspec

from baton.core.predicted import Predicted
from baton.core.step_cost import CostModel, MeasuredStep
from baton.types import Role, StageTimes

WINDOW = 256


class Stage(enum.StrEnum):
    """What is predicted: four stages of requests, and two kinds of steps."""

    QUEUE = "queue"
    PREFILL = "prefill"
    TRANSFER = "transfer"
    DECODE = "decode"  # a mean gap between two tokens of a request
    PROMPT_STEP = "prompt_step"
    DECODE_STEP = "decode_step"


LEAST_S = {Stage.QUEUE: 1e-3, Stage.PREFILL: 1e-3, Stage.TRANSFER: 1e-3}
"""Less counts as so much: twice of next to nothing is no error that steers anything."""


STEPS = (Stage.PROMPT_STEP, Stage.DECODE_STEP)


class StageError(msgspec.Struct, frozen=True):
    """How far predictions of one stage on one worker were off.

    count: of all, since the worker came; the rest is of the last `num_recent`. median, p90: of
    |measured / predicted - 1|. ratio: median of measured / predicted. predicted_s, measured_s:
    medians, in seconds.
    """

    worker: str
    role: Role
    stage: Stage
    count: int
    num_recent: int
    median: float
    p90: float
    ratio: float
    predicted_s: float
    measured_s: float


class WorkerStep(msgspec.Struct, frozen=True):
    """A step that a worker told of."""

    worker: str
    role: Role
    step: MeasuredStep


class _Worker:
    __slots__ = ("counts", "pairs", "role", "steps")

    def __init__(self, role: Role) -> None:
        self.role = role
        self.counts = dict.fromkeys(Stage, 0)
        self.pairs: dict[Stage, deque[tuple[float, float]]] = {}
        self.steps: dict[bool, deque[MeasuredStep]] = {
            has_prompt: deque(maxlen=WINDOW) for has_prompt in (True, False)
        }


class Audit:
    """Pairs of predicted and measured seconds. What is no positive number is left out.

    costs: what steps of a role's workers are predicted by; those of other roles are only kept.
    """

    def __init__(self, costs: Mapping[Role, CostModel] | None = None) -> None:
        self._costs = costs or {}
        self._workers: dict[str, _Worker] = {}

    def join(self, worker_id: str, role: Role) -> None:
        """A worker came, or started anew: nothing is known of it."""
        self._workers[worker_id] = _Worker(role)

    def leave(self, worker_id: str) -> None:
        """A worker is gone, and what was known of it."""
        self._workers.pop(worker_id, None)

    def leg(
        self, worker_id: str, predicted: Predicted, times: StageTimes, *, took_over: bool
    ) -> None:
        """One leg of a request has ended on this worker; `took_over`: it began with a handoff."""
        if took_over:
            self._compare(worker_id, Stage.TRANSFER, predicted.transfer_s, times.import_s)
        else:
            self._compare(worker_id, Stage.QUEUE, predicted.queue_s, times.queue_s)
            self._compare(worker_id, Stage.PREFILL, predicted.prefill_s, times.prefill_s)
        if times.num_decoded > 0:
            gap_s = times.decode_s / times.num_decoded
            self._compare(worker_id, Stage.DECODE, predicted.decode_step_s, gap_s)

    def step(self, worker_id: str, step: MeasuredStep) -> None:
        """A worker told of a step."""
        worker, shape = self._workers.get(worker_id), step.shape
        if worker is None or not _is_sound(step):
            return
        worker.steps[shape.has_prompt].append(step)
        if (cost := self._costs.get(worker.role)) is not None:
            stage = Stage.PROMPT_STEP if shape.has_prompt else Stage.DECODE_STEP
            self._compare(worker_id, stage, cost.step_s(shape), step.elapsed_s)

    def errors(self, stages: Iterable[Stage] = tuple(Stage)) -> list[StageError]:
        """Of every worker and each of `stages` that something is known of, in a fixed order."""
        return [
            _error(name, worker.role, stage, worker.counts[stage], list(pairs))
            for name, worker in sorted(self._workers.items())
            for stage in stages
            if (pairs := worker.pairs.get(stage))
        ]

    def steps(self) -> Iterator[WorkerStep]:
        """The last steps of each worker, with prompts and without."""
        for name, worker in sorted(self._workers.items()):
            for kept in worker.steps.values():
                for step in kept:
                    yield WorkerStep(name, worker.role, step)

    def _compare(
        self, worker_id: str, stage: Stage, predicted_s: float | None, measured_s: float
    ) -> None:
        worker = self._workers.get(worker_id)
        if worker is None or predicted_s is None:
            return
        least_s = LEAST_S.get(stage, 0.0)
        pair = max(predicted_s, least_s), max(measured_s, least_s)
        # Both come from other processes, or from what these said; NaN is not above 0 either.
        if all(0 < each < math.inf for each in pair):
            worker.counts[stage] += 1
            worker.pairs.setdefault(stage, deque(maxlen=WINDOW)).append(pair)


MAX_TOKENS = 1 << 40
"""More than any step has."""


def _is_sound(step: MeasuredStep) -> bool:
    shape = step.shape
    counts = (shape.num_samples, shape.num_seqs, shape.kv_tokens, shape.attention_pairs)
    return (
        0 < step.elapsed_s < math.inf
        and 0 < shape.num_tokens < MAX_TOKENS
        and all(0 <= each < MAX_TOKENS * MAX_TOKENS for each in counts)
    )


def _error(
    name: str, role: Role, stage: Stage, count: int, pairs: list[tuple[float, float]]
) -> StageError:
    ratios = [measured / predicted for predicted, measured in pairs]
    errors = sorted(abs(ratio - 1) for ratio in ratios)  # once for both quantiles
    return StageError(
        name,
        role,
        stage,
        count,
        len(pairs),
        quantile(errors, 0.5),
        quantile(errors, 0.9),
        quantile(ratios, 0.5),
        quantile([predicted for predicted, _ in pairs], 0.5),
        quantile([measured for _, measured in pairs], 0.5),
    )


def quantile(values: list[float], share: float) -> float:
    """Between the two nearest of the sorted values, of which there is at least one."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)
