"""vLLM engines on virtual time: requests in, the times of their tokens out.

An engine plans the next step as soon as fewer than `depth` are under way; a device begins a step
when the one before it ends. Engines that share experts go in lock-step: a step begins for all of
them at once, and lasts as long as all of them together need.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from baton.core.plan import StepOutput, StepPlan
from baton.twin.workload import TraceRequest
from baton.types import Request, SamplingParams
from reproduce.vllm_v1 import VllmScheduler

StepCost = Callable[[Sequence[StepPlan]], float]


class Outcome(msgspec.Struct):
    """What became of it; times in seconds from the start."""

    arrival: TraceRequest
    first_token_s: float = 0.0
    last_token_s: float = 0.0

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.arrival.arrival_s

    @property
    def tpot_s(self) -> float:
        return (self.last_token_s - self.first_token_s) / max(1, self.arrival.num_output_tokens - 1)

    @property
    def e2e_s(self) -> float:
        return self.last_token_s - self.arrival.arrival_s


def serve(
    engines: Sequence[VllmScheduler], step_s: StepCost, arrivals: Sequence[TraceRequest], depth: int
) -> list[Outcome]:
    """Serve every request; a new one goes to the engine that has least to do."""
    results = [Outcome(arrival) for arrival in arrivals]
    to_come = deque(sorted(range(len(arrivals)), key=lambda i: arrivals[i].arrival_s))
    under_way: deque[tuple[list[StepPlan], float]] = deque()
    now = free_at = 0.0
    left = len(arrivals)
    while left:
        while to_come and arrivals[to_come[0]].arrival_s <= now:
            number = to_come.popleft()
            engine = min(engines, key=lambda each: 4 * each.num_waiting + each.num_running)
            engine.add(_request(number, arrivals[number]), now)
        plans = [engine.schedule(now) for engine in engines]
        planned = any(plan.chunks for plan in plans)
        if planned:
            free_at = max(now, free_at) + step_s(plans)
            under_way.append((plans, free_at))
            if len(under_way) < depth:
                continue
        if under_way:
            plans, now = under_way.popleft()
            left -= _take_in(engines, plans, now, results)
        elif to_come:
            now = arrivals[to_come[0]].arrival_s
        else:
            raise RuntimeError(f"{left} requests are left and nothing runs")
    return results


def _take_in(
    engines: Sequence[VllmScheduler], plans: list[StepPlan], now: float, results: list[Outcome]
) -> int:
    """Tell each engine what its step drew; returns how many requests ended."""
    ended = 0
    for engine, plan in zip(engines, plans, strict=True):
        if not plan.chunks:
            continue
        tokens = [[_token(chunk.seq.id[0])] if chunk.samples else [] for chunk in plan.chunks]
        engine.update(plan, StepOutput(tokens, [None] * len(tokens), 0.0), now)
        for delta in engine.take().deltas:
            result = results[int(delta.request_id)]
            if delta.first_index == 0:
                result.first_token_s = now
            if delta.finish is not None:
                result.last_token_s = now
                ended += 1
    return ended


def _request(number: int, arrival: TraceRequest) -> Request:
    """Tokens that no other request has, so that nothing is shared."""
    prompt = (_token(str(number)),) * arrival.num_prompt_tokens
    return Request(str(number), prompt, SamplingParams(max_tokens=arrival.num_output_tokens))


def _token(request_id: str) -> int:
    return int(request_id)
