"""Whole deployments on the virtual clock: times worked out by hand, and what must hold."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from twin_worlds import BLOCK_BYTES, deployment

from baton.core.cost import Rest
from baton.core.life import HandoffPolicy
from baton.core.plan import Update
from baton.core.scheduler import Scheduler
from baton.errors import ConfigError
from baton.observe.results import RequestResult
from baton.twin import node as node_module
from baton.twin.deployment import Deployment
from baton.twin.failures import Failure
from baton.twin.links import Port
from baton.twin.results import RunResult
from baton.twin.simulator import Simulator
from baton.twin.tracing import Tracer
from baton.twin.workload import TraceRequest, Uniform, poisson, synthetic
from baton.types import FinishReason

MESSAGE_S = 0.0005


def step_s(num_tokens: int) -> float:
    return 0.01 + 1e-4 * num_tokens


def chat(num_requests: int, rate: float, seed: int = 1, prompt: int = 300) -> list[TraceRequest]:
    rng = random.Random(seed)
    lengths = Uniform(1, prompt), Uniform(1, 60)
    return synthetic(poisson(rate, rng), *lengths, rng, num_requests=num_requests)


def run(it: Deployment, trace: list[TraceRequest], **options: Any) -> RunResult:
    """Simulate, and see that everything was answered and nothing is left."""
    simulator = Simulator(it, trace, **options)
    result = simulator.run()
    for each, asked in zip(result.requests, trace, strict=True):
        if each.failure is None:
            assert each.output_tokens == asked.num_output_tokens
            assert list(each.event_s) == sorted(each.event_s)
            assert each.event_s[0] > asked.arrival_s
    check_drained(simulator)
    return result


def check_drained(simulator: Simulator) -> None:
    until = simulator.clock.now + 100.0
    while len(simulator.clock) and simulator.clock.now < until:
        simulator.clock.next()
    assert not len(simulator.gateway.table)
    for node in simulator.nodes.values():
        if not node.is_alive:
            continue
        scheduler = node.scheduler
        scheduler.schedule(simulator.clock.now + 100.0)
        scheduler.check()
        node.index.check()
        assert not scheduler.num_sequences
        assert not scheduler.num_transfers
        assert not len(node.leases)
        assert scheduler.pool.num_free == scheduler.pool.num_blocks


def all_ok(result: RunResult) -> None:
    failed = [(each.failure, each.detail) for each in result.requests if each.failure]
    assert not failed, failed[:3]


def counter(result: RunResult, name: str) -> int:
    return sum(each.counters.get(name, 0) for each in result.workers)


# Times ------------------------------------------------------------------------------------------


def test_a_step_after_a_rest_takes_longer() -> None:
    """The first one of a prompt that finds the worker idle, and no other."""
    it = deployment(unified=1)
    rests = (Rest(0.1, 0.004), Rest(1.0, 0.04))
    workers = tuple(msgspec.structs.replace(each, rests=rests) for each in it.workers)
    first, second = run(
        msgspec.structs.replace(it, workers=workers),
        [TraceRequest(2.0, 600, 2), TraceRequest(2.5, 88, 2)],
    ).requests
    prefill_s = step_s(256) + step_s(256) + step_s(88)
    assert first.ttft_s == pytest.approx(2 * MESSAGE_S + prefill_s + 0.04)
    assert first.itl_s == pytest.approx([step_s(1)])
    rest_s = 2.5 - (2.0 + first.e2e_s - 2 * MESSAGE_S)
    extra_s = 0.004 + (rest_s - 0.1) / 0.9 * 0.036
    assert second.ttft_s == pytest.approx(2 * MESSAGE_S + step_s(88) + extra_s)


def test_a_lone_request_takes_its_steps() -> None:
    result = run(deployment(unified=1), [TraceRequest(1.0, 600, 5)])
    (one,) = result.requests
    prefill_s = step_s(256) + step_s(256) + step_s(88)
    assert one.ttft_s == pytest.approx(2 * MESSAGE_S + prefill_s)
    assert one.itl_s == pytest.approx([step_s(1)] * 4)
    assert one.e2e_s == pytest.approx(2 * MESSAGE_S + prefill_s + 4 * step_s(1))
    (worker,) = result.workers
    assert worker.num_steps == 7
    assert worker.num_tokens == 604
    assert worker.busy_s == pytest.approx(prefill_s + 4 * step_s(1))


def test_a_prompt_that_comes_waits_for_the_step_that_runs() -> None:
    first, second = TraceRequest(0.0, 10, 50), TraceRequest(0.1, 10, 1)
    result = run(deployment(unified=1), [first, second])
    # Steps of one token end at 0.0115 + n * 0.0101; the next begins after the message has come.
    end = 0.0005 + step_s(10)
    while end < 0.1 + MESSAGE_S:
        end += step_s(1)
    assert result.requests[1].event_s[0] == pytest.approx(end + step_s(11) + MESSAGE_S)


def test_a_split_request_moves_its_blocks() -> None:
    port = Port(100e6)  # 10 ms a block
    result = run(deployment(1, 1, port=port), [TraceRequest(0.0, 100, 4)])
    prefill, decode = result.workers
    (one,) = result.requests
    assert one.ttft_s == pytest.approx(2 * MESSAGE_S + step_s(100))
    assert decode.counters["prompt_tokens_computed"] == 0
    assert decode.counters["early_blocks"] + decode.counters["imported_blocks"] == 7
    assert prefill.bytes_sent == decode.bytes_received == 7 * BLOCK_BYTES
    # Seven blocks at 100 MB/s cannot take less; the second token waits for them.
    assert one.itl_s[0] > 7 * BLOCK_BYTES / 100e6
    assert one.itl_s[1:] == pytest.approx([step_s(1)] * 2)
    assert not [
        name for w in result.workers for name in w.counters if name.startswith("fallback_i")
    ]


def test_readers_of_one_source_share_its_link() -> None:
    port = Port(100e6)
    trace = [TraceRequest(0.0, 160, 3), TraceRequest(0.0, 160, 3)]
    alone = run(deployment(1, 1, port=port), trace[:1]).requests[0]
    together = run(deployment(1, 2, port=port), trace).requests
    assert max(each.itl_s[0] for each in together) > 1.4 * alone.itl_s[0]


def test_depth_2_draws_the_same_tokens_a_little_later() -> None:
    trace = chat(60, 8.0)
    one = run(deployment(unified=1), trace)
    two = run(deployment(unified=1, depth=2), trace)
    all_ok(one)
    all_ok(two)
    assert one.requests != two.requests
    assert two.end_s == pytest.approx(one.end_s, rel=0.1)


# Jumps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [{"unified": 2}, {"prefill": 1, "decode": 1}])
@pytest.mark.parametrize("keep_blocks", [False, True])
def test_jumping_changes_nothing(
    counts: dict[str, int], keep_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = chat(150, 6.0)
    fields = {"num_blocks": 120, "keep_blocks": keep_blocks}
    jumped = run(deployment(**counts, **fields), trace)
    monkeypatch.setattr(node_module, "MAX_JUMP", 1)
    walked = run(deployment(**counts, **fields), trace)
    assert jumped.num_events < 0.85 * walked.num_events
    assert jumped.requests == walked.requests
    assert [w.counters for w in jumped.workers] == [w.counters for w in walked.workers]
    assert [w.num_steps for w in jumped.workers] == [w.num_steps for w in walked.workers]


# Sharing ----------------------------------------------------------------------------------------


def test_equal_blocks_are_computed_once() -> None:
    shared = {"blocks": (7, 8), "block_size": 32}
    trace = [
        TraceRequest(0.0, 100, 2, **shared),
        TraceRequest(1.0, 100, 2, **shared),
        TraceRequest(2.0, 100, 2, blocks=(7, 9), block_size=32),
        TraceRequest(3.0, 100, 2, blocks=(6, 8), block_size=32),
        TraceRequest(4.0, 100, 2, tenant="other", **shared),
        TraceRequest(5.0, 100, 2),
    ]
    result = run(deployment(unified=1), trace)
    assert [each.cached_tokens for each in result.requests] == [0, 64, 32, 0, 0, 0]


def test_a_cache_that_is_too_small_forgets_the_oldest() -> None:
    trace = [
        TraceRequest(float(i), 161, 1, blocks=(10 * (i % 4), 10 * (i % 4) + 1), block_size=80)
        for i in range(12)
    ]
    roomy = run(deployment(unified=1, num_blocks=64), trace)
    tight = run(deployment(unified=1, num_blocks=24), trace)
    assert sum(each.cached_tokens or 0 for each in roomy.requests) == 8 * 160
    assert sum(each.cached_tokens or 0 for each in tight.requests) == 0


# Trouble ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("worker", ["prefill-0", "decode-0", "decode-1"])
def test_a_killed_worker_costs_no_request(worker: str) -> None:
    trace = chat(80, 8.0)
    fields = {"restart_s": 2.0}
    it = deployment(2, 2, fields=fields)
    result = run(it, trace, failures=[Failure("kill", worker, 4.0)])
    all_ok(result)
    assert result.gateway["placed_again"] > 0
    untouched = run(it, trace)
    assert untouched.gateway["placed_again"] == 0
    assert result.requests[:10] == untouched.requests[:10]


def test_tokens_that_were_sent_before_a_death_count() -> None:
    trace = [TraceRequest(0.0, 20, 200)]
    result = run(deployment(unified=2), trace, failures=[Failure("kill", "unified-0", 1.0)])
    (one,) = result.requests
    before = [when for when in one.event_s if when <= 1.0 + MESSAGE_S]
    assert len(before) == 98  # one at 12.5 ms, and one each 10.1 ms until 1 s
    assert max(one.itl_s) < 0.2, "the other worker did not take over at once"
    assert one.output_tokens == 200


def test_a_frozen_worker_is_late_or_given_up() -> None:
    trace = [TraceRequest(0.0, 20, 50)]
    calm = run(deployment(unified=1), trace).requests[0]
    late = run(
        deployment(unified=1), trace, failures=[Failure("freeze", "unified-0", 0.2, 1.0)]
    ).requests[0]
    assert late.e2e_s - calm.e2e_s == pytest.approx(1.0, abs=0.02)
    assert max(late.itl_s) == pytest.approx(1.0, abs=0.02)
    moved = run(deployment(unified=2), trace, failures=[Failure("freeze", "unified-0", 0.2, 30.0)])
    assert moved.gateway["placed_again"] == moved.gateway["workers_silent"] == 1
    assert 3.0 < moved.requests[0].e2e_s < 5.0
    alone = run(deployment(unified=1), trace, failures=[Failure("freeze", "unified-0", 0.2, 9.0)])
    assert alone.gateway["workers_thawed"] == 1
    assert 9.0 < alone.requests[0].e2e_s - calm.e2e_s < 9.2, "it goes on where it was"


def test_a_slow_link_delays_what_crosses_it() -> None:
    trace = [TraceRequest(float(i), 160, 3) for i in range(6)]
    slow = Failure("slow", "decode-0", 2.5, 2.0, 0.01)
    result = run(deployment(1, 1), trace, failures=[slow])
    gaps = [each.itl_s[0] for each in result.requests]
    assert max(gaps[:3]) < 0.1
    assert min(gaps[3:5]) > 0.3
    assert gaps[5] < 0.1


def test_a_link_slower_than_a_lease_means_computing_again() -> None:
    policy = HandoffPolicy(1.0)
    it = deployment(1, 1, port=Port(1e6), policy=policy, lease_ttl_s=1.0)
    result = run(it, [TraceRequest(0.0, 160, 3)])
    all_ok(result)
    assert counter(result, "fallback_import_timed_out") + counter(result, "early_lost_timed_out")
    assert result.workers[1].counters["prompt_tokens_computed"] > 0


def test_a_small_pool_preempts_and_goes_on() -> None:
    result = run(deployment(unified=1, num_blocks=24), chat(60, 10.0))
    all_ok(result)
    assert counter(result, "preemptions") > 0


def test_too_many_at_once_are_refused() -> None:
    it = deployment(unified=1, fields={"max_queued_requests": 3})
    result = run(it, [TraceRequest(0.0, 50, 5)] * 5)
    assert [each.failure for each in result.requests] == [None] * 3 + ["http 429"] * 2


def test_a_deadline_ends_a_request() -> None:
    it = deployment(unified=1, fields={"request_timeout_s": 0.5})
    result = run(it, [TraceRequest(0.0, 50, 500), TraceRequest(0.1, 50, 5)])
    assert [each.failure for each in result.requests] == ["deadline_exceeded", None]
    first = result.requests[0]
    assert 40 < first.output_tokens < 60
    assert first.end_s == pytest.approx(0.5, abs=0.03)


# The same again ---------------------------------------------------------------------------------


def test_same_inputs_same_result() -> None:
    def once() -> tuple[RunResult, bytes]:
        tracer = Tracer()
        it = deployment(2, 2, keep_blocks=True)
        failures = [Failure("kill", "decode-1", 5.0), Failure("slow", "prefill-0", 1.0, 3.0, 0.1)]
        result = Simulator(it, chat(100, 9.0), failures=failures, tracer=tracer).run()
        return result, tracer.to_json()

    first, second = once(), once()
    assert first == second
    other = Simulator(deployment(2, 2, keep_blocks=True), chat(100, 9.0, seed=2)).run()
    assert other != first[0]


# What fits nowhere ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("it", "request_", "words"),
    [
        (deployment(unified=1), TraceRequest(0.0, 5000, 5), "raise that, or leave such requests"),
        (
            deployment(unified=1, num_blocks=20),
            TraceRequest(0.0, 300, 50),
            "350 tokens need 22 KV blocks and a worker has 20: raise engine.kv_cache_bytes",
        ),
        (
            deployment(1, 1, num_frames=10),
            TraceRequest(0.0, 300, 5),
            "needs 19 frames of the block store and a worker has 10: raise store.max_bytes",
        ),
    ],
)
def test_a_prompt_that_fits_nowhere_gets_a_sentence(
    it: Deployment, request_: TraceRequest, words: str
) -> None:
    trace = [TraceRequest(0.0, 5, 5), request_]
    with pytest.raises(ConfigError, match=f"request 2 of the trace fits nowhere.*{words}"):
        Simulator(it, trace)


def test_a_deployment_that_cannot_serve_gets_a_sentence() -> None:
    trace = [TraceRequest(0.0, 5, 5)]
    for it, words in (
        (deployment(), "has no workers"),
        (deployment(prefill=1), "prefill workers need decode workers"),
    ):
        with pytest.raises(ConfigError, match=words):
            Simulator(it, trace)
    with pytest.raises(ConfigError, match="is empty"):
        Simulator(deployment(unified=1), [])
    with pytest.raises(ConfigError, match="there are unified-0"):
        Simulator(deployment(unified=1), trace, failures=[Failure("kill", "decode-9", 1.0)])


def test_failures_are_read() -> None:
    assert Failure.parse("kill:decode-0@30") == Failure("kill", "decode-0", 30.0)
    assert Failure.parse("freeze:u@3.5+2") == Failure("freeze", "u", 3.5, 2.0)
    assert Failure.parse("slow:u@3+2x0.1") == Failure("slow", "u", 3.0, 2.0, 0.1)
    for text in ("kill:u", "kill:u@1+2", "freeze:u@1", "slow:u@1+2", "melt:u@1", ""):
        with pytest.raises(ConfigError, match="write kill:WORKER@SECONDS"):
            Failure.parse(text)


def test_every_request_has_one_record() -> None:
    trace = [TraceRequest(0.0, 5, 2, id="same"), TraceRequest(0.1, 5, 2, id="same")]
    result = run(deployment(unified=1), trace)
    assert [each.index for each in result.requests] == [0, 1]
    assert isinstance(result.requests[0], RequestResult)
    assert FinishReason.LENGTH.value == "length"


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    ("failure", "changes"),
    [
        (None, {}),
        (None, {"unified": 1, "num_blocks": 24}),  # preempts
        (Failure("kill", "unified-0", 2.0), {"num_blocks": 24}),
        (Failure("freeze", "unified-0", 2.0, 8.0), {}),
        (None, {"fields": {"request_timeout_s": 0.4}}),
    ],
)
def test_tokens_that_are_told_together_have_the_times_of_each(
    monkeypatch: pytest.MonkeyPatch, failure: Failure | None, changes: dict[str, Any], depth: int
) -> None:
    """Against schedulers that tell every token when it is drawn."""
    failures = [] if failure is None else [failure]

    def served(how: bool) -> tuple[RunResult, int]:
        num_told = 0

        class Counting(Scheduler):
            def __init__(self, *args: Any, tells_each: bool) -> None:
                assert not tells_each
                super().__init__(*args, tells_each=how)

            def take(self) -> Update:
                nonlocal num_told
                update = super().take()
                num_told += len(update.deltas)
                return update

        monkeypatch.setattr(node_module, "Scheduler", Counting)
        it = deployment(**{"unified": 2, "depth": depth} | changes)
        trace = chat(60, rate=10.0 if "unified" in changes else 25.0)
        return Simulator(it, trace, failures=failures).run(), num_told

    (together, num_together), (each, num_each) = served(False), served(True)
    if "unified" in changes:
        assert counter(together, "preemptions") > 0
    if "fields" in changes:
        assert any(late.failure and late.output_tokens for late in together.requests)
    assert num_each > 2 * num_together
    assert each.requests == together.requests
    assert each.workers == together.workers
    assert each.gateway == together.gateway
