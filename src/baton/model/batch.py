"""The input of one forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(slots=True)
class Batch:
    """What one forward pass computes: T new tokens of B sequences, S of which are sampled.

    token_ids, positions: [T] int64, sequence after sequence, each in order of position.
    slots: [T] int64, where the token's K and V go (block * block_size + offset).
    query_starts: B + 1 offsets into T. context_lens: B lengths in tokens, this chunk included.
    block_tables: [B, max_blocks] int64; beyond a sequence's blocks stands any block's number.
    sample_rows: [S] int64, the tokens (indices into T) whose logits are wanted.
    derived: what a backend worked out from the rest, once for all layers; starts empty.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    query_starts: list[int]
    context_lens: list[int]
    block_tables: Tensor
    sample_rows: Tensor
    derived: dict[Any, Any] = field(default_factory=dict)
