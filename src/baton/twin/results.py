"""What a run came to: a record of each request, and totals of each worker."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from baton.core.cost import StepShape
from baton.observe.results import RequestResult
from baton.twin.workload import TraceRequest
from baton.types import Role, TokenDelta


class Record:
    """What the client of one request sees, and when. Written by the gateway."""

    __slots__ = ("asked", "cached_tokens", "detail", "end_s", "events", "failure", "number")

    def __init__(self, number: int, asked: TraceRequest) -> None:
        self.number = number
        self.asked = asked
        self.events: list[float] = []
        self.cached_tokens: int | None = None
        self.end_s = asked.arrival_s
        self.failure: str | None = None
        self.detail = ""

    def take(self, delta: TokenDelta, times: Sequence[float]) -> None:
        """Tokens that arrived at `times`."""
        self.events += times
        if delta.num_cached is not None:
            self.cached_tokens = delta.num_cached

    def end(self, now: float) -> None:
        self.end_s = self.events[-1] if self.events else now

    def fail(self, now: float, failure: str, detail: str) -> None:
        self.end_s, self.failure, self.detail = now, failure, detail

    def result(self) -> RequestResult:
        return RequestResult(
            index=self.number,
            planned_s=self.asked.arrival_s,
            sent_s=self.asked.arrival_s,
            end_s=self.end_s,
            event_s=tuple(self.events),
            prompt_tokens=self.asked.num_prompt_tokens,
            cached_tokens=self.cached_tokens,
            output_tokens=len(self.events),
            counted_by="usage",
            failure=self.failure,
            detail=self.detail,
        )


class NodeTotals:
    """What a worker's steps came to, over all its starts."""

    __slots__ = ("busy_s", "num_seqs", "num_steps", "num_tokens")

    def __init__(self) -> None:
        self.num_steps = 0
        self.num_tokens = 0
        self.num_seqs = 0
        self.busy_s = 0.0

    def count(self, shape: StepShape, began: float, ends: Sequence[float]) -> None:
        """Steps of as many tokens, which ended at these times; the first began at `began`."""
        self.num_steps += len(ends)
        self.num_tokens += shape.num_tokens * len(ends)
        self.num_seqs += shape.num_seqs * len(ends)
        self.busy_s += ends[-1] - began


class WorkerResult(msgspec.Struct, frozen=True):
    """One worker over the whole run.

    busy_s: in steps. mean_seqs: sequences in a step. num_evicted: blocks of the KV pool that lost
    their content. counters: those of the worker's last start, as it tells them while serving.
    bytes_sent, bytes_received: of KV, by its port.
    """

    worker_id: str
    role: Role
    num_steps: int
    busy_s: float
    utilisation: float
    mean_seqs: float
    num_tokens: int
    num_evicted: int
    counters: dict[str, int]
    bytes_sent: float
    bytes_received: float


class RunResult(msgspec.Struct, frozen=True):
    """A run, its requests in the order of the trace. Times are seconds from the trace's start."""

    requests: list[RequestResult]
    workers: list[WorkerResult]
    gateway: dict[str, int]
    end_s: float
    num_events: int
