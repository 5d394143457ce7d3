"""Lengths that DistServe did not publish: what is known of them, and how else they may have been.

Known are the paper's means (`MEANS`, from its figure of the distributions; not verified) and how
its data were made: OPT's 2,048 tokens are the limit of prompt and answer together; ShareGPT prompts
are a random number of turns; LongBench's are cut at 1,900 to 2,040 tokens; HumanEval's are whole.
Each workload has a usual shape and others, so that what hangs on the shape can be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from reproduce.queues import Lengths

MAX_TOKENS = 2048
MEANS = {"ShareGPT": (755, 200), "HumanEval": (171, 98), "LongBench": (1738, 91)}
Draw = Callable[[Random], float]
SHAPES = {
    "ShareGPT": {
        "log-normal": (0.9, 1.0),
        "log-normal, narrow": (0.5, 0.5),
        "log-normal, wide": (1.4, 1.3),
        "all equal": (0.0, 0.0),
    },
    "HumanEval": {
        "log-normal": (0.45, 0.6),
        "log-normal, wide": (0.7, 1.0),
        "all equal": (0.0, 0.0),
    },
    "LongBench": {
        "log-normal": (0.25, 1.2),
        "log-normal, wide": (0.6, 1.6),
        "all equal": (0.0, 0.0),
    },
}
"""By workload and shape: the sigma of prompts and of answers. The first is the usual one."""


def drawn(workload: str, shape: str, count: int, seed: int) -> list[Lengths]:
    """Lengths of that shape, with the paper's means after the cut at 2,048 tokens."""
    prompt_mean, output_mean = MEANS[workload]
    prompt_sigma, output_sigma = SHAPES[workload][shape]
    draw = Random(seed)
    outputs = _with_mean(output_mean, output_sigma, MAX_TOKENS // 2, count, draw)
    prompts = _with_mean(prompt_mean, prompt_sigma, MAX_TOKENS - 8, count, draw)
    return [
        (min(prompt, MAX_TOKENS - output), output)
        for prompt, output in zip(prompts, outputs, strict=True)
    ]


def fitting(lengths: Sequence[Lengths]) -> list[Lengths]:
    """Those that OPT can hold."""
    return [pair for pair in lengths if sum(pair) < MAX_TOKENS]


def _with_mean(mean: float, sigma: float, most: int, count: int, draw: Random) -> list[int]:
    """Log-normal draws, none above `most`, scaled until their mean is `mean`."""
    factors = [draw.lognormvariate(0.0, sigma) if sigma else 1.0 for _ in range(count)]
    low, high = 1e-3 * mean, 1e3 * mean

    def scaled(scale: float) -> list[int]:
        return [max(1, min(most, round(scale * factor))) for factor in factors]

    for _ in range(40):
        middle = (low * high) ** 0.5
        too_small = sum(scaled(middle)) < mean * count
        low, high = (middle, high) if too_small else (low, middle)
    return scaled(high)
