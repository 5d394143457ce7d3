"""A runner that computes nothing: a step takes as long as the cost model says."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from baton.core.cost import CostModel, StepShape, shape
from baton.core.plan import StepOutput, StepPlan
from baton.twin.clock import Clock


class _Step(NamedTuple):
    plan: StepPlan
    shape: StepShape
    elapsed_s: float
    end: float


class CostRunner:
    """Implements `core.plan.Runner` on virtual time.

    What a step draws for a sequence is its request's seed, so that answers are told apart. A step
    that was submitted while another one runs begins when that one ends.
    """

    def __init__(self, clock: Clock, cost: CostModel, depth: int) -> None:
        self._clock = clock
        self._cost = cost
        self._depth = depth
        self._steps: deque[_Step] = deque()
        self._free_at = 0.0

    @property
    def depth(self) -> int:
        return self._depth

    @property
    def pending(self) -> int:
        return len(self._steps)

    @property
    def progress(self) -> int:
        return 0  # nobody watches: a frozen worker of the twin is told by its failure

    def submit(self, plan: StepPlan) -> None:
        shaped = shape(plan)
        elapsed_s = self._cost.step_s(shaped)
        now = self._clock.now
        self._free_at = (self._free_at if self._free_at > now else now) + elapsed_s
        self._steps.append(_Step(plan, shaped, elapsed_s, self._free_at))

    @property
    def began(self) -> float:
        """When the oldest step began."""
        return self._steps[0].end - self._steps[0].elapsed_s

    def ends(self, steps: int, before: float) -> list[float]:
        """When the oldest step ends, and up to `steps - 1` that follow it, each a token further.

        Only the last of them ends at `before` or later.
        """
        oldest = self._steps[0]
        ends = [oldest.end]
        n, kv_tokens, pairs = oldest.shape.num_seqs, oldest.shape.kv_tokens, 0.0
        while len(ends) < steps and ends[-1] < before:
            kv_tokens += n
            pairs += n
            moved = StepShape(n, n, n, kv_tokens, oldest.shape.attention_pairs + pairs)
            ends.append(ends[-1] + self._cost.step_s(moved))
        return ends

    def collect(self) -> StepOutput:
        step = self._steps.popleft()
        tokens = [
            [chunk.seq.request.sampling.seed] if chunk.samples else [] for chunk in step.plan.chunks
        ]
        return StepOutput(tokens, [None] * len(tokens), step.elapsed_s)

    def collect_all(self, ends: list[float]) -> list[list[int]]:
        """The oldest step and those that follow it: as many tokens of each chunk as `ends`."""
        step = self._steps.popleft()
        self._free_at = ends[-1]
        return [[chunk.seq.request.sampling.seed] * len(ends) for chunk in step.plan.chunks]
