"""The small Triton kernels and the product of fixed order, against fp64; and their bits."""

from __future__ import annotations

import pytest
import torch
from numerics.triton_here import DEVICE, ROUNDED, error, random

from baton.model.rope import cos_sin, inverse_frequencies, rotate
from baton.model.triton_ops import (
    add_rms_norm,
    exact_linear,
    rotate_and_write,
    silu_mul,
    stage_decode,
)
from baton.model_spec import RopeSpec

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = 1e-5


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return getattr(torch, request.param)


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


@pytest.mark.parametrize("width", [8, 96, 1000, 2560])
def test_residual_and_norm(dtype: torch.dtype, width: int) -> None:
    x, delta, weight = (random(*shape, dtype=dtype) for shape in ((5, width), (5, width), (width,)))
    weight += 1
    first = x.clone()
    assert error(add_rms_norm(first, None, weight, EPS), normed(x, weight)) < ROUNDED[dtype]
    assert torch.equal(first, x)
    total = (x.float() + delta.float()).to(dtype)
    found = add_rms_norm(x, delta, weight, EPS)
    assert torch.equal(x, total), "the sum must be in x, rounded once"
    assert error(found, normed(total, weight)) < ROUNDED[dtype]


@pytest.mark.parametrize("width", [8, 112, 1500])
def test_gate(dtype: torch.dtype, width: int) -> None:
    both = 6 * random(7, 2 * width, dtype=dtype)
    gate, up = both.double().chunk(2, dim=-1)
    assert error(silu_mul(both), torch.nn.functional.silu(gate) * up) < ROUNDED[dtype]


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
def test_gate_at_the_ends_of_the_range() -> None:
    gate = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]], device=DEVICE)
    found = silu_mul(torch.cat((gate, torch.ones_like(gate)), 1))
    expected = torch.tensor([[0.0, 0.0, 0.0, 100.0, 1e4]], device=DEVICE)
    torch.testing.assert_close(found, expected, atol=1e-30, rtol=1e-6)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"),
    [(4, 2, 64, 16), (3, 3, 80, 8), (8, 1, 96, 32), (14, 2, 24, 7), (1, 1, 8, 1)],
)
def test_rotation_and_write(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, block_size: int, norms: bool
) -> None:
    num_tokens, num_blocks = 6, 12
    qkv = random(num_tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    weights = tuple(1 + random(head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
    positions = torch.tensor([0, 1, 17, 300, 5000, 65535], device=DEVICE)
    frequencies = inverse_frequencies(RopeSpec(), head_dim).to(DEVICE)
    cos, sin = cos_sin(frequencies, positions, 1.5, torch.float32)
    slots = torch.randperm(num_blocks * block_size, generator=torch.Generator().manual_seed(0))
    slots = slots[:num_tokens].to(DEVICE)
    slots[3] = -1
    pool = torch.full((num_blocks, 3, 2, block_size, kv_heads, head_dim), 9.0, device=DEVICE)
    pool = pool.to(dtype)

    wide = qkv.double()
    q, k, _ = wide.split([heads, kv_heads, kv_heads], 1)
    if norms:
        q, k = normed(q, weights[0]), normed(k, weights[1])
    q, k = (rotate(x, cos.double(), sin.double()) for x in (q, k))
    left = qkv.clone()
    rotate_and_write(
        qkv, weights if norms else None, cos, sin, slots, pool[:, 1, 0], pool[:, 1, 1], EPS
    )
    assert error(qkv[:, :heads], q) < ROUNDED[dtype]
    assert torch.equal(qkv[:, heads:], left[:, heads:]), "K and V stay as they were"
    kept = slots >= 0
    rows = pool.transpose(0, 1).transpose(1, 2)[1].flatten(1, 2)  # [2, slots, kv_heads, head_dim]
    assert error(rows[0, slots[kept]], k[kept]) < ROUNDED[dtype]
    assert torch.equal(rows[1, slots[kept]], left[kept, heads + kv_heads :])
    pool[:, 1].transpose(1, 2)[slots[kept] // block_size, slots[kept] % block_size] = 9.0
    assert (pool == 9.0).all(), "nothing else was written, least of all for a negative slot"


@pytest.mark.parametrize(
    ("rows", "width", "depth"), [(1, 1, 8), (3, 70, 100), (65, 130, 64), (70, 64, 136)]
)
def test_product(dtype: torch.dtype, rows: int, width: int, depth: int) -> None:
    x, weight = random(rows, depth, dtype=dtype), random(width, depth, dtype=dtype, seed=1)
    bias = random(width, dtype=dtype, seed=2)
    expected = x.double() @ weight.double().T
    assert error(exact_linear(x, weight), expected) < ROUNDED[dtype]
    assert error(exact_linear(x, weight, bias), expected + bias.double()) < ROUNDED[dtype]


def test_a_row_is_the_same_in_any_company(dtype: torch.dtype) -> None:
    x, weight = random(67, 100, dtype=dtype), random(70, 100, dtype=dtype, seed=1)
    norm = random(100, dtype=dtype, seed=2)
    wholes = exact_linear(x, weight), add_rms_norm(x.clone(), x, norm, EPS), silu_mul(x)
    for sizes in ([1, 2, 31, 33], [64, 1, 2]):
        found = [
            (
                exact_linear(part, weight),
                add_rms_norm(part.clone(), part, norm, EPS),
                silu_mul(part),
            )
            for part in x.split(sizes)
        ]
        for whole, parts in zip(wholes, zip(*found, strict=True), strict=True):
            assert torch.equal(torch.cat(parts), whole)


def test_empty_batches() -> None:
    empty = torch.empty(0, 16, device=DEVICE)
    assert silu_mul(empty).shape == (0, 8)
    assert exact_linear(empty, random(3, 16)).shape == (0, 3)
    assert add_rms_norm(empty, None, random(16), EPS).shape == (0, 16)


def test_a_decode_batch_is_staged_and_padded() -> None:
    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, device=DEVICE)

    tables = torch.arange(600, device=DEVICE).view(2, 300)[:, :290]
    batch = ints(7, 8), ints(40, 0), ints(33, 5), tables
    inputs = (
        *(torch.full((5,), 99, device=DEVICE) for _ in range(3)),
        torch.full((5,), 99, dtype=torch.int32, device=DEVICE),
        torch.full((5, 295), 99, device=DEVICE),
    )
    stage_decode(batch, inputs, 4)
    ids, positions, slots, lens, table = (part.tolist() for part in inputs)
    assert ids == [7, 8, 0, 0, 99]
    assert positions == [40, 0, 0, 0, 99]
    assert slots == [33, 5, -1, -1, 99]
    assert lens == [41, 1, 0, 0, 99]
    assert [row[:290] for row in table[:2]] == tables.tolist()
    assert all(row[290:] == [99] * 5 for row in table)
    assert table[4] == [99] * 295
