"""The whole engine, in process, against transformers: batching, chunks, hits, preemption."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from numerics.checkpoints import make_served_checkpoint
from numerics.tiny_models import is_greedy, reference_model

import baton
from baton import SamplingParams

ARCHITECTURES = ["llama", "mistral", "qwen2", "qwen3"]


def prompts_of_mixed_lengths(count: int, seed: int = 0) -> list[list[int]]:
    """1 to 700 tokens; every third shares a prefix with the others of its kind."""
    rng = random.Random(seed)
    shared = [rng.randrange(256) for _ in range(100)]
    prompts = []
    for i in range(count):
        length = rng.choice([1, 2, 15, 16, 17, rng.randint(3, 120), rng.randint(100, 700)])
        own = [rng.randrange(256) for _ in range(length)]
        prompts.append((shared + own)[:700] if i % 3 == 0 else own)
    return prompts


@pytest.mark.parametrize("variant", ARCHITECTURES)
def test_greedy_equals_transformers_with_chunks_hits_and_preemption(
    tmp_path: Path, variant: str
) -> None:
    torch.set_num_threads(2)
    path = make_served_checkpoint(tmp_path / "model", variant)
    model = reference_model(path)
    prompts = prompts_of_mixed_lengths(50)
    lengths = [64 + i % 7 for i in range(50)]
    llm = baton.LLM(
        path,
        engine={"max_num_batched_tokens": 96, "num_kv_blocks": 120, "threads": 2},
    )
    sampling = [SamplingParams(max_tokens=n, temperature=0.0) for n in lengths]
    completions = llm.generate(prompts, sampling)
    for prompt, length, completion in zip(prompts, lengths, completions, strict=True):
        assert len(completion.token_ids) == length
        assert is_greedy(model, prompt, completion.token_ids)
    counters = llm.engine.scheduler.counters
    assert counters["preemptions"] > 0
    assert counters["prefix_hit_tokens"] > 0
    llm.engine.scheduler.check()
    assert llm.engine.scheduler.pool.num_free == 120
