"""The same seed draws the same tokens, wherever a prompt runs and among whatever company."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from integration.deployment import Deployment
from integration.runs import COMMON_FLAGS, EXTRA
from numerics.native_kernels import kernels_named

NUM_TOKENS = 64
NUM_OTHERS = 30
SEEDS = {1: 11, 40: 12, 300: 13}
"""The seed of the prompt of each length."""


def prompt_of(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(length)]


Drawn = tuple[list[int], list[float]]
"""64 tokens and their log-probabilities."""


async def draw(served: Deployment) -> dict[str, list[Drawn]]:
    """What each prompt gets, alone and then among 30 others, at temperature 1."""
    async with served.async_client() as client:

        async def ask(prompt: list[int], seed: int, max_tokens: int = NUM_TOKENS) -> Drawn:
            reply = await client.completions.create(
                model=served.model,
                prompt=prompt,
                max_tokens=max_tokens,
                temperature=1,
                seed=seed,
                logprobs=0,
                extra_body=EXTRA,
            )
            choice = reply.choices[0]
            return choice.token_ids, choice.logprobs.token_logprobs

        probes = [(prompt_of(length, seed), seed) for length, seed in SEEDS.items()]
        alone = [await ask(prompt, seed) for prompt, seed in probes]
        again = [await ask(prompt, seed) for prompt, seed in probes]
        crowded = []
        for prompt, seed in probes:
            others = [
                ask(prompt_of(1 + 9 * i, seed * 100 + i), i, NUM_TOKENS + i)
                for i in range(NUM_OTHERS)
            ]
            half = NUM_OTHERS // 2  # some come before it, some after it
            answers = await asyncio.gather(*others[:half], ask(prompt, seed), *others[half:])
            crowded.append(answers[half])
        other_seed = [await ask(prompt, seed + 1) for prompt, seed in probes]
    return {"alone": alone, "again": again, "crowded": crowded, "other seed": other_seed}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_seed_draws_the_same_tokens_everywhere(tiny_llama: Path, dtype: str) -> None:
    """And the same log-probabilities, to the last bit: the kernels are exact."""
    kernels_named("native")
    drawn = {}
    for layout in ("1U", "2P2D"):
        flags = (*COMMON_FLAGS, "--model.dtype", dtype, "--engine.num-kv-blocks", "200")
        with Deployment.start(tiny_llama, layout, *flags) as served:
            drawn[layout] = asyncio.run(draw(served))
            counters = served.counters()
        if layout == "2P2D":  # both were used
            assert all(counters[f"decode-{i}"]["imported_blocks"] > 0 for i in range(2))
    expected = drawn["1U"]["alone"]
    assert all(len(tokens) == len(logprobs) == NUM_TOKENS for tokens, logprobs in expected)
    for layout, found in drawn.items():
        for company in ("alone", "again", "crowded"):
            assert found[company] == expected, (layout, company)
        for (tokens, _), (others, _) in zip(found["other seed"], expected, strict=True):
            assert tokens != others
