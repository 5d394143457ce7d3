"""What a worker's decision log tells of the time that things took there.

The log is replayed through the real scheduler, which comes to every plan again: so each step's
shape is known beside its seconds, each copy and each fetch, and how long every answer became.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from baton.core import decision_log as log
from baton.core.cost import shape
from baton.core.limits import SchedulerConfig
from baton.core.plan import StepPlan
from baton.core.replay import Parted, WorkerReplay
from baton.core.sequence import SequenceId
from baton.planner.calibrate import Observation

T = TypeVar("T")
MAX_KEPT = 4000
"""Of what a long log tells of one thing: all of it would take more memory than the log itself."""
QUICK = 0.1
"""Quantile of copies: an engine looks at their ends between steps, so most look slower."""


class Thinned(Generic[T]):
    """At most `MAX_KEPT` of what is put in, evenly over all of it."""

    def __init__(self) -> None:
        self.kept: list[T] = []
        self._every = 1
        self._num_put = 0

    def put(self, each: T) -> None:
        if self._num_put % self._every == 0:
            self.kept.append(each)
            if len(self.kept) > MAX_KEPT:
                del self.kept[1::2]
                self._every *= 2
        self._num_put += 1


@dataclass(slots=True)
class Facts:
    """One start of a worker. Durations in seconds; None where the log shows none.

    depth: steps in flight at most. steps, fetches: thinned out where there are very many. pause_s:
    between two steps, on average, if no copies are waited for. copy_s: for a block, into its own
    store. fetches: for a block out of a peer's, each. num_tokens: of the answer of each choice, as
    far as this worker drew it. received: legs that found it with nothing to do, by its clock.
    took_early: blocks were offered to it before the handoff.
    """

    worker_id: str
    config: SchedulerConfig
    depth: int = 1
    steps: list[Observation] = field(default_factory=list)
    pause_s: float | None = None
    copy_s: float | None = None
    fetches: list[float] = field(default_factory=list)
    num_tokens: dict[tuple[str, int], int] = field(default_factory=dict)
    received: dict[SequenceId, float] = field(default_factory=dict)
    took_early: bool = False


def read_facts(header: log.WorkerHeader, records: Iterator[log.Record]) -> Facts:
    """Replay a worker's log.

    Raises:
        BadLog: it cannot be read, or does not lead to the decisions that were made.
    """
    reading = _Reading(header)
    try:
        for record in records:
            reading.take(record)
    except Parted as parted:
        raise log.BadLog(f"it does not replay: {parted}") from None
    return reading.facts()


class _Reading:
    def __init__(self, header: log.WorkerHeader) -> None:
        self._replay = WorkerReplay(header)
        self._facts = Facts(header.worker_id, header.config)
        self._steps: Thinned[Observation] = Thinned()
        self._fetches: Thinned[float] = Thinned()
        self._copies: Thinned[float] = Thinned()
        self._paused_s, self._num_pauses = 0.0, 0
        self._ordered: dict[bytes, tuple[float, int]] = {}  # when, and how many copies with it
        self._orders: dict[int, int] = {}  # fetches from peers, and their blocks
        self._began: float | None = None  # the last step; None: there was nothing to do
        self._elapsed_s = 0.0
        self._seals = False

    def facts(self) -> Facts:
        found = self._facts
        found.steps, found.fetches = self._steps.kept, self._fetches.kept
        if self._num_pauses:
            # With two steps in flight, what lies between them is hidden behind one of them.
            found.pause_s = self._paused_s / self._num_pauses if found.depth == 1 else 0.0
        if copies := sorted(self._copies.kept):
            found.copy_s = copies[int(QUICK * len(copies))]
        return found

    def take(self, record: log.Record) -> None:
        fed = self._replay.feed(record)
        facts = self._facts
        match record:
            case log.Added(request, now):
                if self._began is None:
                    facts.received[request.id, request.choice, request.attempt] = now
            case log.Offered():
                facts.took_early = True
            case log.Scheduled(now, _):
                if fed.decided is not None and fed.decided[0] != fed.decided[1]:
                    raise log.BadLog("it does not replay: another step would be planned today")
                assert fed.planned is not None
                self._planned(fed.planned, now)
            case log.Updated(_, _, elapsed_s, now):
                assert fed.ended is not None
                self._elapsed_s = elapsed_s
                self._seals = self._replay.scheduler.exports.num_awaited > 0
                self._step(fed.ended, elapsed_s)
                keys = [order.key for order in fed.update.exports]
                self._ordered.update((key, (now, i)) for i, key in enumerate(keys, 1))
            case log.Exported(key, _, now):
                ordered = self._ordered.pop(key, None)
                if ordered is not None and now > ordered[0]:
                    self._copies.put((now - ordered[0]) / ordered[1])
            case log.Imported(number, _, _, elapsed_s):
                num_blocks = self._orders.pop(number, 0)
                if num_blocks and elapsed_s > 0:
                    self._fetches.put(elapsed_s / num_blocks)
        for delta in fed.update.deltas:
            key_ = (delta.request_id, delta.choice)
            drawn = delta.first_index + len(delta.token_ids)
            facts.num_tokens[key_] = max(drawn, facts.num_tokens.get(key_, 0))

    def _planned(self, plan: StepPlan, now: float) -> None:
        facts = self._facts
        facts.depth = max(facts.depth, len(self._replay.plans))
        if self._began is not None and plan.chunks and not self._seals:
            self._paused_s += max(0.0, now - self._began - self._elapsed_s)
            self._num_pauses += 1
        self._began = now if plan.chunks else None
        for order in plan.imports:
            if order.grant is not None:
                self._orders[order.number] = len(order.wanted)

    def _step(self, plan: StepPlan, elapsed_s: float) -> None:
        if elapsed_s > 0:
            shaped = shape(plan)
            kind = "prefill" if shaped.has_prompt else "decode"
            self._steps.put(Observation(shaped, elapsed_s, kind, group=shaped))
