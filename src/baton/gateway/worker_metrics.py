"""What workers report of themselves, what befell their requests, and how far predictions were off,
as metrics of the gateway."""

from __future__ import annotations

from collections.abc import Iterable

from baton.gateway.auditor import Auditor
from baton.gateway.placement import PlacingDispatcher
from baton.gateway.registry import Member
from baton.observe import metrics as table
from baton.observe.metrics import Metrics


def export(dispatcher: PlacingDispatcher, metrics: Metrics) -> None:
    """Bring everything that is kept elsewhere up to now."""
    export_workers(dispatcher.registry.joined(), metrics)
    export_audit(dispatcher.auditor, metrics)
    for event, total in dispatcher.counters.items():
        metrics.set_total(table.GATEWAY_EVENTS, total, event=event)


def export_workers(members: Iterable[Member], metrics: Metrics) -> None:
    """Bring the workers' series up to their last reports. One that is gone shows as not up."""
    metrics.clear(table.WORKER_UP)
    metrics.clear(table.WORKER_FROZEN)
    for member in members:
        worker, load = member.announced.worker_id, member.load
        metrics.set(table.WORKER_UP, 1, worker=worker, role=member.announced.role.value)
        metrics.set(table.WORKER_FROZEN, int(member.frozen), worker=worker)
        metrics.set(table.WORKER_RUNNING, load.num_running, worker=worker)
        metrics.set(table.WORKER_WAITING, load.num_waiting, worker=worker)
        metrics.set(table.STORE_FRAMES_HELD, load.num_held_frames, worker=worker)
        metrics.set(table.STORE_FRAMES_RESERVED, load.num_reserved_frames, worker=worker)
        metrics.set(table.LEASES, load.num_leases, worker=worker)
        metrics.set(table.BLOCK_TRANSFERS, load.num_transfers, worker=worker)
        metrics.set(table.STEP_SECONDS, load.step_s, worker=worker)
        used = load.num_total_blocks - load.num_free_blocks
        metrics.set(table.KV_CACHE_USAGE, _share(used, load.num_total_blocks), worker=worker)
        metrics.set(
            table.STORE_USAGE, _share(load.store_used_bytes, load.store_total_bytes), worker=worker
        )
        for event, total in member.counters.items():
            metrics.set_total(table.WORKER_EVENTS, total, worker=worker, event=event)


def export_audit(auditor: Auditor, metrics: Metrics) -> None:
    """Bring predictions beside measurements up to now. A worker that is gone has none."""
    for gauge in (table.PREDICTION_ERROR, table.PREDICTION_RATIO, table.PLAN_STALE):
        metrics.clear(gauge)
    metrics.clear(table.PLAN_STRAIN)
    for each in auditor.errors():
        labels = {"worker": each.worker, "stage": each.stage.value}
        metrics.set_total(table.PREDICTIONS, each.count, **labels)
        metrics.set(table.PREDICTION_ERROR, each.median, **labels, quantile="0.5")
        metrics.set(table.PREDICTION_ERROR, each.p90, **labels, quantile="0.9")
        metrics.set(table.PREDICTION_RATIO, each.ratio, **labels)
    for finding in auditor.findings():
        reason = finding.reason.value
        metrics.set(table.PLAN_STALE, float(finding.is_stale), reason=reason)
        metrics.set(table.PLAN_STRAIN, finding.strain, reason=reason)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
