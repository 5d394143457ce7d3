"""Run a decision log through the policy code again and compare every decision.

With the configuration it was made with, a log must replay without a difference. With another one
(`changes`) the differences show where the policy would have parted from what happened; from the
first one on, the inputs are those of another history, so only its place is meaningful.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec

from baton.core import decision_log as log
from baton.core.in_flight import MAX_DEPTH
from baton.core.lease import LeaseTable
from baton.core.limits import SchedulerConfig
from baton.core.plan import StepOutput, StepPlan
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
    if not _is_possible(header.config):
        raise log.BadLog("the log is damaged: it names a worker that cannot be")
    config = _changed(header.config, changes or {})
    index = StoreIndex(config.num_frames)
    # The secret only signs grants; no decision depends on it.
    leases = LeaseTable(header.worker_id, header.epoch, bytes(32), index)
    return _Comparison(header.worker_id).run(_drive(Scheduler(config, leases, index), records))


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


class _Parted(Exception):
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
        except _Parted as error:
            parted = str(error)
            num_differences += 1
            first = first or num_decisions
        return ReplayReport(
            self._source, num_records, num_decisions, num_differences, first, parted
        )


def _drive(
    scheduler: Scheduler, records: Iterator[log.Record]
) -> Iterator[tuple[bytes, bytes] | None]:
    plans: dict[int, StepPlan] = {}
    for record in records:
        decided = None
        match record:
            case log.Added(request, now):
                scheduler.add(request, now)
            case log.Aborted(seq_id):
                scheduler.abort(seq_id)
            case log.Drained():
                scheduler.drain()
            case log.Exported(key, digest, now):
                if not scheduler.exports.is_copying(key):
                    raise _Parted("the log seals a block that was not given to the store")
                scheduler.exported(key, digest, now)
            case log.Linked(source):
                scheduler.link(source)
            case log.Imported(number, results, now, elapsed_s):
                if scheduler.fetches.num_wanted(number) != len(results):
                    raise _Parted("the log ends a fetch that was not asked for")
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
                    raise _Parted(f"step {next(iter(plans))} did not end")
                plan = scheduler.schedule(now)
                if plan.chunks:
                    plans[plan.step] = plan
                decided = (decision, log.plan_hash(plan))
            case log.Updated(step, token_ids, elapsed_s, now):
                if step != next(iter(plans), None):
                    raise _Parted(f"step {step} is not the next to end")
                done = plans.pop(step)
                if [c.samples for c in done.chunks] != [bool(t) for t in token_ids]:
                    raise _Parted(f"step {step} drew tokens for other sequences")
                output = StepOutput(token_ids, [None] * len(token_ids), elapsed_s)
                scheduler.update(done, output, now)
            case _:
                raise log.BadLog("a router's record in a worker's log")
        scheduler.take()
        yield decided


def _route(records: Iterator[log.Record]) -> Iterator[tuple[bytes, bytes] | None]:
    router = Router()
    for record in records:
        decided = None
        match record:
            case log.Joined(info):
                router.join(info)
            case log.Left(worker_id):
                router.leave(worker_id)
            case log.Placed(request_id, choice, num_tokens, keys, decision):
                placement: Placement | None = None
                try:
                    placement = router.place(request_id, choice, num_tokens, keys)
                except Unavailable:
                    placement = None
                decided = (decision, log.placement_hash(placement))
            case log.Timed(worker_id, times):
                router.timed(worker_id, times)
            case log.Kept(worker_id, keys):
                router.kept(worker_id, keys)
            case log.Prefilled(request_id, choice):
                router.prefilled(request_id, choice)
            case log.Finished(request_id, choice):
                router.finished(request_id, choice)
            case _:
                raise log.BadLog("a worker's record in a router's log")
        yield decided
