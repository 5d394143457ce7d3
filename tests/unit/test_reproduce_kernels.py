"""A step as the sum of its kernels, on tables small enough to add up by hand."""

from __future__ import annotations

import gzip
from itertools import product
from pathlib import Path

import pytest
from reproduce.kernels import LinkOf, Served, StepKernels

from baton.core.plan import Chunk, StepPlan
from baton.core.sequence import Sequence
from baton.types import Request, SamplingParams

LAYERS = 3
MODEL = Served("tiny", layers=LAYERS, hidden=100)
LINK = LinkOf(1e6, 1e-3)
SIZES = (16, 32, 64, 128)


def attention_us(chunk: float, history: float, decodes: float, kv: float) -> float:
    """What the made-up kernel takes: linear along each axis."""
    return 0.5 * chunk + 0.01 * chunk * history + 0.001 * decodes * kv


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    write(tmp_path / "k_dense.csv.gz", "layer,tokens,time_us", [
        *(("embedding", tokens, 7) for tokens in (1, 2048)),
        *(("layernorm", tokens, 2) for tokens in (1, 2048)),
        *(("qkv_proj", tokens, 10 + tokens) for tokens in (1, 2048)),
    ])  # fmt: skip
    write(tmp_path / "k_per_sequence.csv.gz", "layer,sequences,time_us", [
        ("lm_head", 1, 100), ("lm_head", 11, 200), ("sampler", 1, 1), ("sampler", 11, 1),
    ])  # fmt: skip
    rows = [
        (*point, attention_us(*point))
        for point in product((0, *SIZES), (0, *SIZES), (0, 1, 2, 4), (0, *SIZES))
        if (point[2] == 0) == (point[3] == 0) and (point[0] or not point[1]) and any(point)
    ]
    head = "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us"
    write(tmp_path / "k_attention.csv.gz", head, rows)
    head = "pc,n_label,skew_rate_label,kv_big_label,kp_label,alpha,n_samples"
    write(tmp_path / "k_skew.csv.gz", head, [(0, "n<=2", "sr<=70%", "kvB<=1k", "kp=0", 0.5, 1)])
    write(tmp_path / "k_moe.csv.gz", "tokens,activated_experts,time_us", [
        (tokens, active, tokens + 10 * active) for tokens, active in product((1, 2048), (1, 64))
    ])  # fmt: skip
    return tmp_path


def write(path: Path, head: str, rows: list[tuple[object, ...]]) -> None:
    with gzip.open(path, "wt") as file:
        file.write("\n".join([head, *(",".join(map(str, row)) for row in rows)]) + "\n")


def plan(*chunks: tuple[int, int]) -> StepPlan:
    """Of (start, tokens)."""
    seq = Sequence(Request("r", (0,) * 4096, SamplingParams(1)), b"", 16, 0.0)
    return StepPlan(1, tuple(Chunk(seq, start, tokens, True) for start, tokens in chunks))


def kernels(
    tables: Path, model: Served = MODEL, graph: int = 0, skew: float | None = None
) -> StepKernels:
    return StepKernels(model, tables, "k", LINK, graph, skew)


def dense_us(tokens: int) -> float:
    return 7 + LAYERS * (2 * 2 + 10 + tokens)


def test_a_step_is_the_sum_of_its_kernels(tables: Path) -> None:
    step = plan((0, 20), (47, 1))
    expected = dense_us(21) + (110 + 1) + LAYERS * attention_us(20, 0, 1, 48)
    assert kernels(tables).step_s([step]) == pytest.approx(1e-6 * expected)


def test_prompts_add_what_each_adds_beside_the_decodes(tables: Path) -> None:
    both = kernels(tables).attention_us(plan((0, 20), (64, 30), (99, 1)))
    expected = attention_us(20, 0, 0, 0) + attention_us(30, 64, 0, 0) + attention_us(0, 0, 1, 100)
    assert both == pytest.approx(expected)


def test_a_prompt_s_last_token_alone_counts_as_a_decode_but_a_first_one_does_not(
    tables: Path,
) -> None:
    found = kernels(tables)
    assert found.attention_us(plan((63, 1))) == pytest.approx(attention_us(0, 0, 1, 64))
    assert found.attention_us(plan((0, 1))) == pytest.approx(0.5)


def test_unlike_lengths_lie_between_their_mean_and_their_greatest(tables: Path) -> None:
    step = plan((31, 1), (95, 1))
    mean, longest = attention_us(0, 0, 2, 64), attention_us(0, 0, 2, 96)
    assert kernels(tables).attention_us(step) == pytest.approx(mean)
    measured = kernels(tables, skew=0.25).attention_us(step)
    assert measured == pytest.approx(mean + 0.5 * (longest - mean))
    other_class = plan((31, 1), (31, 1), (95, 1))
    mean, longest = attention_us(0, 0, 3, 160 / 3), attention_us(0, 0, 3, 96)
    usual = kernels(tables, skew=0.25).attention_us(other_class)
    assert usual == pytest.approx(mean + 0.25 * (longest - mean))


def test_few_tokens_are_padded_to_a_captured_graph(tables: Path) -> None:
    step = plan(*[(16, 1)] * 9)
    plain, padded = kernels(tables).step_s([step]), kernels(tables, graph=512).step_s([step])
    assert padded - plain == pytest.approx(1e-6 * (dense_us(16) - dense_us(9)))
    many = plan((0, 600))
    assert kernels(tables).step_s([many]) == kernels(tables, graph=512).step_s([many])


def test_tensor_parallel_ranks_reduce_twice_a_layer(tables: Path) -> None:
    step = plan((0, 20))
    two = Served("tiny", layers=LAYERS, hidden=100, tensor=2)
    extra = kernels(tables, two).step_s([step]) - kernels(tables).step_s([step])
    assert extra == pytest.approx(2 * LAYERS * (1e-3 + 20 * 100 * 2 / 1e6))


def test_experts_see_the_tokens_of_all_ranks_and_the_slowest_rank_decides(tables: Path) -> None:
    moe = Served("tiny", layers=LAYERS, hidden=0, experts=64, top_k=4, expert_ranks=2)
    short, long = plan((0, 20)), plan((0, 200))
    seconds = kernels(tables, moe).step_s([short, long])
    active = 64 / 2 * (1 - (1 - 4 / 64) ** 220)
    experts = LAYERS * (110 + 10 * active)
    rank = dense_us(200) + 101 + LAYERS * attention_us(200, 0, 0, 0)
    assert seconds == pytest.approx(1e-6 * (rank + experts) + 2 * LAYERS * 1e-3)
    assert kernels(tables, moe).step_s([plan(), long]) < seconds
