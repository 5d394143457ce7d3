"""Scheduler policy: what runs, in which order, and how a sequence ends."""

from __future__ import annotations

import math
from typing import Any

import pytest
from sim_engine import (
    Client,
    SimWorker,
    expected_tokens,
    make_config,
    make_request,
    run_alone,
)

from baton.core import prompt_order
from baton.core.keys import chain, root_key
from baton.core.plan import StepPlan, Update
from baton.types import FinishReason, Lend


def _plan(worker: SimWorker, now: float = 0.0) -> StepPlan:
    """Schedule, compute, take in; returns the plan."""
    plan = worker.scheduler.schedule(now)
    if plan.chunks:
        worker.runner.submit(plan)
        worker.scheduler.update(plan, worker.runner.collect(), now)
    return plan


def _chunks(plan: StepPlan) -> list[tuple[str, int, int]]:
    return [(c.seq.request.id, c.start, c.num_tokens) for c in plan.chunks]


def _add(worker: SimWorker, name: str, num_prompt: int, max_tokens: int = 4, **fields: Any) -> None:
    first = sum(map(ord, name)) * 100
    prompt = list(range(first, first + num_prompt))
    worker.scheduler.add(make_request(name, prompt, max_tokens, **fields), 0.0)


def _error(update: Update) -> tuple[str, str | None]:
    (delta,) = update.deltas
    assert delta.finish is FinishReason.ERROR
    assert delta.error is not None
    return delta.error.code, delta.error.param


def test_a_long_prompt_is_chunked_by_the_budget() -> None:
    worker = SimWorker(make_config(max_num_batched_tokens=4))
    _add(worker, "a", 10)
    assert _chunks(_plan(worker)) == [("a", 0, 4)]
    assert _chunks(_plan(worker)) == [("a", 4, 4)]
    assert not worker.settle().deltas
    plan = _plan(worker)
    assert _chunks(plan) == [("a", 8, 2)]
    assert plan.chunks[0].samples
    assert len(worker.settle().deltas) == 1


def test_decodes_go_before_prompts() -> None:
    worker = SimWorker(make_config(max_num_batched_tokens=4))
    _add(worker, "a", 3, 9)
    _plan(worker)
    _add(worker, "b", 20)
    for step in range(4):
        assert _chunks(_plan(worker)) == [("a", 3 + step, 1), ("b", 3 * step, 3)]


def test_first_come_first_served() -> None:
    worker = SimWorker(make_config(max_num_batched_tokens=8))
    for name in "abc":
        _add(worker, name, 6)
    assert _chunks(_plan(worker)) == [("a", 0, 6), ("b", 0, 2)]
    assert _chunks(_plan(worker)) == [("a", 6, 1), ("b", 2, 4), ("c", 0, 3)]


def test_a_short_prompt_passes_a_long_one_between_chunks() -> None:
    worker = SimWorker(make_config(max_num_batched_tokens=4))
    _add(worker, "long", 12, 1)
    assert _chunks(_plan(worker)) == [("long", 0, 4)]
    blocks = list(worker.scheduler.books.sequences["long", 0, 0].blocks)
    _add(worker, "short", 3, 1)
    assert _chunks(_plan(worker)) == [("short", 0, 3), ("long", 4, 1)]
    assert worker.scheduler.books.sequences["long", 0, 0].blocks == blocks
    _add(worker, "longer", 13, 1)
    assert _chunks(_plan(worker)) == [("long", 5, 4)]
    assert _chunks(_plan(worker)) == [("long", 9, 3), ("longer", 0, 1)]


def _steps_among_short_ones(monkeypatch: pytest.MonkeyPatch, passing: int, **limits: int) -> int:
    """Steps until a prompt of 12 tokens has its first, while one of 2 comes with every step."""
    monkeypatch.setattr(prompt_order, "PASSING", passing)
    worker = SimWorker(make_config(**limits))
    _add(worker, "x", 2, 3)
    _add(worker, "y", 2, 3)
    _plan(worker)
    _add(worker, "big", 12, 1)
    for step in range(200):
        _add(worker, f"small-{step}", 2, 3)
        _plan(worker)
        if any(delta.request_id == "big" for delta in worker.settle().deltas):
            return step
    return 200


@pytest.mark.parametrize("limits", [{"num_blocks": 8}, {"max_num_batched_tokens": 4}])
def test_a_long_prompt_is_not_starved(
    monkeypatch: pytest.MonkeyPatch, limits: dict[str, int]
) -> None:
    """Neither where blocks are scarce nor where the budget is."""
    assert _steps_among_short_ones(monkeypatch, 0, **limits) < 15  # first come, first served
    assert _steps_among_short_ones(monkeypatch, 4, **limits) < 60
    assert _steps_among_short_ones(monkeypatch, 1 << 20, **limits) == 200  # no ageing


