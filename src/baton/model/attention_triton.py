"""Paged attention on a GPU: how a batch is laid out for the Triton kernels, and their launch.

A sequence with one new token (decode) is split over its context, so that a few of them fill the
device; the splits depend on the sequence's own length alone. A longer chunk (prefill) is cut into
tiles of queries. In `exact` mode every sequence goes the second way, so that a token has the same
bits whether it is prefilled or decoded, at the price of less parallel decoding.

Everything of a step that the layers share is laid out once, in one copy to the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.model.triton_ops import launch
from baton.model_spec import ModelSpec

Ints = npt.NDArray[np.int32]

MIN_TILES = 4
"""Least length of a split, in tiles of context: much more is read of it than is written."""
SPLITS = 32
"""Most splits of one context; beyond MIN_TILES * SPLITS tiles they grow longer."""
WAVES = 4
"""Programs for each multiprocessor, where the batch alone does not give as many."""
MAX_HEAD_DIM = 256
MAX_GROUP = 64
"""Query heads that may share a KV head."""
_ALIGNED = 4  # int32 values in 16 bytes: Triton compiles anew for less aligned pointers


@dataclass(slots=True)
class AttentionPlan:
    """Where the sequences of a batch lie; all int32, on the device.

    starts [B + 1], lens [B]: as `Batch`'s query_starts and context_lens. rows [n]: the sequences
    that are split over their context. tiles [m, 2]: the others' query tiles (sequence, first token
    in its chunk).
    """

    starts: Tensor
    lens: Tensor
    rows: Tensor
    tiles: Tensor


class PagedAttention:
    """Attention of one model's shape. `dtype`: of Q, K, V and the result."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device, exact: bool):
        self.exact = exact
        self._heads, self._kv_heads, self._dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        self._group = spec.num_heads // spec.num_kv_heads
        self._scale_log2 = spec.head_dim**-0.5 * 1.4426950408889634  # the kernels' e is 2
        self._device = device
        self._dim_pad = max(16, _power_of_two(spec.head_dim))
        self._decode_rows = max(16, _power_of_two(self._group))
        if dtype == torch.float32:
            # Products of fp32 are fp32 here, not of its upper 19 bits: no matrix unit does them.
            self._precision, self._query_rows, self._tile = "ieee", self._decode_rows, 32
        else:
            self._precision = "tf32"  # means nothing to these types
            large = self._dim_pad > 128
            self._query_rows, self._tile = (64, 32) if large else (128, 64)
        self._tokens_per_tile = self._query_rows // self._group

    def plan(self, query_starts: Sequence[int], context_lens: Sequence[int]) -> AttentionPlan:
        """Lay out a batch of any kind."""
        starts, lens = np.array(query_starts, np.int32), np.array(context_lens, np.int32)
        split = np.diff(starts) == (0 if self.exact else 1)
        tiles = query_tiles(starts, lens, np.flatnonzero(~split), self._tokens_per_tile)
        rows = np.flatnonzero(split).astype(np.int32)
        parts = [starts, lens, rows, tiles.reshape(-1)]
        starts_at, lens_at, rows_at, tiles_at = upload(parts, self._device)
        return AttentionPlan(starts_at, lens_at, rows_at, tiles_at.view(-1, 2))

    def plan_decode(self, lens: Tensor) -> AttentionPlan:
        """Lay out len(lens) sequences of one token, whose lengths [n] may change afterwards."""
        device, n = lens.device, lens.numel()
        starts = torch.arange(n + 1, dtype=torch.int32, device=device)
        rows, tiles = starts[:n], starts.new_empty(0, 2)
        if self.exact:
            tiles = torch.stack((rows, torch.zeros_like(rows)), 1)
            rows = rows[:0]
        return AttentionPlan(starts, lens, rows, tiles)

    def __call__(
        self,
        qkv: Tensor,
        k: Tensor,
        v: Tensor,
        tables: Tensor,
        plan: AttentionPlan,
        window: int | None,
    ) -> Tensor:
        """Attention of one layer, [T, heads * head_dim].

        qkv: [T, heads + 2 kv_heads, head_dim], of which Q is read. k, v: the layer's part of the
        pool, [num_blocks, block_size, kv_heads, head_dim], any block stride. tables: [B, max
        blocks] int64.
        """
        from baton.model.triton_kernels import attention as kernels

        out = torch.empty(
            (qkv.shape[0], self._heads * self._dim), dtype=qkv.dtype, device=qkv.device
        )
        sees = kernels.NO_WINDOW if window is None else window
        shape: dict[str, Any] = {
            "KV_HEADS": self._kv_heads,
            "GROUP": self._group,
            "HEAD_DIM": self._dim,
            "DIM_PAD": self._dim_pad,
            "BLOCK_SIZE": k.shape[1],
            "TILE": self._tile,
            "PRECISION": self._precision,
        }
        splits: dict[str, Any] = {"TILE": self._tile, "MIN_TILES": MIN_TILES, "SPLITS": SPLITS}
        where = (plan.starts, plan.lens, tables)
        scalars = (qkv.stride(0), k.stride(0), tables.stride(0), self._scale_log2, sees)
        launch(
            kernels.prefill, (plan.tiles.shape[0], self._kv_heads),
            qkv, k, v, out, plan.tiles, *where, *scalars,
            **shape, ROWS=self._query_rows, warps=8 if self._query_rows > 64 else 4, stages=2,
        )  # fmt: skip
        if n := plan.rows.numel():
            room = (n, self._heads, SPLITS)
            sums = qkv.new_empty((*room, self._dim), dtype=torch.float32)
            stats = qkv.new_empty((*room, 2), dtype=torch.float32)
            programs = split_programs(n, self._kv_heads, num_multiprocessors(self._device))
            launch(
                kernels.decode_splits, (n, self._kv_heads, programs),
                qkv, k, v, sums, stats, plan.rows, *where, *scalars,
                **(shape | splits), ROWS=self._decode_rows,
            )  # fmt: skip
            launch(
                kernels.decode_reduce, (n, self._heads),
                sums, stats, out, plan.rows, plan.starts, plan.lens, sees,
                HEADS=self._heads, HEAD_DIM=self._dim, DIM_PAD=self._dim_pad, **splits,
            )  # fmt: skip
        return out


