"""What a gateway's decision log tells of every request, and of one in particular.

The log is replayed through the real router, so the candidates of a placement are what that router
sees there, and not what somebody wrote down.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from baton.core import decision_log as log
from baton.core.candidate import Candidate
from baton.core.replay import feed_router
from baton.core.router import Placement, Router, WorkerInfo
from baton.errors import BatonError
from baton.types import StageTimes

Key = tuple[str, int]
"""Request id and choice."""


class Attempt(msgspec.Struct, frozen=True):
    """A placement of the request in question. placed_s: by the gateway's clock.

    refusal: why nobody could take it, if so. replays: the router decides the same again.
    """

    number: int
    placed_s: float
    num_tokens: int
    candidates: tuple[Candidate, ...]
    placement: Placement | None
    refusal: str
    replays: bool


@dataclass(slots=True)
class Passed:
    """What became of one choice of a request. Instants of the gateway's clock, in seconds.

    placements: of all attempts. legs: (worker, what it told of the leg), as they ended.
    """

    num_tokens: int
    keys: tuple[bytes, ...]
    placed_s: float
    placements: list[Placement] = field(default_factory=list)
    first_token_s: float | None = None
    ended_s: float | None = None
    legs: list[tuple[str, StageTimes]] = field(default_factory=list)


@dataclass(slots=True)
class History:
    """One gateway's run.

    passed: in the order of the first placements, up to a change among the workers after the
    request in question. idle: numbers of requests before which nothing was under way, since the
    last change. workers: at its first placement. change: who came or went while it was served.
    """

    passed: dict[Key, Passed] = field(default_factory=dict)
    attempts: list[Attempt] = field(default_factory=list)
    idle: list[int] = field(default_factory=list)
    workers: dict[str, WorkerInfo] = field(default_factory=dict)
    change: str = ""


def read_history(data: bytes, wanted: Key) -> History | None:
    """Replay a gateway's log. None: it knows nothing of the request.

    Raises:
        BadLog: it cannot be read.
        BatonError: it begins after the request was placed.
    """
    _, records = log.read(data)
    reading = _Reading(wanted)
    for record in records:
        reading.take(record)
        if reading.is_over:
            break
    return reading.history if reading.history.attempts else None


class _Reading:
    def __init__(self, wanted: Key) -> None:
        self.history = History()
        self.is_over = False
        self._wanted = wanted
        self._router = Router()
        self._workers: dict[str, WorkerInfo] = {}
        self._living: set[Key] = set()

    def take(self, record: log.Record) -> None:
        match record:
            case log.Placed():
                self._place(record)
                return
            case log.Joined(info):
                self._change(f"{info.worker_id} came")
                self._workers[info.worker_id] = info
            case log.Left(worker_id):
                if self._workers.pop(worker_id, None) is not None:
                    self._change(f"{worker_id} went, or took nothing more,")
            case log.Timed(worker_id, told):
                if (passed := self._of((told.request_id, told.choice))) is not None:
                    passed.legs.append((worker_id, told))
            case log.Prefilled(request_id, choice, now):
                passed = self._of((request_id, choice))
                if passed is not None and passed.first_token_s is None:
                    passed.first_token_s = now
            case log.Finished(request_id, choice, now):
                self._living.discard((request_id, choice))
                if (passed := self._of((request_id, choice))) is not None:
                    passed.ended_s = now
        feed_router(self._router, record)

    def _of(self, key: Key) -> Passed | None:
        passed = self.history.passed.get(key)
        if passed is None and key == self._wanted and not self.history.attempts:
            raise BatonError(
                f"the gateway's log begins after request {key[0]} was placed: of such a request "
                "nothing can be told"
            )
        return passed

    def _change(self, what: str) -> None:
        history = self.history
        if self._wanted in self._living:
            history.change = history.change or what
        elif self._wanted in history.passed:
            self.is_over = True
        else:
            history.idle.clear()

    def _place(self, record: log.Placed) -> None:
        history, key = self.history, (record.request_id, record.choice)
        candidates: list[Candidate] = []
        if key == self._wanted:
            self._router.finished(*key)  # an earlier attempt, as placing it again will do
            asked = (record.num_tokens, record.keys, record.key_class)
            candidates = self._router.candidates(*asked)
        found = feed_router(self._router, record)
        assert found is not None
        (logged, replayed), placement = found
        passed = history.passed.get(key)
        number = 0 if passed is None else len(passed.placements)
        if key == self._wanted:
            if not history.attempts:
                history.workers = dict(self._workers)
            is_placed = isinstance(placement, Placement)
            attempt = Attempt(
                number,
                record.now,
                record.num_tokens,
                tuple(candidates),
                placement if isinstance(placement, Placement) else None,
                "" if is_placed else str(placement),
                logged == replayed,
            )
            history.attempts.append(attempt)
        if not isinstance(placement, Placement):
            return
        if passed is None:
            if not self._living and self._wanted not in history.passed:
                history.idle.append(len(history.passed))
            passed = Passed(record.num_tokens, record.keys, record.now)
            history.passed[key] = passed
        self._living.add(key)
        passed.placements.append(placement)