def test_an_aged_head_of_the_queue_is_not_overtaken() -> None:
    worker = SimWorker(make_config(num_blocks=8))
    _add(worker, "a", 6, 4)  # 3 blocks, and 5 in the end
    _plan(worker)
    _add(worker, "big", 12, 4)
    worker.scheduler.admission.num_admitted_tokens += 4 * 12  # others were admitted since it came
    _add(worker, "small", 1, 1)
    assert {name for name, _, _ in _chunks(_plan(worker))} == {"a"}
    assert worker.scheduler.load().num_waiting == 2


def test_what_was_preempted_goes_before_new_ones() -> None:
    worker = SimWorker(make_config(num_blocks=7, max_num_batched_tokens=32))
    for name in "ab":
        _add(worker, name, 5, 6)
    while not worker.scheduler.counters["preemptions"]:
        _plan(worker)
    _add(worker, "c", 1, 1)
    waiting = []
    while worker.scheduler.books.waiting:
        waiting.append([seq.request.id for seq in worker.scheduler.books.waiting])
        _plan(worker)
    assert waiting[0] == ["b", "c"]
    assert ["b"] not in waiting


def test_max_num_seqs_and_budget_bound_the_running() -> None:
    worker = SimWorker(make_config(max_num_seqs=3, max_num_batched_tokens=100))
    narrow = SimWorker(make_config(max_num_seqs=9, max_num_batched_tokens=2))
    for w in (worker, narrow):
        for name in "abcde":
            _add(w, name, 1, 20)
        for _ in range(8):
            _plan(w)
    assert worker.scheduler.load().num_running == 3
    assert narrow.scheduler.load().num_running == 2


def test_the_newest_is_preempted_and_goes_to_the_front() -> None:
    worker = SimWorker(make_config(num_blocks=7, max_num_batched_tokens=32))
    for name in "abc":
        _add(worker, name, 3, 8)  # 2 blocks each, 6 in the end
    while not worker.scheduler.counters["preemptions"]:
        _plan(worker)
    assert [s.request.id for s in worker.scheduler.books.running.values()] == ["a", "b"]
    assert [s.request.id for s in worker.scheduler.books.waiting] == ["c"]
    _add(worker, "d", 1, 8)
    seen = []
    while worker.scheduler.num_sequences:
        _plan(worker)
        seen += [d.request_id for d in worker.settle().deltas if d.finish]
    assert seen == ["a", "b", "c", "d"]


def test_preempted_streams_are_what_they_would_have_been() -> None:
    worker = SimWorker(make_config(num_blocks=7, max_num_batched_tokens=32))
    requests = [make_request(f"r{n}", [n, n, n], 10) for n in range(5)]
    for client in run_alone(worker, requests):
        assert client.received == expected_tokens(client.request.prompt, 10)
    assert worker.scheduler.counters["preemptions"] > 0
    worker.check_empty()


def test_preempted_in_a_step_is_not_admitted_in_the_same_step() -> None:
    worker = SimWorker(make_config(num_blocks=4, max_num_batched_tokens=32))
    _add(worker, "a", 3, 5)
    _add(worker, "b", 3, 5)
    while not worker.scheduler.counters["preemptions"]:
        plan = _plan(worker)
    assert [name for name, _, _ in _chunks(plan)] == ["a"]


def test_admission_leaves_room_for_learned_lengths() -> None:
    def peak(learned: bool) -> int:
        worker = SimWorker(make_config(num_blocks=20, max_num_batched_tokens=64))
        if learned:
            worker.scheduler.admission.lengths.observe(15)
        for n in range(8):
            _add(worker, f"r{n}", 2, 15)
        _plan(worker)
        return worker.scheduler.load().num_running

    assert peak(learned=False) == 8
    assert peak(learned=True) < 4


def test_prefix_hits_skip_work_but_never_the_last_token() -> None:
    worker = SimWorker(make_config())
    prompt = [1, 2, 3, 4, 5, 6]
    run_alone(worker, [make_request("a", prompt, 1)])
    worker.scheduler.add(make_request("b", prompt, 2), 1.0)
    assert _chunks(_plan(worker, 1.0)) == [("b", 4, 2)]
    (delta,) = worker.settle().deltas
    assert delta.num_cached == 4
    _plan(worker, 1.0)
    (delta,) = worker.settle().deltas
    assert delta.num_cached is None  # told once


