"""A runner that computes nothing: a step takes as long as the cost model says."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from baton.core.cost import CostModel, Rest, SteadyCost, StepShape, after_rest_s, shape
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
    that was submitted while another one runs begins when that one ends. rests: what a step takes
    longer that finds the worker idle.
    """

    def __init__(
        self, clock: Clock, cost: CostModel, depth: int, rests: Sequence[Rest] = ()
    ) -> None:
        self._clock = clock
        self._cost = cost
        self._steady = cost if isinstance(cost, SteadyCost) else None
        self._depth = depth
        self._rests = rests
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
        self._begin(plan, self._clock.now)

    def _begin(self, plan: StepPlan, now: float) -> None:
        shaped = shape(plan)
        elapsed_s = self._cost.step_s(shaped)
        if self._rests and now > self._free_at:
            elapsed_s += after_rest_s(self._rests, now - self._free_at)
        self._free_at = (self._free_at if self._free_at > now else now) + elapsed_s
        self._steps.append(_Step(plan, shaped, elapsed_s, self._free_at))

    @property
    def oldest(self) -> StepShape:
        """The shape of the oldest step."""
        return self._steps[0].shape

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
        if steps == 1 or oldest.end >= before:
            return ends
        for elapsed_s in self._following_s(oldest.shape, steps - 1):
            ends.append(ends[-1] + elapsed_s)
            if ends[-1] >= before:
                break
        return ends

    def _following_s(self, shaped: StepShape, steps: int) -> Iterable[float]:
        """Seconds of the steps after one of this shape that only decodes."""
        if self._steady is not None:
            return self._steady.steady_s(shaped, steps)
        n, kv_tokens, pairs = shaped.num_seqs, shaped.kv_tokens, shaped.attention_pairs
        moved = (StepShape(n, n, n, kv_tokens + i * n, pairs + i * n) for i in range(1, steps + 1))
        return map(self._cost.step_s, moved)

    def collect(self) -> StepOutput:
        step = self._steps.popleft()
        tokens = [
            [chunk.seq.request.sampling.seed] if chunk.samples else [] for chunk in step.plan.chunks
        ]
        return StepOutput(tokens, [None] * len(tokens), step.elapsed_s)

    def collect_all(self, num_steps: int) -> list[tuple[int, ...]]:
        """The oldest step and those that follow it: so many tokens of each chunk."""
        plan = self._steps[0].plan
        self._steps.clear()
        return [(chunk.seq.request.sampling.seed,) * num_steps for chunk in plan.chunks]

    def go_on(self, ahead: StepPlan | None, free_at: float) -> None:
        """After `collect_all`: the steps end at `free_at`, and the one ahead follows at once."""
        self._free_at = free_at
        if ahead is not None:
            self._begin(ahead, free_at)
