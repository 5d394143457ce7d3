"""Whole engines, in process, against transformers: batching, chunks, hits, preemption, handoff.

Every run has 50 prompts of 1 to 700 tokens at once, some of which begin alike, and then a few with
long answers. A step takes at most 96 tokens, so that prompts are computed in chunks. Counters
prove that the path under test was taken.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from numerics.checkpoints import make_served_checkpoint
from numerics.engines import Engines
from numerics.native_kernels import kernels_named
from numerics.prompts import (
    ARCHITECTURES,
    TINY_POOL_BLOCKS,
    check_logprobs,
    greedy,
    long_requests,
    mixed_requests,
)
from numerics.tiny_models import is_greedy, reference_model

import baton

CHUNKED = {"engine.max_num_batched_tokens": 96}
TINY_POOL = {**CHUNKED, "engine.num_kv_blocks": TINY_POOL_BLOCKS}
AMPLE_POOL = {**CHUNKED, "engine.num_kv_blocks": 2500}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("layout", "kernels"),
    [("1U", "torch"), ("1U", "native"), ("1P1D", "torch"), ("1P1D", "native"), ("2P2D", "auto")],
)
@pytest.mark.parametrize("variant", ARCHITECTURES)
def test_greedy_answers_equal_transformers(
    tmp_path: Path, variant: str, layout: str, kernels: str
) -> None:
    if kernels == "native":
        kernels_named("native")
    path = make_served_checkpoint(tmp_path / "model", variant)
    model = reference_model(path)
    requests = mixed_requests() + long_requests()
    options = {**TINY_POOL, "engine.kernels": kernels}
    with Engines(path, layout, **options).running() as engines:
        answers = engines.generate(mixed_requests(), logprobs=3)
        answers += engines.generate(long_requests(), logprobs=3)
    for answer, (prompt, length) in zip(answers, requests, strict=True):
        assert len(answer.token_ids) == length
        assert is_greedy(model, prompt, answer.token_ids)
        check_logprobs(model, prompt, answer.token_ids, answer.logprobs)
    num_prompt_tokens = sum(len(prompt) for prompt, _ in requests)
    if layout == "1U":
        counters = engines.counters("unified")
        assert counters["preemptions"] > 0
        assert counters["prefix_hit_tokens"] > 0
        return
    prefill, decode = engines.counters("prefill"), engines.counters("decode")
    assert prefill["prefix_hit_tokens"] > 0
    assert prefill["tokens_generated"] == len(requests)
    assert 0 < prefill["prompt_tokens_computed"] < num_prompt_tokens
    assert decode["preemptions"] > 0
    assert decode["imported_blocks"] > 0
    assert decode["prompt_tokens_computed"] == 0
    assert decode["prompt_tokens_recomputed"] > 0


def test_a_decode_worker_with_room_computes_no_prompt_token_at_all(tmp_path: Path) -> None:
    path = make_served_checkpoint(tmp_path / "model", "llama")
    model = reference_model(path)
    requests = mixed_requests(seed=1)
    with Engines(path, "1P1D", **AMPLE_POOL).running() as engines:
        answers = engines.generate(requests)
    for answer, (prompt, _) in zip(answers, requests, strict=True):
        assert is_greedy(model, prompt, answer.token_ids)
    decode = engines.counters("decode")
    assert decode["imported_blocks"] > 0
    assert decode["preemptions"] == decode["prompt_tokens_recomputed"] == 0
    assert decode["prompt_tokens_computed"] == 0
    # Each answer's first token came from the prefill worker, and its KV is computed here.
    assert decode["tokens_computed"] == sum(length for _, length in requests) - len(requests)


def test_offline_answers_equal_transformers(tmp_path: Path) -> None:
    path = make_served_checkpoint(tmp_path / "model", "llama")
    model = reference_model(path)
    llm = baton.LLM(
        path,
        engine={"max_num_batched_tokens": 96, "num_kv_blocks": TINY_POOL_BLOCKS, "threads": 1},
    )
    # The second time most prompts are in the cache, or were evicted from it.
    for requests in (mixed_requests(), mixed_requests(), long_requests()):
        prompts = [prompt for prompt, _ in requests]
        answers = llm.generate(prompts, greedy(requests))
        for (prompt, length), answer in zip(requests, answers, strict=True):
            assert len(answer.token_ids) == length
            assert is_greedy(model, prompt, answer.token_ids)
    counters = llm.engine.scheduler.counters
    assert counters["preemptions"] > 0
    assert counters["prefix_hit_tokens"] > 0
    llm.engine.scheduler.check()
    assert llm.engine.scheduler.pool.num_free == TINY_POOL_BLOCKS
