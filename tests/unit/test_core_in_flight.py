"""Planning a step while the one before it runs (depth 2)."""

from __future__ import annotations

import random

import pytest
from sim_engine import Client, SimWorker, expected_tokens, make_config, make_request, run_alone

from baton.core.plan import StepPlan
from baton.types import FinishReason, Request, SamplingParams

PROMPT = (1, 2, 3, 4, 5)


def _submit(worker: SimWorker) -> StepPlan:
    """Plan a step and submit it, without collecting anything."""
    plan = worker.scheduler.schedule(0.0)
    if plan.chunks:
        worker.runner.submit(plan)
        worker._plans.append(plan)
    return plan


def _chunks(plan: StepPlan) -> list[tuple[str, int, int, bool]]:
    return [(c.seq.request.id, c.start, c.num_tokens, c.samples) for c in plan.chunks]


def _collect(worker: SimWorker) -> list[int]:
    """Collect the oldest step; returns the tokens that came of it."""
    worker.scheduler.update(worker._plans.pop(0), worker.runner.collect(), 0.0)
    return [token for delta in worker.settle().deltas for token in delta.token_ids]


def test_a_decode_is_planned_before_its_token_is_known() -> None:
    worker = SimWorker(make_config(max_num_batched_tokens=4), depth=2)
    worker.scheduler.add(make_request("a", PROMPT, 3), 0.0)
    assert _chunks(_submit(worker)) == [("a", 0, 4, False)]
    assert _chunks(_submit(worker)) == [("a", 4, 1, True)]
    assert not _collect(worker)
    assert _chunks(_submit(worker)) == [("a", 5, 1, True)]  # of a token that is being drawn
    tokens = _collect(worker)
    assert _chunks(_submit(worker)) == [("a", 6, 1, True)]
    tokens += _collect(worker)
    assert not _submit(worker).chunks  # the third token, which is the last, is being drawn
    tokens += _collect(worker)
    assert tokens == expected_tokens(PROMPT, 3)
    assert worker.runner.num_computed == len(PROMPT) + 2
    worker.check_empty()


def test_nothing_runs_past_the_models_length() -> None:
    worker = SimWorker(make_config(max_model_len=8), depth=2)
    (client,) = run_alone_deep(worker, [make_request("a", PROMPT, 3)])
    assert client.finish is FinishReason.LENGTH
    worker.scheduler.add(make_request("b", PROMPT, 50), 0.0)
    deltas = [delta for _ in range(9) for delta in worker.step(0.0).deltas]
    assert [t for d in deltas for t in d.token_ids] == expected_tokens(PROMPT, 3)
    worker.check_empty()


def run_alone_deep(worker: SimWorker, requests: list[Request]) -> list[Client]:
    clients = run_alone(worker, requests)
    assert not worker.finish_steps(0.0).deltas
    return clients


def test_the_token_after_a_stop_token_is_thrown_away_and_its_block_kept_until_then() -> None:
    worker = SimWorker(make_config(prefix_cache=False), depth=2)
    tokens = expected_tokens(PROMPT, 3)
    worker.scheduler.add(make_request("a", PROMPT, 9, stop=tokens[1:2]), 0.0)
    _submit(worker)
    _submit(worker)
    assert _collect(worker) == tokens[:1]
    assert _chunks(_submit(worker)) == [("a", 6, 1, True)]
    worker.scheduler.drain()
    assert _collect(worker) == tokens[1:2]
    assert not worker.scheduler.num_sequences
    assert not worker.scheduler.is_drained()
    assert worker.scheduler.pool.num_free == worker.scheduler.pool.num_blocks - 4
    assert not _collect(worker)
    assert worker.scheduler.is_drained()
    worker.check_empty()


@pytest.mark.parametrize(
    "fields", [{"min_tokens": 2}, {"repetition_penalty": 1.2}, {"frequency_penalty": 1.0}]
)
def test_a_draw_that_reads_the_output_waits_for_it(fields: dict[str, float]) -> None:
    worker = SimWorker(make_config(), depth=2)
    params = SamplingParams(4, temperature=0.0, **fields)  # type: ignore[arg-type]
    worker.scheduler.add(Request("a", PROMPT, params), 0.0)
    _submit(worker)
    assert not _submit(worker).chunks
    _collect(worker)
    assert _chunks(_submit(worker)) == [("a", 5, 1, True)]


