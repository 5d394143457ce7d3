"""vLLM's policy over core's blocks, and the loop that drives it."""

from __future__ import annotations

import gzip
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from reproduce.engine_loop import serve
from reproduce.kernels import Served
from reproduce.llmservingsim import Run, predict, read_measured
from reproduce.vllm_v1 import VllmLimits, VllmScheduler

from baton.core.plan import StepOutput, StepPlan
from baton.twin.workload import TraceRequest
from baton.types import Request, SamplingParams


def engine(seqs: int = 8, tokens: int = 64, blocks: int = 64) -> VllmScheduler:
    return VllmScheduler(VllmLimits(seqs, tokens, blocks, block_size=4))


def add(vllm: VllmScheduler, name: str, prompt: int, output: int) -> None:
    token = int.from_bytes(name.encode(), "big")
    vllm.add(Request(name, (token,) * prompt, SamplingParams(max_tokens=output)), 0.0)


def shapes(plan: StepPlan) -> list[tuple[str, int, int]]:
    return [(chunk.seq.id[0], chunk.start, chunk.num_tokens) for chunk in plan.chunks]


def finish(vllm: VllmScheduler, plan: StepPlan) -> None:
    tokens = [[7] if chunk.samples else [] for chunk in plan.chunks]
    vllm.update(plan, StepOutput(tokens, [None] * len(tokens), 0.0), 0.0)


def step(vllm: VllmScheduler) -> list[tuple[str, int, int]]:
    plan = vllm.schedule(0.0)
    if plan.chunks:
        finish(vllm, plan)
    return shapes(plan)


def test_what_runs_goes_first_and_prompts_take_what_is_left() -> None:
    vllm = engine(tokens=10)
    add(vllm, "a", 6, 3)
    add(vllm, "b", 12, 2)
    assert step(vllm) == [("a", 0, 6), ("b", 0, 4)]
    assert step(vllm) == [("a", 6, 1), ("b", 4, 8)]
    assert step(vllm) == [("a", 7, 1), ("b", 12, 1)]
    assert step(vllm) == []
    assert vllm.pool.num_free == 64


def test_seats_are_limited_and_given_in_the_order_of_arrival() -> None:
    vllm = engine(seqs=1)
    for name in "ab":
        add(vllm, name, 4, 1)
    assert step(vllm) == [("a", 0, 4)]
    assert step(vllm) == [("b", 0, 4)]


def test_a_prompt_is_admitted_only_if_all_of_it_fits() -> None:
    vllm = engine(tokens=8, blocks=6)
    add(vllm, "a", 8, 9)
    add(vllm, "b", 20, 1)
    assert step(vllm) == [("a", 0, 8)]
    assert step(vllm) == [("a", 8, 1)]
    with pytest.raises(ValueError, match="more blocks than there are"):
        add(vllm, "c", 24, 1)


def test_the_newest_gives_way_waits_as_the_first_and_finds_blocks_again() -> None:
    vllm = engine(blocks=7, tokens=32)
    add(vllm, "a", 11, 5)
    add(vllm, "b", 12, 4)
    assert step(vllm) == [("a", 0, 11), ("b", 0, 12)]
    assert step(vllm) == [("a", 11, 1), ("b", 12, 1)]
    add(vllm, "c", 2, 1)
    assert step(vllm) == [("a", 12, 1)]  # its fourth block is b's; and nobody is admitted
    assert vllm.num_preemptions == 1
    assert vllm.num_waiting == 2
    # a holds 4 of 7 blocks; b needs 4 for its 14 tokens, of which 3 are left of its own.
    assert step(vllm)[0] == ("a", 13, 1)
    while vllm.num_running or vllm.num_waiting:
        planned = step(vllm)
        if planned[0][0] == "b":
            break
    assert planned[0] == ("b", 12, 2)
    assert planned[1] == ("c", 0, 2)


def test_with_a_step_in_flight_the_next_is_planned_and_an_end_foreseen() -> None:
    vllm = engine()
    add(vllm, "a", 4, 2)
    first = vllm.schedule(0.0)
    second = vllm.schedule(0.0)
    assert shapes(second) == [("a", 4, 1)]
    assert shapes(vllm.schedule(0.0)) == []
    finish(vllm, first)
    assert vllm.num_running == 1
    finish(vllm, second)
    assert vllm.num_running == 0
    deltas = vllm.take().deltas
    assert [delta.first_index for delta in deltas] == [0, 1]


