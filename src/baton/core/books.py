"""What the books of a scheduler say: its load, and whether they agree. Reads them, changes none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from baton.types import WorkerLoad

if TYPE_CHECKING:
    from baton.core.scheduler import Scheduler


def load(scheduler: Scheduler) -> WorkerLoad:
    """See `Scheduler.load`."""
    waiting, running = scheduler._waiting, scheduler._running
    return WorkerLoad(
        num_total_blocks=scheduler.pool.num_blocks,
        num_free_blocks=scheduler.pool.num_free,
        num_running=scheduler._num_active(),
        num_waiting=len(waiting) + len(scheduler.fetches.arriving),
        num_waiting_tokens=sum(seq.num_remaining for seq in waiting)
        + sum(seq.num_remaining for seq in running.values() if seq.num_remaining > 1),
    )


def check(scheduler: Scheduler) -> None:
    """See `Scheduler.check`."""
    pool, in_flight = scheduler.pool, scheduler._in_flight
    pool.check()
    wanted = [0] * pool.num_blocks
    for seq in scheduler._sequences.values():
        for block in seq.blocks:
            wanted[block] += 1
        if not in_flight:
            assert seq.num_scheduled == seq.num_computed, f"{seq.id} awaits no step"
            assert seq.num_expected == seq.num_tokens, f"{seq.id} awaits no token"
    for block in (
        *scheduler.exports.blocks_in_transfer(),
        *scheduler.fetches.blocks_in_transfer(),
        *in_flight.held_blocks(),
    ):
        wanted[block] += 1
    for block, refs in enumerate(wanted):
        assert pool.refs(block) == refs, f"block {block}: {refs} owners"
