"""Rows that share calls draw what each draws alone, and the uniform numbers are Philox's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from baton.model import sampler
from baton.model.sampler import SampleRow, reads_output, sample, uniform
from baton.types import SamplingParams

WORD = (1 << 64) - 1


@pytest.mark.parametrize(
    "key", [(0, 0, 0), (5, 1, 7), (WORD, 3, 1 << 40), (1 << 63, WORD, WORD - 1)]
)
def test_uniform_is_the_first_word_of_numpys_philox(key: tuple[int, int, int]) -> None:
    seed, choice, position = key
    generator = np.random.Philox(
        key=np.array([seed, choice], dtype=np.uint64),
        counter=np.array([position, 0, 0, 0], dtype=np.uint64),
    )
    assert uniform(*key) == ((int(generator.random_raw()) >> 11) + 0.5) * 2.0**-53


@pytest.mark.parametrize("vocab_size", [50, 4099, sampler._GROUP_NUMBERS - 1])
@pytest.mark.parametrize("scale", [0.1, 20.0])
def test_a_group_draws_what_each_row_draws_alone(vocab_size: int, scale: float) -> None:
    num_rows = 70 if vocab_size < 10_000 else 3
    generator = torch.Generator().manual_seed(1)
    logits = scale * torch.randn(num_rows, vocab_size, generator=generator)
    temperatures = [1.0, 0.0, 1e-300, 0.3, 2.0]
    rows = [
        SampleRow(
            SamplingParams(max_tokens=9, seed=i, temperature=temperatures[i % 5]),
            i % 3,
            i,
            (1,),
            (),
        )
        for i in range(num_rows)
    ]
    alone = [
        sampler._sample_row(logits[i].numpy().astype(np.float64), row) for i, row in enumerate(rows)
    ]
    assert sample(logits, rows) == alone


def test_running_sums_are_added_one_after_the_other() -> None:
    weights = np.exp(np.random.default_rng(0).normal(size=(5, 4099)))
    one_by_one = np.array([list(np.add.accumulate(row)) for row in weights])
    assert (sampler._cumulative(weights) == one_by_one).all()


def test_output_matters_only_where_it_is_said_to() -> None:
    assert not reads_output(SamplingParams(max_tokens=9, logit_bias={1: 2.0}, top_k=3))
    for field in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert reads_output(SamplingParams(max_tokens=9, **{field: 0.5}))
    assert reads_output(SamplingParams(max_tokens=9, min_tokens=1))
