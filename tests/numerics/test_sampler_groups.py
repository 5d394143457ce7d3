"""Rows that share calls draw what each draws alone, and the uniform numbers are Philox's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from baton.errors import Internal
from baton.model import sampler
from baton.model.sampler import SampleRow, is_greedy, sample, uniform
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
    filters = [{}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.01, "top_p": 0.999}, {"top_k": 1}, {}]
    rows = [
        SampleRow(
            SamplingParams(max_tokens=9, seed=i, temperature=temperatures[i % 5], **filters[i % 6]),
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
    lean = [None if is_greedy(row.params) else row for row in rows]
    assert None in lean
    assert sample(logits, lean) == alone


def test_greedy_is_what_needs_nothing_but_the_largest_logit() -> None:
    assert is_greedy(SamplingParams(max_tokens=9, temperature=0.0, top_p=0.5, seed=3))
    for other in (
        {"temperature": 0.1},
        {"logprobs": 0},
        {"min_tokens": 1},
        {"logit_bias": {1: 1.0}},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
    ):
        assert not is_greedy(SamplingParams(9, **{"temperature": 0.0, **other}))  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [[None, None], [None, SampleRow(SamplingParams(9), 0, 1, (), ())]])
def test_logits_that_are_no_numbers_are_refused(bad: float, rows: list[SampleRow | None]) -> None:
    logits = torch.zeros(2, 1000)
    logits[1, 777] = bad
    with pytest.raises(Internal, match="not finite"):
        sample(logits, rows)


def test_of_equal_logits_the_lowest_token_is_drawn() -> None:
    logits = torch.zeros(3, 5000)
    logits[1, 4000:] = 2.0
    logits[2, :] = -math.inf
    logits[2, 70:90] = -3.0
    assert [one.token_id for one in sample(logits, [None] * 3)] == [0, 4000, 70]


def test_running_sums_are_added_one_after_the_other() -> None:
    weights = np.exp(np.random.default_rng(0).normal(size=(5, 4099)))
    one_by_one = np.array([list(np.add.accumulate(row)) for row in weights])
    assert (sampler._cumulative(weights) == one_by_one).all()


def test_output_matters_only_where_it_is_said_to() -> None:
    assert not SamplingParams(max_tokens=9, logit_bias={1: 2.0}, top_k=3).reads_output
    for field in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert SamplingParams(max_tokens=9, **{field: 0.5}).reads_output
    assert SamplingParams(max_tokens=9, min_tokens=1).reads_output