def test_who_gave_way_is_not_admitted_in_the_same_step() -> None:
    vllm = engine(blocks=7, tokens=32)
    add(vllm, "a", 13, 3)
    add(vllm, "b", 11, 5)
    vllm.schedule(0.0)
    vllm.schedule(0.0)
    # b wants a fourth block; without the tokens in flight, three would do for it again.
    assert shapes(vllm.schedule(0.0)) == [("a", 14, 1)]
    assert vllm.num_preemptions == 1


def test_a_token_of_a_sequence_preempted_in_flight_is_drawn_again() -> None:
    vllm = engine(blocks=4, tokens=32)
    add(vllm, "a", 7, 8)
    add(vllm, "b", 7, 8)
    first = vllm.schedule(0.0)
    second = vllm.schedule(0.0)  # both at 8 tokens of 8
    third = vllm.schedule(0.0)  # a needs a third block
    assert shapes(third) == [("a", 8, 1)]
    for plan in (first, second, third):
        finish(vllm, plan)
    indices = [(delta.request_id, delta.first_index) for delta in vllm.take().deltas]
    assert indices == [("a", 0), ("a", 1), ("a", 2)]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_every_request_gets_its_tokens_and_every_block_comes_back(depth: int, seed: int) -> None:
    draw = random.Random(seed)
    arrivals = [
        TraceRequest(draw.random() * 20, draw.randint(1, 60), draw.randint(1, 30))
        for _ in range(60)
    ]
    vllm = engine(seqs=6, tokens=32, blocks=30)
    results = serve([vllm], lambda plans: 0.1, arrivals, depth)
    assert vllm.num_preemptions > 0
    vllm.pool.check()
    assert vllm.pool.num_free == 30
    for result in results:
        assert result.arrival.arrival_s < result.first_token_s <= result.last_token_s
        shortest = 0.1 * (result.arrival.num_output_tokens - 1)
        assert result.last_token_s - result.first_token_s >= shortest - 1e-9


def test_a_step_planned_ahead_makes_a_newcomer_wait_for_it() -> None:
    arrivals = [TraceRequest(0.0, 4, 50), TraceRequest(1.5, 4, 1)]
    alone = serve([engine()], lambda plans: 1.0, arrivals, depth=1)
    ahead = serve([engine()], lambda plans: 1.0, arrivals, depth=2)
    assert alone[1].first_token_s == 3.0
    assert ahead[1].first_token_s == 4.0
    assert alone[0].last_token_s == ahead[0].last_token_s == 50.0


def test_engines_in_lock_step_share_the_requests_and_the_time() -> None:
    engines = [engine(), engine()]
    seen: list[int] = []

    def cost(plans: Sequence[StepPlan]) -> float:
        seen.append(sum(bool(plan.chunks) for plan in plans))
        return 1.0

    arrivals = [TraceRequest(0.0, 4, 3), TraceRequest(0.0, 4, 5)]
    results = serve(engines, cost, arrivals, depth=1)
    assert [result.last_token_s for result in results] == [3.0, 5.0]
    assert seen == [2, 2, 2, 1, 1]


def test_predictions_do_not_depend_on_what_was_measured(tmp_path: Path) -> None:
    profile = tmp_path / "profile"
    profile.mkdir()
    for name, text in {
        "dense": "layer,tokens,time_us\nqkv_proj,1,1000\nqkv_proj,64,1000\n",
        "per_sequence": "layer,sequences,time_us\nlm_head,1,1000\n",
        "attention": "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us\n"
        "0,0,1,16,5\n0,0,2,16,5\n16,0,0,0,5\n16,0,1,16,5\n16,0,2,16,5\n",
    }.items():
        with gzip.open(profile / f"k_{name}.csv.gz", "wt") as file:
            file.write(text)
    each = tiny_run()
    head = "request_id,input_toks,output_toks,arrival_s,"
    head += "queued_s,scheduled_s,first_token_s,last_token_s"
    path = tmp_path / "requests.csv"
    found = []
    for measured in ("0.1,0.2,0.3,0.4", "9,9,9,9"):
        path.write_text(f"{head}\nr0,8,4,0.0,{measured}\nr1,20,3,0.001,{measured}\n")
        outcomes, _ = predict(tmp_path, each)
        found.append([(one.first_token_s, one.last_token_s) for one in outcomes])
        assert read_measured(path)[0].last_token_s == float(measured.split(",")[-1])
    assert found[0] == found[1]
    assert all(first > 0 for first, _ in found[0])


def tiny_run() -> Run:
    return Run("requests.csv", "k", Served("tiny", 1, 8), 8, 64, 64)
