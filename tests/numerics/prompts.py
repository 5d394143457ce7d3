"""The prompts of the numerics suites, and what an exact answer to one is."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from numerics.tiny_models import reference_logits

from baton.types import SampledLogprobs, SamplingParams

ARCHITECTURES = ["llama", "mistral", "qwen2", "qwen3"]
NUM_PROMPTS = 50
LONGEST = 700
MAX_LOGPROB_ERROR = 1e-4


def prompts_of_mixed_lengths(seed: int = 0) -> list[list[int]]:
    """50 prompts of 1 to 700 tokens below 256; every third shares a prefix of 100 with others."""
    rng = random.Random(seed)
    shared = [rng.randrange(256) for _ in range(100)]
    prompts = []
    for i in range(NUM_PROMPTS):
        length = rng.choice([1, 2, 15, 16, 17, rng.randint(3, 120), rng.randint(100, LONGEST)])
        length = {0: 1, 1: LONGEST}.get(i, length)
        own = [rng.randrange(256) for _ in range(length)]
        prompts.append((shared + own)[:LONGEST] if i % 3 == 2 else own)
    return prompts


def num_answer_tokens() -> list[int]:
    """64 and more for each of the prompts, so that they do not end together."""
    return [64 + i % 7 for i in range(NUM_PROMPTS)]


def greedy(*, logprobs: int | None = None) -> list[SamplingParams]:
    """Greedy sampling of each prompt's number of tokens."""
    return [
        SamplingParams(max_tokens=count, temperature=0.0, logprobs=logprobs)
        for count in num_answer_tokens()
    ]


def check_logprobs(
    model: Any,
    prompt: Sequence[int],
    answer: Sequence[int],
    logprobs: Sequence[SampledLogprobs],
) -> None:
    """Assert that every log-probability told is that of `model`, a transformers model."""
    assert len(logprobs) == len(answer)
    logits = reference_logits(model, [*prompt, *answer[:-1]])[len(prompt) - 1 :]
    expected = torch.log_softmax(logits, -1)
    for row, token, told in zip(expected, answer, logprobs, strict=True):
        assert told.chosen.token_id == token
        for one in (told.chosen, *told.top):
            assert abs(row[one.token_id].item() - one.logprob) < MAX_LOGPROB_ERROR
        best = row.topk(len(told.top)).values
        for value, one in zip(best.tolist(), told.top, strict=True):
            assert abs(value - one.logprob) < MAX_LOGPROB_ERROR
