"""A sequence's way out of one worker and into the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from sim_engine import Client, SimWorker, make_config, make_request, run_alone

from baton.core.plan import Update
from baton.types import FinishReason, Handoff

PROMPT = (1, 2, 3, 4, 5)


def _prefilled(worker: SimWorker, name: str = "a", prompt: Any = PROMPT, **fields: Any) -> Client:
    request = make_request(name, prompt, 4, hand_off=True, **fields)
    (client,) = run_alone(worker, [request])
    assert client.handoff is not None
    return client


def _start_import(worker: SimWorker, client: Client, handoff: Handoff | None = None) -> None:
    request = client.next_leg(hand_off=False, handoff=handoff or client.handoff)
    worker.scheduler.add(request, 0.0)
    _absorb(client, worker.step(0.0))


def _absorb(client: Client, update: Update) -> None:
    for delta in update.deltas:
        client.take(delta)


def _finish(worker: SimWorker, client: Client) -> None:
    for _ in range(20):
        _absorb(client, worker.step(0.0))
    assert client.finish is FinishReason.LENGTH


def test_the_first_token_leaves_before_the_commit_record() -> None:
    worker = SimWorker(make_config())
    worker.scheduler.add(make_request("a", PROMPT, 4, hand_off=True), 1.0)
    update = worker.step(1.0)
    assert len(update.deltas) == 1
    assert update.deltas[0].finish is None
    assert len(update.exports) == 3
    for _ in range(2):
        assert not worker.finish_export(1, 2.0).handoffs
    update = worker.finish_export(0, 3.0)
    (handoff,) = update.handoffs
    assert handoff.num_tokens == len(PROMPT)
    assert update.times[0].export_s == 2.0
    assert not worker.scheduler.num_sequences
    worker.scheduler.release((handoff.grant.grant_id,))
    worker.check_empty()


def test_what_is_sealed_between_two_reports_is_told_in_one_piece() -> None:
    worker = SimWorker(make_config())
    worker.scheduler.add(make_request("a", PROMPT, 4, hand_off=True), 1.0)
    first, second, tail = worker.step(1.0).exports
    for order in (first, second):
        worker.scheduler.exported(order.key, b"digest", 2.0)
    (told,) = worker.scheduler.take().sealed
    assert told.keys == (first.key, second.key)
    assert told.frames == (first.frame, second.frame)
    assert told.first == 0
    worker.scheduler.exported(tail.key, b"digest", 3.0)
    update = worker.scheduler.take()
    assert not update.sealed
    assert update.handoffs[0].grant == told.grant


def test_what_is_committed_by_then_is_told_by_the_commit_record_alone() -> None:
    worker = SimWorker(make_config())
    worker.scheduler.add(make_request("a", PROMPT, 4, hand_off=True), 1.0)
    for order in worker.step(1.0).exports:
        worker.scheduler.exported(order.key, b"digest", 2.0)
    update = worker.scheduler.take()
    assert not update.sealed
    (handoff,) = update.handoffs
    assert len(handoff.keys) == 3
    assert len(worker.scheduler.exports.leases.keys(handoff.grant.grant_id)) == 3


def test_an_abandoned_prompt_is_not_told_of() -> None:
    worker = SimWorker(make_config())
    worker.scheduler.add(make_request("a", PROMPT, 4, hand_off=True), 1.0)
    orders = worker.step(1.0).exports
    worker.scheduler.exported(orders[0].key, b"digest", 2.0)
    worker.scheduler.abort(("a", 0, 0))
    assert not worker.scheduler.take().sealed


def test_full_blocks_leave_after_each_chunk() -> None:
    worker = SimWorker(make_config(max_num_batched_tokens=2))
    worker.scheduler.add(make_request("a", PROMPT, 4, hand_off=True), 0.0)
    assert [len(worker.step(0.0).exports) for _ in range(3)] == [1, 1, 1]


def test_decode_computes_no_prompt_token() -> None:
    prefill, decode = SimWorker(make_config()), SimWorker(make_config())
    client = _prefilled(prefill)
    _start_import(decode, client)
    assert not decode.runner.num_computed
    decode.finish_import(0, prefill, 0.0)
    _finish(decode, client)
    assert decode.scheduler.counters["prompt_tokens_computed"] == 0
    assert decode.scheduler.counters["imported_blocks"] == 3
    assert not decode.num_fallbacks()
    decode.check_empty()


def test_imported_blocks_serve_as_prefix() -> None:
    prefill, decode = SimWorker(make_config()), SimWorker(make_config())
    for name, num_wanted in (("a", 3), ("b", 1)):
        client = _prefilled(prefill, name)
        _start_import(decode, client)
        assert len(decode.imports[0].wanted) == num_wanted
        decode.finish_import(0, prefill, 0.0)
        _finish(decode, client)


def test_a_prompt_that_is_all_hits_needs_no_fetch() -> None:
    prefill, decode = SimWorker(make_config()), SimWorker(make_config())
    run_alone(decode, [make_request("x", PROMPT, 1)])
    client = _prefilled(prefill, prompt=PROMPT[:4])
    _start_import(decode, client)
    assert not decode.imports
    _finish(decode, client)
    assert decode.runner.num_computed == len(PROMPT) + 3


def test_equal_blocks_are_copied_once() -> None:
    worker = SimWorker(make_config())
    _prefilled(worker, "a")
    worker.scheduler.add(make_request("b", PROMPT, 4, hand_off=True), 0.0)
    assert len(worker.step(0.0).exports) == 1  # its private tail


@pytest.mark.parametrize("first_bad", [0, 1, 2])
def test_what_does_not_verify_is_recomputed(first_bad: int) -> None:
    prefill, decode = SimWorker(make_config()), SimWorker(make_config())
    client = _prefilled(prefill)
    _start_import(decode, client)

    def spoil(results: tuple[str, ...]) -> tuple[str, ...]:
        return (*results[:first_bad], "corrupt", *results[first_bad + 1 :])

    decode.finish_import(0, prefill, 0.0, spoil)
    _finish(decode, client)
    counters = decode.scheduler.counters
    assert counters["prompt_tokens_computed"] == len(PROMPT) - 2 * first_bad
    assert counters["fallback_import_corrupt"] == 1
    assert counters["imported_blocks"] == first_bad
    decode.check_empty()


def _key(handoff: Handoff) -> Handoff:
    return msgspec.structs.replace(handoff, keys=(b"x" * 32, *handoff.keys[1:]))


def _tail_key(handoff: Handoff) -> Handoff:
    return msgspec.structs.replace(handoff, keys=(*handoff.keys[:-1], b"x" * 32))


def _short(handoff: Handoff) -> Handoff:
    return msgspec.structs.replace(handoff, digests=handoff.digests[:-1])


def _long(handoff: Handoff) -> Handoff:
    return msgspec.structs.replace(handoff, num_tokens=handoff.num_tokens + 1)


def _negative(handoff: Handoff) -> Handoff:
    return msgspec.structs.replace(handoff, num_tokens=-5, keys=(), digests=(), frames=())


def _format(handoff: Handoff) -> Handoff:
    other = msgspec.structs.replace(handoff.kv_format, dtype="float8")
    return msgspec.structs.replace(handoff, kv_format=other)


def _request(handoff: Handoff) -> Handoff:
    return msgspec.structs.replace(handoff, request_id="b")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_key, "key"),
        (_tail_key, "key"),
        (_short, "length"),
        (_long, "length"),
        (_negative, "length"),
        (_format, "format"),
        (_request, "request"),
    ],
)
def test_a_handoff_that_does_not_fit_is_refused(
    change: Callable[[Handoff], Handoff], reason: str
) -> None:
    prefill, decode = SimWorker(make_config()), SimWorker(make_config())
    client = _prefilled(prefill)
    assert client.handoff is not None
    _start_import(decode, client, change(client.handoff))
    assert not decode.imports
    _finish(decode, client)
    assert decode.scheduler.counters[f"fallback_import_{reason}"] == 1
    assert decode.num_fallbacks() == 1


def test_a_refused_handoff_is_counted_once_however_long_it_waits() -> None:
    prefill, decode = SimWorker(make_config()), SimWorker(make_config(num_blocks=8))
    client = _prefilled(prefill)
    assert client.handoff is not None
    decode.scheduler.add(make_request("other", [9] * 9, 6), 0.0)
    decode.step(0.0)
    request = client.next_leg(hand_off=False, handoff=_format(client.handoff))
    decode.scheduler.add(request, 0.0)
    for _ in range(15):
        decode.step(0.0)
    assert decode.num_fallbacks() == 1


def test_a_later_attempt_may_use_the_handoff_of_an_earlier_one() -> None:
    prefill, decode = SimWorker(make_config()), SimWorker(make_config())
    client = _prefilled(prefill)
    request = client.next_leg(hand_off=False, handoff=client.handoff, attempt=1)
    decode.scheduler.add(request, 0.0)
    decode.step(0.0)
    decode.finish_import(0, prefill, 0.0)
    _finish(decode, client)
    assert decode.scheduler.counters["imported_blocks"] == 3


def test_abort_during_the_fetch_keeps_the_blocks_until_it_ends() -> None:
    prefill, decode = SimWorker(make_config()), SimWorker(make_config())
    client = _prefilled(prefill)
    _start_import(decode, client)
    decode.scheduler.abort(client.id)
    decode.settle()
    assert decode.scheduler.pool.num_free == 13
    assert not decode.scheduler.num_sequences
    assert decode.scheduler.num_transfers == 1
    decode.finish_import(0, prefill, 0.0, lambda results: ("missing",) * len(results))
    assert not decode.num_fallbacks()  # nobody fell back
    decode.check_empty()


def test_abort_during_the_copy_keeps_the_block_until_it_ends() -> None:
    worker = SimWorker(make_config())
    worker.scheduler.add(make_request("a", PROMPT, 4, hand_off=True), 0.0)
    worker.step(0.0)
    worker.scheduler.abort(("a", 0, 0))
    worker.settle()
    assert worker.scheduler.pool.num_free == 13
    for _ in range(3):
        assert not worker.finish_export(0, 0.0).handoffs
    worker.check_empty()


def test_a_failed_copy_ends_all_that_waited_for_it() -> None:
    worker = SimWorker(make_config())
    for name in "ab":
        worker.scheduler.add(make_request(name, PROMPT, 4, hand_off=True), 0.0)
    worker.step(0.0)
    assert len(worker.exports) == 4  # two shared, two tails
    update = worker.finish_export(0, 0.0, ok=False)
    assert {d.request_id for d in update.deltas} == {"a", "b"}
    assert {d.error.code for d in update.deltas if d.error} == {"transfer_failed"}
    while worker.exports:
        assert not worker.finish_export(0, 0.0).deltas
    worker.check_empty()
    (client,) = run_alone(worker, [make_request("c", PROMPT, 4, hand_off=True)])
    assert client.handoff is not None


def test_full_store_holds_back_admission_until_a_lease_ends() -> None:
    worker = SimWorker(make_config(num_frames=3))
    client = _prefilled(worker)
    assert client.handoff is not None
    worker.scheduler.add(make_request("b", (7, 8, 9), 4, hand_off=True), 0.0)
    assert not worker.step(1.0).deltas
    assert worker.scheduler.counters["store_full_waits"] == 1
    worker.scheduler.release((client.handoff.grant.grant_id,))
    assert worker.step(1.0).deltas


def test_a_lease_that_is_not_renewed_expires() -> None:
    worker = SimWorker(make_config(lease_ttl_s=10.0))
    client = _prefilled(worker)
    assert client.handoff is not None
    grant = client.handoff.grant.grant_id
    worker.scheduler.renew((grant,), 6.0)
    worker.step(15.0)
    assert grant in worker.leases
    assert worker.scheduler.next_deadline() == 16.0
    worker.step(16.0)
    assert grant not in worker.leases
    worker.scheduler.renew((grant,), 16.0)
    assert worker.scheduler.counters["late_renewals"] == 1
    worker.check_empty()


def test_a_draining_worker_stays_while_its_blocks_may_be_read() -> None:
    worker = SimWorker(make_config())
    client = _prefilled(worker)
    assert client.handoff is not None
    worker.scheduler.drain()
    assert not worker.scheduler.is_drained()
    worker.scheduler.release((client.handoff.grant.grant_id,))
    assert worker.scheduler.is_drained()


def test_grant_ids_never_come_twice() -> None:
    worker = SimWorker(make_config())
    first = _prefilled(worker)
    worker.scheduler.books.attempts = type(worker.scheduler.books.attempts)()  # all is forgotten
    second = _prefilled(worker)
    assert first.handoff is not None
    assert second.handoff is not None
    assert first.handoff.grant.grant_id != second.handoff.grant.grant_id


def test_a_first_token_that_stops_needs_no_handoff() -> None:
    worker = SimWorker(make_config())
    (client,) = run_alone(worker, [make_request("a", PROMPT, 1, hand_off=True)])
    assert client.finish is FinishReason.LENGTH
    assert client.handoff is None
    worker.check_empty()


def test_a_preempted_export_goes_on_where_it_was() -> None:
    worker = SimWorker(make_config(num_blocks=8, max_num_batched_tokens=4))
    worker.scheduler.add(make_request("old", [9, 9, 9], 9), 0.0)
    worker.step(0.0)
    worker.scheduler.add(make_request("a", list(range(11)), 4, hand_off=True), 0.0)
    client = Client(make_request("a", list(range(11)), 4, hand_off=True))
    for step in range(60):
        update = worker.step(0.0)
        if step > 4:
            while worker.exports:
                more = worker.finish_export(-1, 0.0)
                update.handoffs += more.handoffs
        for delta in update.deltas:
            if delta.request_id == "a":
                client.take(delta)
        for handoff in update.handoffs:
            client.take_handoff(handoff)
    assert worker.scheduler.counters["preemptions"]
    assert client.handoff is not None
    assert len(client.handoff.keys) == 6
