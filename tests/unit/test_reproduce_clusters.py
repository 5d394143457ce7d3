"""Splitwise's and DistServe's clusters on virtual time, with step times made up here."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
from reproduce import distserve_cluster, splitwise_cluster
from reproduce.distserve_cluster import Parallel, StepTimes, kv_capacity
from reproduce.distserve_lengths import MAX_TOKENS, MEANS, SHAPES, drawn, fitting
from reproduce.queues import Decoding, Job, highest, poisson_jobs
from reproduce.splitwise_cluster import Kind
from reproduce.splitwise_cost import MachineTimes

FIT = {
    "decoding_large_small_bs_threshold": 3,
    "prefill": [10.0, 1.0, -0.5],
    "decoding_smallbs": [5.0, 0.0, 1.0],
    "decoding_largebs": [20.0, 0.0, 0.0],
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name in ("distserve", "splitwise"):
        (tmp_path / name).mkdir()
    for engine in ("vllm", "distserve"):
        fitted = {"facebook/opt-13b": {"1": FIT}}
        path = tmp_path / "distserve" / f"profiler-a100-80g.{engine}.json"
        path.write_text(json.dumps(fitted))
    rows = "model,tp,pp,max_num_tokens\nfacebook/opt-13b,1,1,1000\n"
    (tmp_path / "distserve" / "max_num_tokens.csv").write_text(rows)
    lines = [
        "model,hardware,tensor_parallel,prompt_size,batch_size,token_size,prompt_time,token_time"
    ]
    for prompt in (100, 200, 400):
        for batch in (1, 2, 4):
            token_ms = 10 + 2 * batch + 0.01 * batch * (prompt + 50)
            lines.append(f"m,a,8,{prompt},{batch},100,{prompt * batch},{token_ms}")
    with gzip.open(tmp_path / "splitwise" / "perf.csv.gz", "wt") as file:
        file.write("\n".join(lines) + "\n")
    return tmp_path


def machine(data: Path, transfer_s: float = 0.0) -> Kind:
    path = data / "splitwise" / "perf.csv.gz"
    return Kind(MachineTimes(path, "m", "a", 8, "sequences"), transfer_s)


def opt13(data: Path, host_s: float = 0.0) -> StepTimes:
    return StepTimes(data, "vllm", "facebook/opt-13b", 1, host_s)


def test_sequences_that_decode_together_end_when_each_has_its_tokens() -> None:
    draw = random.Random(1)
    decoding, left, kv = Decoding(), {}, {}
    for _ in range(200):
        if draw.random() < 0.3:
            job = Job(0.0, draw.randint(1, 50), draw.randint(2, 20))
            decoding.add(job)
            left[job], kv[job] = job.num_output - 1, job.num_prompt + 1
        done = decoding.step()
        expected = set()
        for job in list(left):
            left[job] -= 1
            kv[job] += 1
            if not left[job]:
                expected.add(job)
                del left[job], kv[job]
        assert set(done) == expected
        assert len(decoding) == len(left)
        assert decoding.kv_tokens == sum(kv.values())


def test_another_rate_stretches_the_same_gaps_and_the_search_finds_an_edge() -> None:
    slow, fast = (poisson_jobs([(1, 1)] * 50, rate, seed=2) for rate in (1.0, 4.0))
    assert [job.arrival_s / 4 for job in slow] == pytest.approx([job.arrival_s for job in fast])
    assert highest(lambda rate: rate <= 3.0, 0.1, 100.0, 20) == pytest.approx(3.0, rel=1e-3)
    assert highest(lambda rate: False, 0.1, 100.0, 20) == 0.0


def test_a_machine_s_decode_law_is_found_from_its_points_and_its_other_reading_is_flat(
    data: Path,
) -> None:
    path = data / "splitwise" / "perf.csv.gz"
    law = MachineTimes(path, "m", "a", 8, "sequences")
    assert law.decode_s(3, 500) == pytest.approx(1e-3 * (10 + 2 * 3 + 0.01 * 500))
    assert law.prompt_s(300) == pytest.approx(0.3)
    flat = MachineTimes(path, "m", "a", 8, "batch_tokens")
    assert flat.decode_s(64, 99_999) == flat.decode_s(1, 0) == pytest.approx(13.5e-3)
    with pytest.raises(ValueError, match="no measurement"):
        MachineTimes(path, "m", "b", 8, "sequences")


def test_on_one_machine_prompts_go_first_and_decodes_beside_them(data: Path) -> None:
    jobs = [Job(0.0, 100, 3), Job(0.05, 200, 1)]
    splitwise_cluster.serve_together([machine(data)], jobs)
    assert jobs[0].first_s == pytest.approx(0.1)
    mixed = 1.1 * (200 + 1) / 1000
    assert jobs[1].first_s == pytest.approx(0.1 + mixed)
    last = 1e-3 * (10 + 2 + 0.01 * 102)
    assert jobs[0].last_s == pytest.approx(0.1 + mixed + last)


def test_decodes_are_left_out_four_times_in_a_row_at_most(data: Path) -> None:
    prompts = [Job(0.15, 2048, 1) for _ in range(6)]
    first = Job(0.0, 100, 9)
    splitwise_cluster.serve_together([machine(data)], [first, *prompts])
    ends = [job.first_s for job in prompts]
    gaps = [later - earlier for earlier, later in zip(ends, ends[1:], strict=False)]
    assert gaps[:3] == pytest.approx([2.048] * 3)
    drawn_by_then = 1 + 4  # in its own time, the last of them while the prompts came
    step_s = 1e-3 * (10 + 2 + 0.01 * (100 + drawn_by_then))
    assert gaps[3] == pytest.approx(2.048 + step_s, abs=1e-4)


def test_split_machines_pass_the_answer_on_after_the_transfer(data: Path) -> None:
    jobs = [Job(0.0, 100, 2), Job(0.0, 100, 1)]
    splitwise_cluster.serve_split([machine(data, 0.5)] * 2, [machine(data)], jobs)
    assert [job.first_s for job in jobs] == pytest.approx([0.1, 0.1])
    assert jobs[0].last_s == pytest.approx(0.1 + 0.5 + 1e-3 * (10 + 2 + 0.01 * 101))
    assert jobs[1].last_s == jobs[1].first_s


def test_a_long_queue_spills_into_the_mixed_pool_and_everyone_is_served(data: Path) -> None:
    jobs = [Job(0.0, 2000, 5) for _ in range(40)]
    splitwise_cluster.serve_split([machine(data)], [machine(data)] * 3, jobs)
    assert all(job.last_s > job.first_s > 0 for job in jobs)
    alone = 40 * 2.0
    assert max(job.first_s for job in jobs) < alone / 2


def test_a_prompt_that_spilled_still_has_its_answer_where_there_is_least_kv(data: Path) -> None:
    long, short = Job(0.0, 100, 20_000), Job(0.0, 100, 5)  # one to each token machine
    fill = [Job(0.0, 2048, 1) for _ in range(3)]
    spilled = Job(0.0, 2000, 2)  # computed beside `long`, whose machine has the fewest sequences
    with_transfer = machine(data, transfer_s=9.0)
    jobs = [long, short, *fill, spilled]
    splitwise_cluster.serve_split([with_transfer], [with_transfer] * 2, jobs)
    assert spilled.first_s < fill[2].first_s
    assert spilled.last_s - spilled.first_s > 9.0


def test_an_answer_that_does_not_fit_goes_to_the_mixed_pool(data: Path) -> None:
    prompt, token = machine(data, transfer_s=9.0), machine(data)
    prompt.times.kv_tokens, token.times.kv_tokens = 1000, 150
    jobs = [Job(0.0, 100, 20), Job(0.0, 100, 20)]
    splitwise_cluster.serve_split([prompt], [token], jobs)
    assert jobs[0].last_s > 9.0
    assert jobs[1].last_s < 9.0  # it stays where its prompt was, so nothing is transferred


def test_step_times_follow_the_fit_and_no_square_term_is_negative(data: Path) -> None:
    times = opt13(data, host_s=0.001)
    assert times.prompts_s([10, 20]) == pytest.approx(1e-3 * (10 + 30) + 0.001)
    assert times.decode_s(2, 99) == pytest.approx(1e-3 * (5 + 2) + 0.001)
    assert times.decode_s(3, 99) == pytest.approx(1e-3 * 20 + 0.001)
    with pytest.raises(ValueError, match="not measured on 2 devices"):
        StepTimes(data, "vllm", "facebook/opt-13b", 2, 0.0)
    assert kv_capacity(data, "facebook/opt-13b", Parallel(1)) == 1000
    with pytest.raises(ValueError, match="does not fit"):
        kv_capacity(data, "facebook/opt-13b", Parallel(2))


def test_in_the_old_vllm_a_prompt_stops_the_decodes(data: Path) -> None:
    jobs = [Job(0.0, 10, 4), Job(0.021, 100, 1)]
    distserve_cluster.serve_together(opt13(data), 1000, jobs)
    assert jobs[0].first_s == pytest.approx(0.02)
    assert jobs[1].first_s == pytest.approx(0.02 + 0.006 + 0.11)
    assert jobs[0].last_s == pytest.approx(0.02 + 3 * 0.006 + 0.11)


def test_a_batch_may_be_padded_to_its_longest_prompt(data: Path) -> None:
    ends = []
    for pads in (False, True):
        jobs = [Job(0.0, 10, 1), Job(0.001, 10, 1), Job(0.001, 100, 1)]
        distserve_cluster.serve_together(opt13(data), 1000, jobs, pads)
        ends.append(jobs[2].first_s)
    assert ends == pytest.approx([0.02 + 0.12, 0.02 + 0.21])


def test_split_serving_keeps_prompts_and_decodes_apart(data: Path) -> None:
    jobs = [Job(0.0, 10, 4), Job(0.021, 100, 1)]
    times = opt13(data)
    distserve_cluster.serve_split(times, 1, times, 1, 1000, 0.0, jobs)
    assert jobs[0].last_s == pytest.approx(0.02 + 3 * 0.006)
    assert jobs[1].first_s == pytest.approx(0.021 + 0.11)


def test_a_pipeline_takes_a_prompt_every_stage_and_decodes_in_groups(data: Path) -> None:
    jobs = [Job(0.0, 5000, 2), Job(0.001, 5000, 2)]
    times = opt13(data)
    distserve_cluster.serve_split(times, 2, times, 2, 20_000, 0.0, jobs)
    stage = 5.01 / 2
    assert [job.first_s for job in jobs] == pytest.approx([2 * stage, 3 * stage])
    both = [Job(0.0, 10, 11), Job(0.0, 10, 11)]
    distserve_cluster.serve_split(times, 1, times, 2, 20_000, 0.0, both)
    assert both[0].last_s - both[0].first_s == pytest.approx(10 * 0.006)


def test_decodes_wait_for_room_in_the_kv(data: Path) -> None:
    jobs = [Job(0.0, 10, 11), Job(0.0, 10, 11)]
    times = opt13(data)
    distserve_cluster.serve_split(times, 1, times, 1, 30, 0.0, jobs)
    assert jobs[1].last_s - jobs[0].last_s == pytest.approx(10 * 0.006)


def test_lengths_have_the_published_means_and_fit_the_model() -> None:
    for workload, shapes in SHAPES.items():
        for shape in shapes:
            lengths = drawn(workload, shape, 400, seed=1)
            assert all(p >= 1 and o >= 1 and p + o <= MAX_TOKENS for p, o in lengths)
            means = [sum(column) / 400 for column in zip(*lengths, strict=True)]
            assert means == pytest.approx(MEANS[workload], rel=0.06)
    assert fitting([(2000, 100), (100, 100)]) == [(100, 100)]
