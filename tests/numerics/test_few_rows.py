"""Attention of few rows, as decoding has them: the bits of a prompt's rows, in every layout.

A kernel may attend to a token's few rows in another way than to a prompt's many, where the pool's
blocks and the heads' sizes allow it. Pools are full of NaN where no token has been written.
"""

from __future__ import annotations

import pytest
import torch
from numerics.attention_pool import Pool, error
from numerics.native_kernels import ON_THIS_KIND, kernels_named

from baton.model.native import Kernels

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 150
ENDS = (1, 2, 15, 16, 17, 33, 63, 64, 65, 97, 129, 144, LENGTH)


@pytest.fixture(params=ON_THIS_KIND)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    found = kernels_named(request.param)
    assert found is not None
    return found


def check(kernels: Kernels, pool: Pool, window: int | None) -> None:
    """Rows of the first sequence are the same in a prompt, decoded, and by a few tokens."""
    torch.set_num_threads(1)
    (whole,) = pool.attend(kernels, [(0, 0, LENGTH)], window)
    assert error(whole, pool.expected(0, window)) < 2.5e-3
    for i, end in enumerate(ENDS):
        torch.set_num_threads(1 + i % 3)
        # Among others in the middle of theirs, so that next items are of all kinds.
        parts = [(1, 39, 40), (0, end - 1, end), (1, 0, 40), (1, 30, 33)]
        found = pool.attend(kernels, parts, window)
        assert torch.equal(found[1], whole[end - 1 : end]), end
        for size in (2, 5, 16):
            start = max(0, end - size)
            (few,) = pool.attend(kernels, [(0, start, end)], window)
            assert torch.equal(few, whole[start:end]), (start, end)


@pytest.mark.parametrize("window", [None, 1, 20, 64, 75])
@pytest.mark.parametrize("block_size", [8, 16, 24, 32, 64])
def test_in_blocks_of_any_size(kernels: Kernels, block_size: int, window: int | None) -> None:
    check(kernels, Pool(torch.bfloat16, [LENGTH, 40], 64, block_size), window)


@pytest.mark.parametrize(
    "heads", [(1, 1), (5, 5), (32, 32), (6, 2), (24, 8), (8, 2), (8, 1), (34, 2)]
)
@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128])
def test_under_any_heads(kernels: Kernels, heads: tuple[int, int], dim: int) -> None:
    check(kernels, Pool(torch.bfloat16, [LENGTH, 40], dim, 16, heads), None)


@pytest.mark.parametrize("heads", [(18, 18), (16, 4)])
def test_of_the_largest_size(kernels: Kernels, heads: tuple[int, int]) -> None:
    check(kernels, Pool(torch.bfloat16, [LENGTH, 40], 256, 32, heads), 90)
