"""Run a decision log through the policy code again and compare every decision.

With the configuration it was made with, a log must replay without a difference. With another one
(`changes`) the differences show where the policy would have parted from what happened; from the
first one on, the inputs are those of another history, so only its place is meaningful.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import msgspec

from baton.core import decision_log as log
from baton.core.in_flight import MAX_DEPTH
from baton.core.lease import LeaseTable
from baton.core.limits import SchedulerConfig
from baton.core.plan import StepOutput, StepPlan, Update
from baton.core.router import Placement, Router
from baton.core.scheduler import Scheduler
from baton.core.store_index import StoreIndex
from baton.errors import ConfigError, Unavailable


class ReplayReport(msgspec.Struct, frozen=True):
    """What a replay found. `first` is the number of the first differing decision, from 1.

    `parted` says that the replayed policy came to a state in which the log's next input made no
    sense (a plan of another length, say), so the rest could not be compared.
    """

    source: str
    num_records: int
    num_decisions: int
    num_differences: int
    first: int | None = None
    parted: str | None = None


def replay(data: bytes, changes: Mapping[str, int] | None = None) -> ReplayReport:
    """Replay one log; `changes` replaces fields of the logged `SchedulerConfig`.

    Raises:
        BadLog: the log cannot be read.
        ConfigError: `changes` names a field that there is not.
    """
    header, records = log.read(data)
    if isinstance(header, log.RouterHeader):
        return _Comparison(header.gateway_id).run(_route(records))
    worker = WorkerReplay(header, changes)
    return _Comparison(header.worker_id).run(_drive(worker, records))


def _changed(config: SchedulerConfig, changes: Mapping[str, int]) -> SchedulerConfig:
    fields = [
        name
        for name in SchedulerConfig.__struct_fields__
        if isinstance(getattr(config, name), int | float)
    ]
    for name, value in changes.items():
        if name not in fields:
            raise ConfigError(
                f"the log has no number `{name}` to change; it has {', '.join(fields)}"
            )
        if not _is_possible(msgspec.structs.replace(config, **{name: value})):
            raise ConfigError(f"{name} cannot be {value}")
    return msgspec.structs.replace(config, **changes)


def _is_possible(config: SchedulerConfig) -> bool:
    positive = (
        config.kv_format.block_size,
        config.num_blocks,
        config.max_num_seqs,
        config.max_num_batched_tokens,
        config.max_model_len,
        config.vocab_size,
        config.lease_ttl_s,
    )
    return min(positive) > 0 and config.num_frames >= 0


class Parted(Exception):
    """The replayed policy cannot take the log's next input."""


class _Comparison:
    """Counts decisions; each item of a drive is (logged hash, replayed hash) or None."""

    def __init__(self, source: str) -> None:
        self._source = source

    def run(self, drive: Iterator[tuple[bytes, bytes] | None]) -> ReplayReport:
        num_records = num_decisions = num_differences = 0
        first = parted = None
        try:
            for decided in drive:
                num_records += 1
                if decided is not None:
                    num_decisions += 1
                    if decided[0] != decided[1]:
                        num_differences += 1
                        first = first or num_decisions
        except Parted as error:
            parted = str(error)
            num_differences += 1
            first = first or num_decisions
        return ReplayReport(
            self._source, num_records, num_decisions, num_differences, first, parted
        )


class Fed(NamedTuple):
    """What one record of a worker's log brought.

    decided: logged and replayed hash of a plan. planned: that plan, which has no chunks if nothing
    could run. ended: the plan of the step that the record ends. update: for the outside.
    """

    decided: tuple[bytes, bytes] | None
    planned: StepPlan | None
    ended: StepPlan | None
    update: Update


