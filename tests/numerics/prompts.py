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
TINY_POOL_BLOCKS = 56
"""Room for the longest of the requests, and not much more."""


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


def mixed_requests(seed: int = 0) -> list[tuple[list[int], int]]:
    """The prompts of mixed lengths, with the number of tokens to generate."""
    return list(zip(prompts_of_mixed_lengths(seed), num_answer_tokens(), strict=True))


def long_requests() -> list[tuple[list[int], int]]:
    """8 short prompts with long answers, 2,560 tokens in all.

    Sent at once to one or two workers with pools of `TINY_POOL_BLOCKS`, 896 tokens each, they are
    admitted together, because answers were short so far, and cannot all stay: whatever the
    timing, some are preempted.
    """
    rng = random.Random(8)
    return [([rng.randrange(256) for _ in range(20)], 300) for _ in range(8)]


def greedy(
    requests: Sequence[tuple[list[int], int]], *, logprobs: int | None = None
) -> list[SamplingParams]:
    """Greedy sampling of each request's number of tokens."""
    return [
        SamplingParams(max_tokens=count, temperature=0.0, logprobs=logprobs)
        for _, count in requests
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
