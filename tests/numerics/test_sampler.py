"""The sampler against a slow and plain reading of its own rules."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from baton.errors import Internal
from baton.model.sampler import SampleRow, sample, uniform
from baton.types import SamplingParams

VOCAB = 50


def row(prompt=(1, 2, 3), output=(), choice=0, position=None, **params) -> SampleRow:
    at = len(prompt) + len(output) if position is None else position
    return SampleRow(SamplingParams(max_tokens=100, **params), choice, at, prompt, output)


def random_logits(rows: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def naive_distribution(logits: torch.Tensor, row: SampleRow) -> np.ndarray:
    """The probabilities to draw from, one token at a time. No ties in the input."""
    params = row.params
    x = [float(value) for value in logits]
    for token in range(VOCAB):
        if token in row.prompt or token in row.output:
            penalty = params.repetition_penalty
            x[token] = x[token] / penalty if x[token] > 0 else x[token] * penalty
        count = list(row.output).count(token)
        x[token] -= params.frequency_penalty * count
        x[token] -= params.presence_penalty * (count > 0)
        x[token] += params.logit_bias.get(token, 0.0)
        if token in params.stop_token_ids and len(row.output) < params.min_tokens:
            x[token] = -math.inf
    order = sorted(range(VOCAB), key=lambda token: -x[token])
    if params.temperature == 0:
        order, x = order[:1], [0.0] * VOCAB
    temperature = params.temperature or 1.0
    if params.top_k:
        order = order[: params.top_k]
    weight = {token: math.exp((x[token] - x[order[0]]) / temperature) for token in order}
    total, kept, mass = sum(weight.values()), [], 0.0
    for token in order:
        kept.append(token)
        mass += weight[token] / total
        if mass >= params.top_p:
            break
    kept = [token for token in kept if weight[token] >= params.min_p * weight[order[0]]]
    found = np.zeros(VOCAB)
    for token in kept:
        found[token] = weight[token]
    return found / found.sum()


CASES = {
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 2.0},
    "top_k": {"top_k": 7},
    "top_k over vocabulary": {"top_k": 1000},
    "top_p": {"top_p": 0.7},
    "tiny top_p": {"top_p": 1e-9},
    "min_p": {"min_p": 0.05},
    "filters": {"top_k": 20, "top_p": 0.9, "min_p": 0.02, "temperature": 1.3},
    "repetition": {"repetition_penalty": 1.8, "output": (4, 4, 9)},
    "weak repetition": {"repetition_penalty": 0.5, "output": (4, 4, 9)},
    "presence": {"presence_penalty": 1.5, "output": (4, 4, 9)},
    "frequency": {"frequency_penalty": 1.0, "output": (4, 4, 4, 9)},
    "bias": {"logit_bias": {5: 4.0, 6: -100.0}},
    "minimum": {"min_tokens": 3, "stop_token_ids": (0, 4, 9), "output": (1, 2)},
    "minimum reached": {"min_tokens": 2, "stop_token_ids": (0, 4, 9), "output": (1, 2)},
    "all": {
        "temperature": 0.8,
        "top_k": 30,
        "top_p": 0.95,
        "min_p": 0.001,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.4,
        "frequency_penalty": -0.3,
        "logit_bias": {1: 2.0, 40: -3.0},
        "min_tokens": 5,
        "stop_token_ids": (3,),
        "output": (10, 11, 10),
    },
}


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_distribution(name):
    """Chi-square over 2,000 positions with a fixed seed; bins expecting under 8 are pooled."""
    logits = random_logits(1, seed=len(name), scale=1.5)
    logits[0, [4, 9, 10, 11]] += 3.0  # what the penalties are about is likely
    draws = 2000
    rows = [row(seed=11, position=1000 + i, **CASES[name]) for i in range(draws)]
    expected = naive_distribution(logits[0], rows[0]) * draws
    tokens = [found.token_id for found in sample(logits.expand(draws, -1), rows)]
    counts = np.bincount(tokens, minlength=VOCAB)
    assert not counts[expected == 0].any()
    large = expected >= 8
    observed = np.append(counts[large], counts[~large].sum())
    wanted = np.append(expected[large], expected[~large].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    if freedom == 0:
        return
    chi_square = ((observed - wanted) ** 2 / wanted).sum()
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("name", CASES)
def test_greedy_takes_the_largest(name):
    params = CASES[name] | {"temperature": 0.0}
    logits = random_logits(20, seed=5)
    found = sample(logits, [row(**params)] * 20)
    for i, drawn in enumerate(found):
        assert drawn.token_id == naive_distribution(logits[i], row(**params)).argmax()


def test_a_neighbour_changes_nothing():
    logits = random_logits(len(CASES) + 3, seed=9)
    rows = [row(seed=i, logprobs=2, **params) for i, params in enumerate(CASES.values())]
    rows += [row(temperature=0.0), row(temperature=0.0, logprobs=0), row(seed=3)]
    before = logits.clone()
    together = sample(logits, rows)
    assert torch.equal(logits, before)
    alone = [sample(logits[i : i + 1], [rows[i]])[0] for i in range(len(rows))]
    assert together == alone
    backwards = sample(logits.flip(0), rows[::-1])
    assert together == backwards[::-1]


def test_a_draw_depends_on_seed_choice_and_position_alone():
    logits = random_logits(1, scale=1.0).expand(40, -1)

    def tokens(**changes) -> list[int]:
        rows = [row(position=i, **{"seed": 1, "choice": 0} | changes) for i in range(40)]
        return [found.token_id for found in sample(logits, rows)]

    first = tokens()
    assert tokens() == first
    assert len(set(first)) > 5
    assert tokens(seed=2) != first
    assert tokens(choice=1) != first
    assert tokens(seed=(1 << 64) - 1) != first


def test_uniform_numbers_are_fixed_for_ever():
    # The generator's own published vector: counter 0 (numpy counts up first), key 0.
    published = np.random.Philox(key=[0, 0], counter=[(1 << 64) - 1] * 4).random_raw()
    assert published == 0x16554D9ECA36314C
    assert uniform(0, 0, 0) == 0.011546754286331617
    assert uniform(1, 0, 0) == 0.30356803430675866
    assert uniform((1 << 64) - 1, 3, 12345) == 0.9417440584846888


def test_uniform_numbers_are_uniform_and_unrelated():
    axes = [
        [uniform(7, 0, position) for position in range(4000)],
        [uniform(7, choice, 5) for choice in range(4000)],
        [uniform(seed, 0, 5) for seed in range(4000)],
    ]
    for numbers in map(np.array, axes):
        assert 0 < numbers.min() < numbers.max() < 1
        assert abs(numbers.mean() - 0.5) < 4 / math.sqrt(12 * 4000)
        counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
        assert ((counts - 200) ** 2 / 200).sum() < 19 + 4 * math.sqrt(38)
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 4 / math.sqrt(4000)


def test_logprobs_are_of_the_raw_logits():
    logits = random_logits(1, seed=4)
    params = {"temperature": 0.5, "top_k": 3, "logit_bias": {7: 50.0}, "logprobs": 5}
    found = sample(logits, [row(**params)])[0]
    expected = logits[0].double().log_softmax(-1)
    assert found.token_id == 7
    assert found.logprobs is not None
    assert found.logprobs.chosen.token_id == 7
    assert found.logprobs.chosen.logprob == pytest.approx(expected[7].item(), abs=1e-9)
    best = expected.topk(5)
    assert [top.token_id for top in found.logprobs.top] == best.indices.tolist()
    assert [top.logprob for top in found.logprobs.top] == pytest.approx(best.values.tolist())
    only = sample(logits, [row(logprobs=0, temperature=0.0)])[0].logprobs
    assert only is not None
    assert only.top == ()
    assert sample(logits, [row()])[0].logprobs is None


def test_ties_stay_in_and_greedy_takes_the_lowest():
    logits = torch.zeros(1, VOCAB)
    logits[0, 20:24] = 5.0
    for params in ({"top_k": 2}, {"top_p": 0.3}):
        rows = [row(position=i, **params) for i in range(200)]
        tokens = {found.token_id for found in sample(logits.expand(200, -1), rows)}
        assert tokens == {20, 21, 22, 23}
    assert sample(logits, [row(temperature=0.0)])[0].token_id == 20
    tied = sample(logits, [row(temperature=0.0, logprobs=3)])[0]
    assert tied.token_id == 20
    assert tied.logprobs is not None
    assert [top.token_id for top in tied.logprobs.top] == [20, 21, 22]


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e-3])
def test_a_vanishing_temperature_is_greedy(temperature):
    logits = random_logits(30, seed=8, scale=30.0)
    found = sample(logits, [row(temperature=temperature, seed=i) for i in range(30)])
    assert [drawn.token_id for drawn in found] == logits.argmax(-1).tolist()


def test_a_vocabulary_of_stop_tokens_still_yields_one():
    params = {"min_tokens": 5, "stop_token_ids": tuple(range(VOCAB))}
    assert 0 <= sample(random_logits(1), [row(**params)])[0].token_id < VOCAB


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_refused(bad, temperature):
    logits = random_logits(3)
    logits[1, 4] = bad
    with pytest.raises(Internal, match="not finite"):
        sample(logits, [row(temperature=temperature)] * 3)


def test_no_rows():
    assert sample(torch.empty(0, VOCAB), []) == []
