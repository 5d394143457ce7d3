"""Paged attention in Triton against fp64, over pools of every shape; and its bits.

Slots that no sequence holds are NaN, blocks lie in a shuffle, and the pool's blocks are further
apart than they are long.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from numerics.triton_here import DEVICE, ROUNDED, error, random
from torch import Tensor

from baton.model.attention_triton import (
    MIN_TILES,
    SPLITS,
    PagedAttention,
    query_tiles,
    split_programs,
)
from baton.model_spec import ModelSpec, RopeSpec

pytestmark = pytest.mark.usefixtures("one_thread")

Chunk = tuple[int, int]  # tokens computed before, new tokens


def spec(heads: int, kv_heads: int, head_dim: int) -> ModelSpec:
    return ModelSpec(
        architecture="LlamaForCausalLM", vocab_size=64, hidden_size=heads * head_dim,
        intermediate_size=64, num_layers=1, num_heads=heads, num_kv_heads=kv_heads,
        head_dim=head_dim, max_position=65536, rms_norm_eps=1e-5, rope=RopeSpec(), qk_norm=False,
        qkv_bias=False, o_bias=False, mlp_bias=False, sliding_window=(None,),
        tie_word_embeddings=False, dtype="float32",
    )  # fmt: skip


class Case:
    """Sequences with random Q, K and V, laid out in a pool of their own."""

    def __init__(
        self,
        chunks: Sequence[Chunk],
        heads: int = 2,
        kv_heads: int = 1,
        head_dim: int = 16,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.chunks = chunks
        self.spec, self.dtype = spec(heads, kv_heads, head_dim), dtype
        contexts = [before + new for before, new in chunks]
        counts = [-(-context // block_size) for context in contexts]
        order = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(5)).tolist()
        # A block of the pool is longer than the part of it that one layer's K takes.
        gap = 3
        pool = torch.full(
            (len(order), gap, 2, block_size, kv_heads, head_dim), float("nan"), dtype=dtype
        ).to(DEVICE)
        self.k_pool, self.v_pool = pool[:, 1, 0], pool[:, 1, 1]
        self.tables = torch.zeros(len(chunks), max(counts), dtype=torch.int64)
        self.k = [random(c, kv_heads, head_dim, dtype=dtype, seed=1) for c in contexts]
        self.v = [random(c, kv_heads, head_dim, dtype=dtype, seed=2) for c in contexts]
        for i, count in enumerate(counts):
            blocks = [order.pop() for _ in range(count)]
            self.tables[i, :count] = torch.tensor(blocks)
            for at, block in enumerate(blocks):
                part = slice(at * block_size, min((at + 1) * block_size, contexts[i]))
                size = part.stop - part.start
                self.k_pool[block, :size] = self.k[i][part]
                self.v_pool[block, :size] = self.v[i][part]
        self.tables = self.tables.to(DEVICE)
        total = sum(new for _, new in chunks)
        self.qkv = random(total, heads + 2 * kv_heads, head_dim, dtype=dtype, seed=3)

    def attend(self, window: int | None = None, exact: bool = False) -> Tensor:
        attention = PagedAttention(self.spec, self.dtype, torch.device(DEVICE), exact)
        starts = [0]
        for _, new in self.chunks:
            starts.append(starts[-1] + new)
        plan = attention.plan(starts, [before + new for before, new in self.chunks])
        return attention(self.qkv, self.k_pool, self.v_pool, self.tables, plan, window)

    def expected(self, window: int | None = None) -> Tensor:
        """By definition, in fp64: [T, heads * head_dim]."""
        heads, kv_heads = self.spec.num_heads, self.spec.num_kv_heads
        parts, at = [], 0
        for i, (before, new) in enumerate(self.chunks):
            q = self.qkv[at : at + new, :heads].double().transpose(0, 1)
            k, v = (
                x[i].double().repeat_interleave(heads // kv_heads, 1).transpose(0, 1)
                for x in (self.k, self.v)
            )
            scores = q @ k.transpose(1, 2) * self.spec.head_dim**-0.5
            positions = torch.arange(before + new, device=DEVICE)
            behind = positions[before:, None] - positions[None, :]
            hidden = (behind < 0) | (behind >= (window or before + new))
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            parts.append((weights @ v).transpose(0, 1).reshape(new, -1))
            at += new
        return torch.cat(parts)


RAGGED = ((0, 1), (0, 70), (63, 1), (64, 1), (65, 2), (30, 5), (130, 9), (0, 3))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 24, 64, 100])
def test_ragged_batch(dtype: torch.dtype, window: int | None, exact: bool) -> None:
    case = Case(RAGGED, dtype=dtype)
    assert error(case.attend(window, exact), case.expected(window)) < ROUNDED[dtype]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 8, 24])
def test_groups(group: int, exact: bool) -> None:
    case = Case(((5, 1), (0, 50), (70, 3), (90, 1)), heads=2 * group, kv_heads=2)
    assert error(case.attend(None, exact), case.expected()) < ROUNDED[torch.float32]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [8, 24, 64, 80, 96, 128, 160])
def test_head_sizes(head_dim: int, dtype: torch.dtype, exact: bool) -> None:
    case = Case(((69, 1), (10, 20)), 4, 2, head_dim, dtype=dtype)
    assert error(case.attend(None, exact), case.expected()) < ROUNDED[dtype]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("block_size", [1, 7, 8, 16, 32, 128])
def test_block_sizes(block_size: int, exact: bool) -> None:
    case = Case(((99, 1), (33, 40)), block_size=block_size)
    assert error(case.attend(50, exact), case.expected(50)) < ROUNDED[torch.float32]


@pytest.mark.parametrize("context", [0, 255, 256, 257, 2000, 32 * MIN_TILES * SPLITS + 65])
def test_a_decode_split_over_its_context(context: int) -> None:
    """One split, several, and so many tiles that the splits grow longer."""
    case = Case(((context, 1), (3, 1)), heads=3, kv_heads=1)
    for window in (None, 700):
        assert error(case.attend(window), case.expected(window)) < ROUNDED[torch.float32]


def test_the_number_of_programs_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(((1500, 1), (700, 1)))
    results = []
    for programs in (1, 2, 3, SPLITS):
        monkeypatch.setattr("baton.model.attention_triton.split_programs", lambda *_, n=programs: n)
        results.append(case.attend())
    assert all(torch.equal(result, results[0]) for result in results)


def _alone(case: Case, index: int, exact: bool, window: int | None) -> Tensor:
    """What the sequence of `case` gives in a batch without the others."""
    start = sum(new for _, new in case.chunks[:index])
    one = Case.__new__(Case)
    one.__dict__.update(case.__dict__)
    one.chunks = [case.chunks[index]]
    one.tables = case.tables[index : index + 1]
    one.qkv = case.qkv[start : start + case.chunks[index][1]]
    return one.attend(window, exact)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_others_change_no_bit(dtype: torch.dtype, exact: bool) -> None:
    chunks = ((300, 1), (0, 1), (20, 37), (520, 1), (100, 3))
    case = Case(chunks, heads=6, kv_heads=2, dtype=dtype)
    together = case.attend(None, exact).split([new for _, new in chunks])
    for index, part in enumerate(together):
        assert torch.equal(_alone(case, index, exact, None), part)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_exact_mode_chunks_and_decoding_change_no_bit(
    dtype: torch.dtype, window: int | None
) -> None:
    case = Case([(0, 150)], heads=3, dtype=dtype)
    whole, qkv = case.attend(window, exact=True), case.qkv
    for sizes in ([64, 86], [1, 1, 127, 21], [149, 1], [50, 50, 1, 1, 1, 47]):
        parts, at = [], 0
        for size in sizes:
            case.chunks, case.qkv = [(at, size)], qkv[at : at + size]
            parts.append(case.attend(window, exact=True))
            at += size
        assert torch.equal(torch.cat(parts), whole), sizes


def test_padded_rows_give_zeros() -> None:
    """Lengths of 0, as a recorded step has them."""
    for exact in (False, True):
        case = Case(((80, 1), (9, 1), (0, 1)))
        attention = PagedAttention(case.spec, case.dtype, torch.device(DEVICE), exact)
        lens = torch.tensor([81, 10, 0], dtype=torch.int32, device=DEVICE)
        plan = attention.plan_decode(lens)
        found = attention(case.qkv, case.k_pool, case.v_pool, case.tables, plan, None)
        assert error(found[:2], case.expected()[:2]) < ROUNDED[torch.float32]
        assert torch.equal(found[2], torch.zeros_like(found[2]))


def test_queries_are_cut_into_tiles_with_the_longest_context_first() -> None:
    starts, lens = (
        torch.tensor([0, 5, 6, 16]).int().numpy(),
        torch.tensor([5, 90, 40]).int().numpy(),
    )
    tiles = query_tiles(starts, lens, torch.tensor([0, 2]).numpy(), 4)
    assert tiles.tolist() == [[2, 8], [2, 4], [2, 0], [0, 4], [0, 0]]
    assert query_tiles(starts, lens, torch.tensor([], dtype=torch.int64).numpy(), 4).shape == (0, 2)


def test_splits_are_shared_out_over_the_device() -> None:
    assert split_programs(1, 8, 132) == SPLITS
    assert split_programs(64, 8, 132) == 2
    assert split_programs(256, 8, 132) == 1
    assert split_programs(1, 1, 1) == 4


def test_in_exact_mode_one_kernel_serves_prefill_and_decode() -> None:
    for exact in (False, True):
        attention = PagedAttention(spec(4, 2, 64), torch.bfloat16, torch.device(DEVICE), exact)
        plan = attention.plan([0, 1, 4], [300, 3])
        assert plan.rows.tolist() == ([] if exact else [0])
        assert plan.tiles.tolist() == ([[0, 0], [1, 0]] if exact else [[1, 0]])
