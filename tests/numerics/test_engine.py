"""Whole engines, in process, against transformers: batching, chunks, hits, preemption, handoff.

Every run has 50 prompts of 1 to 700 tokens at once, a step of at most 96 tokens (so that prompts
are computed in chunks) and prompts that begin alike. Counters prove that the path under test was
taken.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from numerics.checkpoints import make_served_checkpoint
from numerics.engines import Engines
from numerics.prompts import (
    ARCHITECTURES,
    check_logprobs,
    greedy,
    num_answer_tokens,
    prompts_of_mixed_lengths,
)
from numerics.tiny_models import is_greedy, reference_model

import baton

TINY_POOL = {"engine.max_num_batched_tokens": 96, "engine.num_kv_blocks": 120}
AMPLE_POOL = {"engine.max_num_batched_tokens": 96, "engine.num_kv_blocks": 2500}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("layout", ["1U", "1P1D", "2P2D"])
@pytest.mark.parametrize("variant", ARCHITECTURES)
def test_greedy_answers_equal_transformers(tmp_path: Path, variant: str, layout: str) -> None:
    path = make_served_checkpoint(tmp_path / "model", variant)
    model = reference_model(path)
    prompts = prompts_of_mixed_lengths()
    with Engines(path, layout, **TINY_POOL).running() as engines:
        answers = engines.generate(prompts, greedy(logprobs=3))
    for answer, prompt, length in zip(answers, prompts, num_answer_tokens(), strict=True):
        assert len(answer.token_ids) == length
        assert is_greedy(model, prompt, answer.token_ids)
        check_logprobs(model, prompt, answer.token_ids, answer.logprobs)
    num_prompt_tokens = sum(map(len, prompts))
    if layout == "1U":
        counters = engines.counters("unified")
        assert counters["preemptions"] > 0
        assert counters["prefix_hit_tokens"] > 0
        return
    prefill, decode = engines.counters("prefill"), engines.counters("decode")
    assert prefill["prefix_hit_tokens"] > 0
    assert prefill["tokens_generated"] == len(prompts)
    assert 0 < prefill["prompt_tokens_computed"] < num_prompt_tokens
    assert decode["preemptions"] > 0
    assert decode["imported_blocks"] > 0
    assert decode["prompt_tokens_computed"] == 0
    assert decode["prompt_tokens_recomputed"] > 0


def test_a_decode_worker_with_room_computes_no_prompt_token_at_all(tmp_path: Path) -> None:
    path = make_served_checkpoint(tmp_path / "model", "llama")
    model = reference_model(path)
    prompts = prompts_of_mixed_lengths(seed=1)
    with Engines(path, "1P1D", **AMPLE_POOL).running() as engines:
        answers = engines.generate(prompts, greedy())
    for answer, prompt in zip(answers, prompts, strict=True):
        assert is_greedy(model, prompt, answer.token_ids)
    decode = engines.counters("decode")
    assert decode["imported_blocks"] > 0
    assert decode.get("preemptions", 0) == decode.get("prompt_tokens_recomputed", 0) == 0
    assert decode["prompt_tokens_computed"] == 0
    # Each answer's first token came from the prefill worker, and its KV is computed here.
    assert decode["tokens_computed"] == sum(num_answer_tokens()) - len(prompts)


def test_offline_answers_equal_transformers(tmp_path: Path) -> None:
    path = make_served_checkpoint(tmp_path / "model", "llama")
    model = reference_model(path)
    prompts = prompts_of_mixed_lengths()
    llm = baton.LLM(path, engine={"max_num_batched_tokens": 96, "num_kv_blocks": 120, "threads": 1})
    for _ in range(2):  # the second time most prompts are in the cache, or were evicted from it
        for prompt, answer in zip(prompts, llm.generate(prompts, greedy()), strict=True):
            assert is_greedy(model, prompt, answer.token_ids)
    counters = llm.engine.scheduler.counters
    assert counters["preemptions"] > 0
    assert counters["prefix_hit_tokens"] > 0
    llm.engine.scheduler.check()
    assert llm.engine.scheduler.pool.num_free == 120