def test_salts_and_the_switch_separate_caches() -> None:
    worker = SimWorker(make_config())
    off = SimWorker(make_config(prefix_cache=False))
    for w in (worker, off):
        run_alone(w, [make_request("a", [1, 2, 3, 4, 5], 1, salt=b"one")])
    assert worker.scheduler.pool.num_cached == 2
    assert off.scheduler.pool.num_cached == 0
    for w, salt in ((worker, b"two"), (off, b"one")):
        w.scheduler.add(make_request("b", [1, 2, 3, 4, 5], 1, salt=salt), 0.0)
        assert _chunks(_plan(w)) == [("b", 0, 5)]


def test_ends_by_stop_token_by_max_tokens_and_by_model_length() -> None:
    worker = SimWorker(make_config(max_model_len=9))
    tokens = expected_tokens([1, 2, 3], 8)
    stopped, limited, full = run_alone(
        worker,
        [
            make_request("stop", [1, 2, 3], 5, stop=tokens[2:3]),
            make_request("max", [1, 2, 3], 5),
            make_request("max", [1, 2, 3], 6, choice=1),
        ],
    )
    assert (stopped.received, stopped.finish) == (tokens[:3], FinishReason.STOP)
    assert (limited.received, limited.finish) == (tokens[:5], FinishReason.LENGTH)
    assert (full.received, full.finish) == (tokens[:6], FinishReason.LENGTH)
    worker = SimWorker(make_config(max_model_len=6))
    worker.scheduler.add(make_request("long", [1, 2, 3], 50), 0.0)
    finished = [d for _ in range(9) for d in worker.step(0.0).deltas]
    assert [t for d in finished for t in d.token_ids] == tokens[:3]
    assert finished[-1].finish is FinishReason.LENGTH


def test_emitted_tokens_count() -> None:
    worker = SimWorker(make_config())
    tokens = expected_tokens([1, 2, 3], 5)
    request = make_request("a", [1, 2, 3], 5, emitted=tuple(tokens[:3]))
    client = Client(request)
    client.received = tokens[:3]
    worker.scheduler.add(request, 0.0)
    while not client.ended:
        for delta in worker.step(0.0).deltas:
            client.take(delta)
    assert client.received == tokens


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ()}, "prompt"),
        ({"prompt": (1, -1)}, "prompt"),
        ({"prompt": (1 << 20,)}, "prompt"),
        ({"prompt": (1,) * 64}, "prompt"),
        ({"prompt": (1,) * 20, "max_tokens": 20}, "max_tokens"),
        ({"prompt": (1,) * 10, "hand_off": True}, "prompt"),
        ({"prompt": (1,), "emitted": (1 << 70,)}, "emitted"),
        ({"prompt": (1,), "emitted": (1, 2, 3, 4)}, "max_tokens"),
        ({"prompt": (1,), "emitted": (1,) * 60, "max_tokens": 2}, "max_tokens"),
        ({"prompt": (1,), "deadline_s": math.nan}, "deadline_s"),
        ({"prompt": (1,), "deadline_s": math.inf}, "deadline_s"),
        ({"prompt": (1,), "max_tokens": 0}, "max_tokens"),
        ({"prompt": (1,), "stop": (1 << 40,)}, "stop_token_ids"),
    ],
)
def test_refuses_by_name(fields: dict[str, Any], param: str) -> None:
    worker = SimWorker(make_config(num_blocks=15, num_frames=4))
    worker.scheduler.add(make_request("a", **fields), 0.0)
    assert _error(worker.settle()) == ("invalid_request", param)
    assert worker.scheduler.counters["refused"] == 1
    worker.check_empty()


def test_the_worst_case_that_fits_is_served() -> None:
    worker = SimWorker(make_config(num_blocks=10))
    (client,) = run_alone(worker, [make_request("a", [1] * 10, 10)])
    assert client.finish is FinishReason.LENGTH


def test_abort_frees_at_once_and_says_nothing() -> None:
    worker = SimWorker(make_config())
    _add(worker, "a", 5)
    _plan(worker)
    worker.settle()
    worker.scheduler.abort(("a", 0, 0))
    worker.scheduler.abort(("a", 0, 0))
    worker.scheduler.abort(("unknown", 0, 0))
    assert not worker.settle().deltas
    worker.check_empty()


def test_abort_while_the_step_runs() -> None:
    worker = SimWorker(make_config())
    _add(worker, "a", 5)
    _add(worker, "b", 3)
    plan = worker.scheduler.schedule(0.0)
    worker.runner.submit(plan)
    worker.scheduler.abort(("a", 0, 0))
    worker.scheduler.update(plan, worker.runner.collect(), 0.0)
    assert [delta.request_id for delta in worker.settle().deltas] == ["b"]


