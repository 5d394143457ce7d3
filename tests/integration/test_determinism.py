"""The same seed draws the same tokens, wherever a prompt runs and among whatever company."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from integration.deployment import Deployment
from integration.runs import COMMON_FLAGS, EXTRA

NUM_TOKENS = 64
NUM_OTHERS = 30
SEEDS = {1: 11, 40: 12, 300: 13}
"""The seed of the prompt of each length."""


def prompt_of(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(length)]


async def draw(served: Deployment) -> dict[str, list[list[int]]]:
    """The 64 tokens of each prompt, alone and then among 30 others, at temperature 1."""
    async with served.async_client() as client:

        async def ask(prompt: list[int], seed: int, max_tokens: int = NUM_TOKENS) -> list[int]:
            reply = await client.completions.create(
                model=served.model,
                prompt=prompt,
                max_tokens=max_tokens,
                temperature=1,
                seed=seed,
                extra_body=EXTRA,
            )
            tokens: list[int] = reply.choices[0].token_ids
            return tokens

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
def test_a_seed_draws_the_same_tokens_everywhere(tiny_llama: Path) -> None:
    drawn = {}
    for layout in ("1U", "1P2D"):
        flags = (*COMMON_FLAGS, "--engine.num-kv-blocks", "200")
        with Deployment.start(tiny_llama, layout, *flags) as served:
            drawn[layout] = asyncio.run(draw(served))
            counters = served.counters()
        if layout == "1P2D":  # both were used
            assert all(counters[f"decode-{i}"]["imported_blocks"] > 0 for i in range(2))
    expected = drawn["1U"]["alone"]
    assert all(len(tokens) == NUM_TOKENS for tokens in expected)
    for layout, found in drawn.items():
        for company in ("alone", "again", "crowded"):
            assert found[company] == expected, (layout, company)
        for tokens, others in zip(found["other seed"], expected, strict=True):
            assert tokens != others
