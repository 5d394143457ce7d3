"""The kernels draw the tokens that the sampler's definition draws, or say that it has to."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from numerics.checkpoints import make_served_checkpoint
from numerics.native_kernels import ON_THIS_KIND, kernels_named
from torch import Tensor

import baton
from baton.model import sampler
from baton.model.native import Kernels
from baton.model.sampler import SampleRow, sample, uniform
from baton.types import SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")

TEMPERATURES = [1.0, 0.8, 0.3, 2.0, 1e-3, 1e-30, 1e-305, 5e-324]
TOP_P = [1.0, 0.95, 0.5, 0.1, 1e-3, 1e-9, 1e-300, 0.999999, 1 - 2**-53]
MIN_P = [0.0, 0.05, 0.5, 1e-12, 1e-300, 1.0]
LOGITS = {
    "normal": lambda x: 3 * x,
    "flat": lambda x: 1e-3 * x,
    "steep": lambda x: 60 * x,
    "far from 0": lambda x: 2 * x - 5000,
    "huge": lambda x: 1e37 * x,
    "tied": lambda x: (2 * x).round() / 2,
    "as bf16": lambda x: (4 * x).bfloat16().float(),
    "all equal": lambda x: 0 * x + 7.25,
    "hardly unequal": lambda x: 1e-13 * x,
    "unequal by less than fp64 tells": lambda x: torch.cat([0 * x[:, :1] + 9, 1e-17 * x[:, 1:]], 1),
    "masked": lambda x: x.masked_fill(x < 0.7, -math.inf).index_fill(1, torch.tensor([0]), 1.0),
    "one alone": lambda x: (0 * x - math.inf).index_fill(1, torch.tensor([x.shape[1] // 2]), 2.0),
    "one stands out": lambda x: x.index_fill(1, torch.tensor([x.shape[1] - 1]), 20.0),
    "barred": lambda x: x.masked_fill(x.abs() > 1, -1e30),
}


@pytest.fixture(params=ON_THIS_KIND)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    found = kernels_named(request.param)
    assert found is not None
    return found


def row(position: int = 0, seed: int = 0, choice: int = 0, **params: float) -> SampleRow:
    return SampleRow(SamplingParams(9, seed=seed, **params), choice, position, (1,), ())  # type: ignore[arg-type]


def natively(kernels: Kernels, logits: Tensor, rows: list[SampleRow]) -> list[int]:
    """What the kernels say by themselves; -1 is not sure."""
    largest = logits.amax(-1).tolist()
    return kernels.draw(logits, sampler._draws(list(enumerate(rows)), largest))


def by_definition(logits: Tensor, rows: list[SampleRow]) -> list[int]:
    return [drawn.token_id for drawn in sample(logits, rows)]


def random_rows(count: int, vocab_size: int, rng: random.Random) -> list[SampleRow]:
    """Every second one with parameters that people use, the others with any."""
    top_k = [0, 1, 2, 3, 20, 33, vocab_size - 1, vocab_size, vocab_size + 1]
    rows = []
    for i in range(count):
        usual = i % 2 == 0
        params = {
            "temperature": rng.choice(TEMPERATURES[: 4 if usual else None]),
            "top_p": rng.choice(TOP_P[: 4 if usual else None]),
            "top_k": rng.choice(top_k) if rng.random() < 0.5 else 0,
            "min_p": rng.choice(MIN_P[: 3 if usual else None]) if rng.random() < 0.5 else 0.0,
        }
        rows.append(row(rng.randrange(1 << 40), rng.getrandbits(64), rng.randrange(4), **params))
    return rows


@pytest.mark.parametrize(
    ("vocab_size", "count"),
    [(1, 40), (2, 100), (7, 100), (31, 100), (50, 200), (257, 200), (4099, 100), (32_000, 30)],
)
def test_any_draw_is_the_definitions(kernels: Kernels, vocab_size: int, count: int) -> None:
    generator, rng = torch.Generator().manual_seed(vocab_size), random.Random(vocab_size)
    for name, shape in LOGITS.items():
        logits = shape(torch.randn(count, vocab_size, generator=generator)).contiguous()
        rows = random_rows(count, vocab_size, rng)
        expected = by_definition(logits, rows)
        found = natively(kernels, logits, rows)
        wrong = [
            (name, rows[i], one, other)
            for i, (one, other) in enumerate(zip(found, expected, strict=True))
            if one not in (other, -1)
        ]
        assert not wrong
        assert [drawn.token_id for drawn in sample(logits, rows, kernels)] == expected
        if not name.startswith(("hardly", "unequal")):
            # Of the usual rows all are drawn; a minimum of 1e-12 is as near to 0 as it can be.
            unsure = [rows[i].params for i in range(0, count, 2) if found[i] < 0]
            assert not unsure, name


def test_many_plain_draws_are_the_definitions(kernels: Kernels) -> None:
    """Several thousand of one distribution, through the same memory."""
    logits = 2 * torch.randn(1, 1000, generator=torch.Generator().manual_seed(3))
    many = logits.expand(4000, -1)
    for params in ({}, {"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.02, "temperature": 0.7}):
        rows = [row(position, 5, **params) for position in range(4000)]
        found = natively(kernels, many, rows)
        assert found == by_definition(many.contiguous(), rows)
        assert len(set(found)) > 10


def test_neither_threads_nor_neighbours_matter(kernels: Kernels) -> None:
    logits = 3 * torch.randn(40, 3000, generator=torch.Generator().manual_seed(1))
    rows = random_rows(40, 3000, random.Random(1))
    alone = [natively(kernels, logits[i : i + 1], [rows[i]])[0] for i in range(40)]
    torch.set_num_threads(3)
    assert natively(kernels, logits, rows) == alone
    wide = torch.full((40, 3500), 99.0)
    wide[:, :3000] = logits
    assert natively(kernels, wide[:, :3000], rows) == alone


def test_near_the_border_of_two_tokens_it_is_not_sure(kernels: Kernels) -> None:
    """Of two tokens the second weighs e^(-1 / temperature): their border can lie anywhere. What
    lies further from it than 2e-11 has to be decided, and rightly: so the exponential is as good
    as it has to be."""
    logits = torch.tensor([[0.0, -1.0]])
    numbers = [(p, u) for p in range(3000) if 0.5001 < (u := uniform(3, 0, p)) < 0.9999]
    assert len(numbers) > 1000
    for away, sure in ((2e-12, False), (3e-11, True)):
        for side in (1 - away, 1 + away):
            rows = []
            for position, number in numbers:
                border = number * side
                rows.append(row(position, 3, temperature=-1 / math.log(1 / border - 1)))
            found = natively(kernels, logits.expand(len(rows), -1), rows)
            assert found == [int(side < 1) if sure else -1] * len(rows)
            expected = [int(side < 1)] * len(rows)
            assert by_definition(logits.expand(len(rows), -1), rows) == expected


def test_near_a_border_among_many_tokens_it_is_not_sure(kernels: Kernels) -> None:
    """A million equal logits: borders at multiples of a millionth, and a bound of 1e-9."""
    vocab_size, bound = 1 << 20, 1e-9
    places = []
    for position in range(20_000):
        at = uniform(1, 0, position) * vocab_size
        places.append((abs(at - round(at)) / vocab_size, position))
    places.sort()
    near, far = places[:12], places[-12:]
    assert near[-1][0] < bound < far[0][0]
    logits = torch.full((1, vocab_size), 0.5).expand(24, -1)
    rows = [row(position, 1) for _, position in near + far]
    found = natively(kernels, logits, rows)
    assert found[:12] == [-1] * 12
    assert found[12:] == [int(uniform(1, 0, p) * vocab_size) for _, p in far]


@pytest.mark.parametrize("count", [5, 500])
def test_at_the_very_edge_of_top_p_it_is_not_sure(kernels: Kernels, count: int) -> None:
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(2))
    weights = np.sort(sampler._weights(logits[0].numpy().astype(np.float64), 1.0))[::-1]
    sums = np.cumsum(weights)
    edge = float(sums[count - 1] / sums[-1])
    positions = range(200)
    for top_p, sure in ((edge, False), (edge - 3e-11, True), (edge + 3e-11, True)):
        rows = [row(position, top_p=top_p) for position in positions]
        found = natively(kernels, logits.expand(200, -1), rows)
        expected = by_definition(logits.expand(200, -1), rows)
        assert found == (expected if sure else [-1] * 200)


def test_where_weights_are_hardly_unequal_it_is_not_sure(kernels: Kernels) -> None:
    """The tokens at a cut and next to it; ties stay together."""
    logits = torch.tensor([[5.0, 1e-13, 2e-13, -1.0]])
    for params in ({"top_k": 2}, {"top_p": 0.9935}):
        assert natively(kernels, logits, [row(**params)]) == [-1]
    assert natively(kernels, logits, [row(top_k=1)]) == [0]
    tied = torch.tensor([[5.0, 4.0, 4.0, -1.0]])
    rows = [row(position, top_k=2) for position in range(100)]
    found = natively(kernels, tied.expand(100, -1), rows)
    assert found == by_definition(tied.expand(100, -1), rows)
    assert set(found) == {0, 1, 2}
    at = math.exp(-1.0)
    for min_p, sure in ((at, False), (at * (1 - 1e-10), True), (at * (1 + 1e-10), True)):
        assert (natively(kernels, tied, [row(min_p=min_p)]) != [-1]) == sure


def test_weights_that_the_definition_rounds_to_ties_are_left_to_it(kernels: Kernels) -> None:
    """Some neighbours weigh the same in fp64, and which ones is a matter of its rounding alone."""
    generator = torch.Generator().manual_seed(4)
    apart = 2e-16 * torch.rand(4000, 1, generator=generator)
    steps = torch.rand(4000, 40, generator=generator).argsort(1)
    logits = torch.cat([torch.full((4000, 1), 1e-3), apart * steps], 1)
    rows = [row(i, top_k=1 + i % 12) for i in range(2000)]
    rows += [row(i, top_p=(0.5 + i % 12) / 41) for i in range(2000)]
    found = natively(kernels, logits, rows)
    pairs = zip(found, by_definition(logits, rows), strict=True)
    assert all(one in (other, -1) for one, other in pairs)


def test_an_engine_with_kernels_draws_by_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels_named("native")
    path = make_served_checkpoint(tmp_path / "model", "llama")
    options = {"threads": 1, "num_kv_blocks": 64, "kernels": "native"}
    llm = baton.LLM(path, engine=options)
    params = baton.SamplingParams(max_tokens=20, seed=3, top_p=0.9)
    asked: list[int] = []
    draw = Kernels.draw

    def counted(self, logits, draws, unsure=False):
        asked.append(len(draws))
        return [-1] * len(draws) if unsure else draw(self, logits, draws)

    monkeypatch.setattr(Kernels, "draw", counted)
    answers = llm.generate(["one", "two"], params)
    assert sum(asked) == 40
    monkeypatch.setattr(Kernels, "draw", lambda *args: counted(*args, unsure=True))
    assert llm.generate(["one", "two"], params) == answers
    assert sum(asked) == 80