def test_a_higher_attempt_replaces_and_a_lower_one_is_ignored() -> None:
    worker = SimWorker(make_config())
    _add(worker, "a", 5, attempt=1)
    _plan(worker)
    worker.settle()
    _add(worker, "a", 5, attempt=1)
    _add(worker, "a", 5, attempt=0)
    assert [seq.id for seq in worker.scheduler.books.sequences.values()] == [("a", 0, 1)]
    assert worker.scheduler.load().num_running == 1
    _add(worker, "a", 5, attempt=2)
    assert list(worker.scheduler.books.sequences) == [("a", 0, 2)]
    assert worker.scheduler.load().num_running == 0


def test_a_repeat_after_the_end_does_not_run_again() -> None:
    worker = SimWorker(make_config())
    run_alone(worker, [make_request("a", [1, 2], 2, attempt=3)])
    for attempt in (3, 2):
        worker.scheduler.add(make_request("a", [1, 2], 2, attempt=attempt), 1.0)
    assert not worker.scheduler.num_sequences
    worker.scheduler.add(make_request("a", [1, 2], 0, attempt=4), 1.0)
    assert len(worker.settle().deltas) == 1
    worker.scheduler.add(make_request("a", [1, 2], 0, attempt=4), 1.0)
    assert not worker.settle().deltas  # refused once
    worker.scheduler.add(make_request("a", [1, 2], 2, attempt=5), 1.0)
    assert worker.scheduler.num_sequences == 1


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_deadline_ends_with_a_typed_error(steps: int) -> None:
    worker = SimWorker(make_config(max_num_batched_tokens=4))
    _add(worker, "a", 6, 10, deadline_s=5.0)
    _add(worker, "b", 6, 3, deadline_s=50.0)
    assert worker.scheduler.next_deadline() == 5.0
    for _ in range(steps):
        worker.step(4.9)
    deltas = [d for d in worker.step(5.0).deltas if d.request_id == "a"]
    assert deltas[0].error is not None
    assert deltas[0].error.code == "deadline_exceeded"
    assert deltas[0].error.stage == ("queue", "prefill", "x", "decode")[steps]
    assert list(worker.scheduler.books.sequences) == [("b", 0, 0)]


def test_drain_finishes_what_runs() -> None:
    worker = SimWorker(make_config())
    _add(worker, "a", 4, 2)
    worker.scheduler.drain()
    assert not worker.scheduler.is_drained()
    _add(worker, "b", 4)
    assert _error(worker.settle()) == ("unavailable", None)
    worker.step(0.0)
    assert worker.step(0.0).deltas[0].finish is FinishReason.LENGTH
    assert worker.scheduler.is_drained()


def test_load_counts() -> None:
    worker = SimWorker(make_config(max_num_batched_tokens=4, max_num_seqs=1))
    _add(worker, "a", 7)
    _add(worker, "b", 10)
    _plan(worker)
    load = worker.scheduler.load()
    assert (load.num_running, load.num_waiting, load.num_waiting_tokens) == (1, 1, 3 + 10)
    assert (load.num_total_blocks, load.num_free_blocks) == (16, 12)


def test_stage_times() -> None:
    worker = SimWorker(make_config(max_num_batched_tokens=4))
    worker.scheduler.add(make_request("a", [1, 2, 3, 4, 5, 6], 3), 1.0)
    times = [t for now in (2.0, 4.0, 7.0, 11.0) for t in worker.step(now).times]
    (t,) = times
    assert (t.queue_s, t.prefill_s, t.decode_s, t.export_s, t.import_s) == (1, 2, 7, 0, 0)
    assert (t.num_prompt_computed, t.num_decoded) == (6, 2)


def test_stage_times_of_a_prompt_that_begins_with_borrowed_blocks() -> None:
    prompt = [1, 2, 3, 4, 5, 6]
    lender = SimWorker(make_config(keep_blocks=True), "lender")
    lender.scheduler.add(make_request("a", prompt, 1), 0.0)
    lender.step(0.0)
    while lender.exports:
        lender.finish_export(0, 0.0)
    keys = chain(root_key(b"weights", "exact", b""), prompt, 2)[:2]
    lender.scheduler.lend(Lend("b", 0, 0, "", 0, tuple(keys)), 0.0)
    (lent,) = lender.scheduler.take().sealed
    worker = SimWorker(make_config())
    worker.scheduler.add(make_request("b", prompt, 3, prefix=lent), 1.0)
    worker.step(2.0)
    worker.finish_import(0, lender, 5.0)
    (t,) = [t for now in (9.0, 14.0, 20.0) for t in worker.step(now).times]
    assert (t.queue_s, t.import_s, t.prefill_s, t.decode_s) == (1, 3, 4, 11)
    assert (t.num_prompt_computed, t.num_imported_blocks, t.num_decoded) == (2, 2, 2)
