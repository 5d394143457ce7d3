"""A decoder layer in one call is its kernels one after the other, bit for bit."""

from __future__ import annotations

import pytest
import torch
from numerics.native_kernels import ON_THIS_KIND, kernels_named
from torch import Tensor

from baton.model.native import DTYPES, Kernels, LayerArgs, Packed, StepArgs

HEADS, KV_HEADS, DIM, BLOCK_SIZE = 4, 2, 16, 16
EPS = 1e-5

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=ON_THIS_KIND)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    found = kernels_named(request.param)
    assert found is not None
    return found


@pytest.fixture(params=["bfloat16", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return getattr(torch, request.param)


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


class OneLayer:
    """A layer with random weights, and a pass of one sequence's first `tokens` tokens over it."""

    def __init__(
        self, kernels: Kernels, inner: int, tokens: int, dtype: torch.dtype, biased: bool
    ) -> None:
        hidden, width = HEADS * DIM, (HEADS + 2 * KV_HEADS) * DIM
        shapes = {
            "qkv": (width, hidden),
            "o": (hidden, hidden),
            "gate_up": (2 * inner, hidden),
            "down": (hidden, inner),
        }
        self.kernels, self.inner = kernels, inner
        self.norms = [random(hidden, dtype=dtype, seed=i) for i in range(2)]
        self.matrices = {
            name: Packed(
                kernels,
                random(n, k, dtype=dtype, seed=n) / 8,
                random(n, dtype=dtype, seed=k) if biased else None,
            )
            for name, (n, k) in shapes.items()
        }
        num_blocks = -(-tokens // BLOCK_SIZE)
        # what is never written must not be read
        self.kv = torch.full((num_blocks, 1, 2, BLOCK_SIZE, KV_HEADS, DIM), 7.0, dtype=dtype)
        angles = torch.outer(torch.arange(tokens) / 3, 1 / torch.arange(1, DIM // 2 + 1))
        self.x = random(tokens, hidden, dtype=dtype, seed=9)
        self.memory = {
            "slots": torch.arange(tokens),
            "query_starts": torch.tensor([0, tokens]),
            "context_lens": torch.tensor([tokens]),
            "tables": torch.arange(num_blocks),
            "cos": angles.cos().contiguous(),
            "sin": angles.sin().contiguous(),
            "kv": self.kv,
            "x": self.x,
            "normed": torch.empty(tokens, hidden, dtype=dtype),
            "qkv": torch.empty(tokens, width, dtype=dtype),
            "attended": torch.empty(tokens, hidden, dtype=dtype),
            "gate_up": torch.empty(tokens, 2 * inner, dtype=dtype),
            "inner": torch.empty(tokens, inner, dtype=dtype),
        }
        self.layer = LayerArgs(
            input_norm=self.norms[0].data_ptr(),
            post_norm=self.norms[1].data_ptr(),
            **{name: matrix.args for name, matrix in self.matrices.items()},
        )
        self.step = StepArgs(
            tokens=tokens,
            sequences=1,
            max_blocks=num_blocks,
            block_stride=self.kv.stride(0),
            block_size=BLOCK_SIZE,
            heads=HEADS,
            kv_heads=KV_HEADS,
            head_dim=DIM,
            scale=DIM**-0.5,
            eps=EPS,
            dtype=DTYPES[dtype],
            threads=torch.get_num_threads(),
            **{name: tensor.data_ptr() for name, tensor in self.memory.items()},
        )

    def whole(self) -> Tensor:
        self.kernels.table.layer(self.layer, self.step, 0)
        return self.x

    def in_parts(self) -> Tensor:
        kernels, matrices = self.kernels, self.matrices
        x = self.x.clone()
        qkv = kernels.linear(kernels.rms_norm(x, self.norms[0], EPS), matrices["qkv"])
        self.memory["qkv"].copy_(qkv)
        kernels.table.rope_write(self.layer, self.step, 0)
        kernels.table.attend(self.layer, self.step, 0)
        x = kernels.linear(self.memory["attended"], matrices["o"], x)
        both = kernels.linear(kernels.rms_norm(x, self.norms[1], EPS), matrices["gate_up"])
        return kernels.linear(kernels.silu_mul(both), matrices["down"], x)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("inner", [48, 64, 96])
def test_a_layer_is_its_kernels(
    kernels: Kernels, dtype: torch.dtype, inner: int, biased: bool
) -> None:
    for tokens in (1, 5, 16, 17, 33, 300):
        one = OneLayer(kernels, inner, tokens, dtype, biased)
        expected = one.in_parts()
        before = one.x.clone()
        found = one.whole()
        assert torch.equal(found, expected), tokens
        assert not torch.equal(found, before)


@pytest.mark.parametrize("threads", [1, 3])
def test_so_is_one_whose_inner_results_are_large(
    kernels: Kernels, dtype: torch.dtype, threads: int
) -> None:
    """Past some size a kernel may write them another way."""
    torch.set_num_threads(threads)
    one = OneLayer(kernels, 8192, 300, dtype, True)
    assert one.memory["inner"].nbytes > 4 << 20
    expected = one.in_parts()
    assert torch.equal(one.whole(), expected)
