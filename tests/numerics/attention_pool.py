"""Attention by the CPU kernels on a pool made by hand, and by definition in fp64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from baton.model.native import DTYPES, Kernels, LayerArgs, StepArgs


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def error(found: Tensor, expected: Tensor) -> float:
    assert found.isfinite().all()
    return float((found.double() - expected).norm() / expected.norm())


class Pool:
    """Sequences of random Q, K and V whose blocks lie scattered in a pool full of NaN.

    `heads`: of queries, and of K and V.
    """

    LAYERS, LAYER = 3, 1

    def __init__(
        self,
        dtype: torch.dtype,
        contexts: list[int],
        dim: int,
        block_size: int = 8,
        heads: tuple[int, int] = (6, 2),
    ):
        self.dtype, self.dim, self.block_size = dtype, dim, block_size
        self.heads, self.kv_heads = heads
        self.q, self.k, self.v = (
            [random(n, count, dim, dtype=dtype, seed=s + i) for i, n in enumerate(contexts)]
            for s, count in ((0, self.heads), (100, self.kv_heads), (200, self.kv_heads))
        )
        needed = [-(-n // block_size) for n in contexts]
        order = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(5)).tolist()
        self.tables = [[order.pop() for _ in range(n)] for n in needed]
        shape = (sum(needed), self.LAYERS, 2, block_size, self.kv_heads, dim)
        self.data = torch.full(shape, math.nan, dtype=dtype)
        for k, v, table in zip(self.k, self.v, self.tables, strict=True):
            for position in range(len(k)):
                at = self.data[table[position // block_size], self.LAYER]
                at[0, position % block_size] = k[position]
                at[1, position % block_size] = v[position]

    def attend(
        self, kernels: Kernels, parts: list[tuple[int, int, int]], window: int | None
    ) -> list[Tensor]:
        """For each part (sequence, start, end) in one batch: [end - start, heads * dim]."""
        width = (self.heads + 2 * self.kv_heads) * self.dim
        total = sum(end - start for _, start, end in parts)
        qkv = torch.full((total, width), math.nan, dtype=self.dtype)
        out = torch.full((total, self.heads * self.dim), math.nan, dtype=self.dtype)
        starts = [0]
        for which, start, end in parts:
            starts.append(starts[-1] + end - start)
            rows = qkv[starts[-2] : starts[-1], : self.heads * self.dim]
            rows.copy_(self.q[which][start:end].flatten(1))
        most = max(len(self.tables[which]) for which, _, _ in parts)
        tables = torch.zeros((len(parts), most), dtype=torch.int64)
        for row, (which, _, _) in enumerate(parts):
            tables[row, : len(self.tables[which])] = torch.tensor(self.tables[which])
        query_starts, contexts = torch.tensor(starts), torch.tensor([end for _, _, end in parts])
        step = StepArgs(
            tokens=total,
            sequences=len(parts),
            query_starts=query_starts.data_ptr(),
            context_lens=contexts.data_ptr(),
            tables=tables.data_ptr(),
            max_blocks=most,
            kv=self.data.data_ptr(),
            block_stride=self.data.stride(0),
            block_size=self.block_size,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.dim,
            scale=self.dim**-0.5,
            qkv=qkv.data_ptr(),
            attended=out.data_ptr(),
            dtype=DTYPES[self.dtype],
            threads=torch.get_num_threads(),
        )
        kernels.table.attend(LayerArgs(window=window or 0), step, self.LAYER)
        return list(out.split([end - start for _, start, end in parts]))

    def expected(self, which: int, window: int | None) -> Tensor:
        """The same by fp64 definition, for a whole sequence."""
        group = self.heads // self.kv_heads
        q = self.q[which].double().transpose(0, 1)
        k, v = (
            x[which].double().repeat_interleave(group, 1).transpose(0, 1) for x in (self.k, self.v)
        )
        scores = q @ k.transpose(1, 2) * self.dim**-0.5
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        if window:
            hidden |= torch.ones(scores.shape[1:], dtype=torch.bool).tril(-window)
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        return (weights @ v).transpose(0, 1).flatten(1)
