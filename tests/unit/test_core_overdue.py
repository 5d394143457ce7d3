"""Fetches that do not end: what waited for them goes on without, in other blocks."""

from __future__ import annotations

import pytest
from sim_engine import Client, SimWorker, make_config, make_request, run_alone

from baton.core.fetches import OVERDUE_AFTER_S
from baton.core.imports import READ_WINDOW
from baton.core.plan import Update
from baton.core.sequence import Status
from baton.types import FinishReason, Sealed

PROMPT = (1, 2, 3, 4, 5)
LIMIT_S = 10.0 * READ_WINDOW + OVERDUE_AFTER_S
"""Of a fetch that begins at 0, under the lease of `make_config`."""


def absorb(client: Client, update: Update) -> None:
    for delta in update.deltas:
        client.take(delta)


def handed_off() -> Client:
    (client,) = run_alone(SimWorker(make_config()), [make_request("a", PROMPT, 4, hand_off=True)])
    return client


def importing(worker: SimWorker) -> Client:
    client = handed_off()
    worker.scheduler.add(client.next_leg(hand_off=False, handoff=client.handoff), 0.0)
    absorb(client, worker.step(0.0))
    assert len(worker.imports) == 1
    return client


def run(worker: SimWorker, client: Client, now: float) -> None:
    for _ in range(20):
        absorb(client, worker.step(now))
    assert client.finish is FinishReason.LENGTH


def late(worker: SimWorker, now: float, word: str = "ok") -> None:
    """The fetch writes where it was told to, and is acknowledged at last."""
    order = worker.imports.pop(0)
    for want in order.wanted:
        worker.kv.poison(want.block)
    worker.scheduler.imported(order.number, (word,) * len(order.wanted), now)
    worker.settle()


@pytest.mark.parametrize("word", ["ok", "timed_out"])
def test_what_waited_for_it_is_recomputed_in_other_blocks(word: str) -> None:
    worker = SimWorker(make_config())
    client = importing(worker)
    assert worker.scheduler.next_deadline() == pytest.approx(LIMIT_S)
    absorb(client, worker.step(LIMIT_S - 0.01))
    assert not client.ended
    blocks = {want.block for want in worker.imports[0].wanted}
    absorb(client, worker.step(LIMIT_S))
    (seq,) = worker.scheduler.books.sequences.values()
    assert seq.status is Status.RUNNING
    assert not blocks & set(seq.blocks)
    for block in blocks:  # it may write at any time
        worker.kv.poison(block)
    run(worker, client, LIMIT_S)
    assert worker.scheduler.counters["fallback_import_overdue"] == 1
    assert worker.scheduler.num_transfers == 0, "nobody waits for it"
    assert worker.scheduler.fetches.num_given_up == 1
    assert worker.scheduler.pool.num_free == worker.scheduler.pool.num_blocks - len(blocks)
    late(worker, 100.0, word)
    assert worker.scheduler.fetches.num_given_up == 0
    assert worker.scheduler.counters["imported_blocks"] == 0
    worker.check_empty()


def test_one_that_ends_in_time_is_not_given_up() -> None:
    worker = SimWorker(make_config())
    client = importing(worker)
    late(worker, 1.0, "unreachable")
    assert worker.scheduler.next_deadline() is None
    run(worker, client, 2 * LIMIT_S)
    assert worker.scheduler.counters["fallback_import_overdue"] == 0
    worker.check_empty()


def test_a_request_that_was_aborted_meanwhile() -> None:
    worker = SimWorker(make_config())
    client = importing(worker)
    worker.scheduler.abort(client.id)
    worker.step(LIMIT_S)
    assert worker.scheduler.num_transfers == 0
    late(worker, 100.0)
    worker.check_empty()


def test_it_does_not_keep_a_worker_from_draining() -> None:
    worker = SimWorker(make_config())
    client = importing(worker)
    worker.scheduler.drain()
    assert not worker.scheduler.is_drained()
    run(worker, client, LIMIT_S)
    assert worker.scheduler.is_drained()


def test_what_is_fetched_anew_is_not_mistaken_for_what_was_given_up() -> None:
    """A sequence waits for its own worker's store and for a handoff, and both do not end. It comes
    back and asks its store again, while the first fetches are still to be acknowledged."""
    worker = SimWorker(make_config(keep_blocks=True))
    pool, counters = worker.scheduler.pool, worker.scheduler.counters
    run_alone(worker, [make_request("before", PROMPT[:4], 1)])
    pool.release(pool.allocate(pool.num_free))  # the store has them still
    client = handed_off()
    worker.scheduler.add(client.next_leg(hand_off=False, handoff=client.handoff), 0.0)
    absorb(client, worker.step(0.0))
    assert [order.grant is None for order in worker.imports] == [True, False]
    absorb(client, worker.step(LIMIT_S))
    (seq,) = worker.scheduler.books.sequences.values()
    assert [order.grant is None for order in worker.imports] == [True, False, True]
    late(worker, LIMIT_S)
    late(worker, LIMIT_S)
    assert seq.status is Status.IMPORTING, "it waits for the third"
    absorb(client, worker.finish_import(0, worker, LIMIT_S))
    assert (seq.status, seq.num_computed) == (Status.RUNNING, 4)
    run(worker, client, LIMIT_S)
    assert counters["fallback_import_overdue"] == 1
    assert (counters["restored_blocks"], counters["imported_blocks"]) == (2, 0)
    while worker.exports:
        worker.finish_export(0, LIMIT_S)
    worker.check_empty()


def test_an_early_fetch_that_does_not_end_detains_nobody() -> None:
    client = handed_off()
    handoff = client.handoff
    assert handoff is not None
    worker = SimWorker(make_config())
    sealed = Sealed(
        "a", 0, 0, handoff.grant, 0, handoff.keys[:2], handoff.digests[:2], handoff.frames[:2]
    )
    worker.scheduler.offer(sealed, 0.0)
    worker.step(0.0)
    worker.scheduler.add(client.next_leg(hand_off=False, handoff=handoff), 0.0)
    (seq,) = worker.scheduler.books.sequences.values()
    worker.step(1.0)
    assert seq.status is Status.ARRIVING
    absorb(client, worker.step(LIMIT_S))
    assert seq.status is Status.IMPORTING, "it asks for them itself"
    assert worker.scheduler.counters["early_lost_overdue"] == 2
    assert len(worker.imports) == 2
    second = worker.imports.pop()
    worker.scheduler.imported(second.number, ("unreachable",) * 3, LIMIT_S)
    run(worker, client, LIMIT_S)
    late(worker, 100.0)
    assert worker.scheduler.counters["early_blocks"] == 0
    worker.check_empty()