class WorkerReplay:
    """The policy of one worker, fed with its log. `plans`: of the steps in flight, by number.

    Raises:
        BadLog: no worker can be as the header says.
    """

    def __init__(self, header: log.WorkerHeader, changes: Mapping[str, int] | None = None) -> None:
        if not _is_possible(header.config):
            raise log.BadLog("the log is damaged: it names a worker that cannot be")
        config = _changed(header.config, changes or {})
        index = StoreIndex(config.num_frames)
        # The secret only signs grants; no decision depends on it.
        leases = LeaseTable(header.worker_id, header.epoch, bytes(32), index)
        self.scheduler = Scheduler(config, leases, index)
        self.plans: dict[int, StepPlan] = {}

    def feed(self, record: log.Record) -> Fed:
        """Give the scheduler what it was given.

        Raises:
            Parted: it has come to another state than it was in.
            BadLog: a record of a router.
        """
        scheduler, plans = self.scheduler, self.plans
        decided = planned = ended = None
        match record:
            case log.Added(request, now):
                scheduler.add(request, now)
            case log.Aborted(seq_id):
                scheduler.abort(seq_id)
            case log.Allowed(seq_id):
                scheduler.proceed(seq_id)
            case log.Drained():
                scheduler.drain()
            case log.Exported(key, digest, now):
                if not scheduler.exports.is_copying(key):
                    raise Parted("the log seals a block that was not given to the store")
                scheduler.exported(key, digest, now)
            case log.Linked(source):
                scheduler.link(source)
            case log.Imported(number, results, now, elapsed_s):
                if scheduler.fetches.num_wanted(number) != len(results):
                    raise Parted("the log ends a fetch that was not asked for")
                scheduler.imported(number, results, now, elapsed_s)
            case log.Offered(sealed, now):
                scheduler.offer(sealed, now)
            case log.Lent(ask, now):
                scheduler.lend(ask, now)
            case log.Renewed(grant_ids, now):
                scheduler.renew(grant_ids, now)
            case log.Released(grant_ids):
                scheduler.release(grant_ids)
            case log.Scheduled(now, decision):
                if len(plans) == MAX_DEPTH:
                    raise Parted(f"step {next(iter(plans))} did not end")
                planned = scheduler.schedule(now)
                if planned.chunks:
                    plans[planned.step] = planned
                decided = (decision, log.plan_hash(planned))
            case log.Updated(step, token_ids, elapsed_s, now):
                if step != next(iter(plans), None):
                    raise Parted(f"step {step} is not the next to end")
                ended = plans.pop(step)
                if [c.samples for c in ended.chunks] != [bool(t) for t in token_ids]:
                    raise Parted(f"step {step} drew tokens for other sequences")
                output = StepOutput(token_ids, [None] * len(token_ids), elapsed_s)
                scheduler.update(ended, output, now)
            case _:
                raise log.BadLog("a router's record in a worker's log")
        return Fed(decided, planned, ended, scheduler.take())


def feed_router(
    router: Router, record: log.Record
) -> tuple[tuple[bytes, bytes], Placement | Unavailable] | None:
    """Give the router what it was given; of a placement, both hashes and what it came to.

    Raises:
        BadLog: a record of a worker.
    """
    match record:
        case log.Joined(info):
            router.join(info)
        case log.Left(worker_id):
            router.leave(worker_id)
        case log.Placed(request_id, choice, num_tokens, keys, key_class, now, decision):
            placement: Placement | Unavailable
            try:
                placement = router.place(request_id, choice, num_tokens, keys, key_class, now)
                found = log.placement_hash(placement)
            except Unavailable as refusal:
                placement, found = refusal, log.placement_hash(None)
            return (decision, found), placement
        case log.Timed(worker_id, told):
            router.timed(worker_id, told)
        case log.Kept(worker_id, keys):
            router.kept(worker_id, keys)
        case log.Prefilled(request_id, choice, now):
            router.prefilled(request_id, choice, now)
        case log.Finished(request_id, choice, now):
            router.finished(request_id, choice, now)
        case _:
            raise log.BadLog("a worker's record in a router's log")
    return None


def _drive(
    worker: WorkerReplay, records: Iterator[log.Record]
) -> Iterator[tuple[bytes, bytes] | None]:
    for record in records:
        yield worker.feed(record).decided


def _route(records: Iterator[log.Record]) -> Iterator[tuple[bytes, bytes] | None]:
    router = Router()
    for record in records:
        placed = feed_router(router, record)
        yield None if placed is None else placed[0]