def test_a_hand_off_ends_with_the_token_in_flight() -> None:
    worker = SimWorker(make_config(), depth=2)
    worker.scheduler.add(make_request("a", PROMPT, 4, hand_off=True), 0.0)
    _submit(worker)
    assert not _submit(worker).chunks
    worker.scheduler.update(worker._plans.pop(0), worker.runner.collect(), 0.0)
    update = worker.settle()
    assert len(update.deltas) == 1
    assert len(update.exports) == 3


def test_abort_keeps_the_blocks_until_the_step_is_collected() -> None:
    worker = SimWorker(make_config(prefix_cache=False), depth=2)
    worker.scheduler.add(make_request("a", PROMPT, 4), 0.0)
    _submit(worker)
    worker.scheduler.abort(("a", 0, 0))
    worker.scheduler.check()
    assert worker.scheduler.pool.num_free == worker.scheduler.pool.num_blocks - 3
    assert not _submit(worker).chunks
    assert not _collect(worker)
    worker.check_empty()


def test_preemption_waits_for_the_blocks_of_the_step_in_flight() -> None:
    """One sequence is preempted for another, and not a second one because the first one's blocks
    come only when the step is collected."""
    worker = SimWorker(make_config(num_blocks=9, max_num_batched_tokens=32), depth=2)
    for name in "abc":
        worker.scheduler.add(make_request(name, PROMPT, 8), 0.0)
    while not worker.scheduler.counters["preemptions"]:
        worker.step(0.0)
    assert worker.scheduler.counters["preemptions"] == 1
    assert [seq.request.id for seq in worker.scheduler.books.running.values()] == ["a", "b"]
    for _ in range(40):
        worker.step(0.0)
    assert not worker.scheduler.num_sequences
    worker.check_empty()


def test_a_third_step_is_refused() -> None:
    worker = SimWorker(make_config(max_num_batched_tokens=1), depth=2)
    worker.scheduler.add(make_request("a", PROMPT, 4), 0.0)
    _submit(worker)
    _submit(worker)
    with pytest.raises(AssertionError, match="too many steps in flight"):
        worker.scheduler.schedule(0.0)


def _stream(seed: int, depth: int) -> tuple[dict[str, list[int]], SimWorker]:
    """What random requests, some of them aborted, are answered; the aborted ones left out."""
    rng = random.Random(seed)
    worker = SimWorker(make_config(num_blocks=12, max_num_batched_tokens=24), depth=depth)
    requests, aborted = {}, set()
    for i in range(60):
        prompt = [rng.randrange(3) for _ in range(rng.randrange(1, 12))]
        drawn = expected_tokens(prompt, 12)
        request = make_request(
            f"r{i}", prompt, rng.randrange(1, 12), stop=drawn[rng.randrange(12) :][:1]
        )
        requests[request.id] = request
    received: dict[str, list[int]] = {name: [] for name in requests}
    waiting = list(requests.values())
    while waiting or worker.scheduler.num_sequences or worker.runner.pending:
        while waiting and rng.random() < 0.7:
            worker.scheduler.add(waiting.pop(), 0.0)
        if rng.random() < 0.05:
            name = rng.choice(list(requests))
            aborted.add(name)
            worker.scheduler.abort((name, 0, 0))
        for delta in worker.step(0.0).deltas:
            received[delta.request_id] += delta.token_ids
    worker.check_empty()
    return {name: tokens for name, tokens in received.items() if name not in aborted}, worker


@pytest.mark.parametrize("seed", range(5))
def test_answers_are_those_of_depth_1(seed: int) -> None:
    shallow, _ = _stream(seed, depth=1)
    deep, worker = _stream(seed, depth=2)
    both = set(shallow) & set(deep)
    assert len(both) > 30
    assert {name: deep[name] for name in both} == {name: shallow[name] for name in both}
    assert worker.runner.num_unknown > 30
    assert worker.scheduler.counters["preemptions"]
