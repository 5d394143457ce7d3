"""Attention over the paged KV cache: one ragged function, one body a backend.

A batch is a list of sequences, each with one or more new tokens; prefill, chunked prefill and
decode differ only in how many. `attend` stores the new tokens' K and V and then lets every new
token see its sequence's tokens up to itself (the last `window` of them, if there is a window).
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from baton.model.attention_torch import attend_torch
from baton.model.batch import Batch
from baton.model.kv_cache import KvCache

__all__ = ["BACKENDS", "NUMERICS", "Attend", "Batch"]

# How results may vary. "torch" is inexact: the order of summation depends on the shapes, so a
# token's bits depend on the chunk it came in and on what else was in the batch.
NUMERICS = "torch"


class Attend(Protocol):
    """q [T, heads, D], k and v [T, kv_heads, D] (new, rotated) -> [T, heads * D]."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv: KvCache,
        layer: int,
        batch: Batch,
        window: int | None,
        scale: float,
    ) -> Tensor: ...


BACKENDS: dict[str, Attend] = {"torch": attend_torch}
