"""What the simulations of whole clusters share: jobs, devices that take step after step, batches.

Sequences that decode together are one counter and a heap of ends, so a step costs the same however
many of them there are.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence

from baton.twin.clock import Clock

Lengths = tuple[int, int]
"""Tokens of a prompt and of its answer."""


class Job:
    """A request on its way. Times in seconds from the start; 0.0 until known."""

    __slots__ = ("arrival_s", "first_s", "last_s", "num_output", "num_prompt")

    def __init__(self, arrival_s: float, num_prompt: int, num_output: int) -> None:
        self.arrival_s = arrival_s
        self.num_prompt = num_prompt
        self.num_output = num_output
        self.first_s = 0.0
        self.last_s = 0.0

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.arrival_s

    @property
    def tpot_s(self) -> float:
        """Mean gap between tokens; 0 where there is only one."""
        return (self.last_s - self.first_s) / max(1, self.num_output - 1)

    @property
    def e2e_s(self) -> float:
        return self.last_s - self.arrival_s


def poisson_jobs(lengths: Sequence[Lengths], per_s: float, seed: int) -> list[Job]:
    """A job for each of `lengths`. Another rate stretches the same gaps."""
    draw = random.Random(seed)
    now, jobs = 0.0, []
    for num_prompt, num_output in lengths:
        now += draw.expovariate(1.0) / per_s
        jobs.append(Job(now, num_prompt, num_output))
    return jobs


Step = tuple[float, Callable[[], None]]
"""Seconds, and what happens at their end."""


class Device:
    """Takes one step after the other while `begin` has one; `wake` says that it may have."""

    def __init__(self, clock: Clock, begin: Callable[[], Step | None]) -> None:
        self._clock = clock
        self._begin = begin
        self._busy = False

    def wake(self) -> None:
        if not self._busy:
            self._next()

    def _next(self) -> None:
        step = self._begin()
        self._busy = step is not None
        if step is not None:
            seconds, finish = step
            self._clock.after(seconds, lambda: self._end(finish))

    def _end(self, finish: Callable[[], None]) -> None:
        finish()
        self._next()


class Decoding:
    """Sequences that draw a token each in every step. `kv_tokens` is what they attend to."""

    def __init__(self) -> None:
        self.kv_tokens = 0
        self._steps = 0
        self._num_added = 0
        self._ends: list[tuple[int, int, Job]] = []

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, job: Job) -> None:
        """A job whose first token has been drawn, and which wants more."""
        self._num_added += 1
        self.kv_tokens += job.num_prompt + 1
        end = self._steps + job.num_output - 1
        heapq.heappush(self._ends, (end, self._num_added, job))

    def step(self) -> list[Job]:
        """A token for each; returns those that have their last one."""
        self._steps += 1
        self.kv_tokens += len(self._ends)
        done = []
        while self._ends and self._ends[0][0] <= self._steps:
            job = heapq.heappop(self._ends)[2]
            self.kv_tokens -= job.num_prompt + job.num_output
            done.append(job)
        return done


def run_all(clock: Clock, jobs: Sequence[Job], arrive: Callable[[Job], None]) -> None:
    """Let every job arrive in its time, and everything happen."""

    def come(number: int) -> None:
        if number + 1 < len(jobs):
            clock.at(jobs[number + 1].arrival_s, lambda: come(number + 1))
        arrive(jobs[number])

    clock.at(jobs[0].arrival_s, lambda: come(0))
    while len(clock):
        clock.next()


def highest(holds: Callable[[float], bool], low: float, high: float, steps: int) -> float:
    """The highest rate at which `holds`, by bisection of its logarithm; 0 if not even at `low`."""
    if not holds(low):
        return 0.0
    for _ in range(steps):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