def query_tiles(
    starts: Ints, lens: Ints, sequences: npt.NDArray[np.int64], tokens_per_tile: int
) -> Ints:
    """Cut the chunks of `sequences` into tiles: [m, 2] (sequence, first token in its chunk).

    Those that see most come first: a long one started last would run alone.
    """
    counts = np.diff(starts)
    tiles = [
        (int(lens[i] - counts[i]) + first, int(i), first)
        for i in sequences
        for first in range(0, int(counts[i]), tokens_per_tile)
    ]
    tiles.sort(reverse=True)
    return np.array([tile[1:] for tile in tiles], np.int32).reshape(-1, 2)


def split_programs(num_rows: int, kv_heads: int, multiprocessors: int) -> int:
    """Programs that share out the splits of one row and KV head. It changes no result."""
    return min(SPLITS, max(1, -(-WAVES * multiprocessors // (num_rows * kv_heads))))


def upload(parts: Sequence[Ints], device: torch.device) -> list[Tensor]:
    """Copy int32 arrays to the device in one go, without waiting for it."""
    starts = np.cumsum([0] + [-(-part.size // _ALIGNED) * _ALIGNED for part in parts])
    host = torch.zeros(int(starts[-1]), dtype=torch.int32, pin_memory=device.type == "cuda")
    for start, part in zip(starts.tolist(), parts, strict=False):
        host[start : start + part.size] = torch.from_numpy(part)
    moved = host.to(device, non_blocking=True)
    return [
        moved[start : start + part.size]
        for start, part in zip(starts.tolist(), parts, strict=False)
    ]


@cache
def num_multiprocessors(device: torch.device) -> int:
    """1 in the interpreter."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
