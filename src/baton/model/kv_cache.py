"""The memory of the KV pool. Which block belongs to whom is the block pool's business (core)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from baton.model import huge_pages
from baton.model.host_copies import HostBlock, HostCopies
from baton.model_spec import ModelSpec

__all__ = ["HostBlock", "KvCache", "kv_block_bytes"]


def kv_block_bytes(spec: ModelSpec, block_size: int, dtype: str) -> int:
    """Bytes of one block of `block_size` tokens over all layers; known before any allocation."""
    return block_size * spec.kv_bytes_per_token(dtype)


class KvCache:
    """K and V of all layers, block-major: one block is one contiguous run of bytes.

    `data` is [num_blocks, num_layers, 2 (K, V), block_size, num_kv_heads, head_dim]. It is not
    initialised: a host's pages become resident when they are first written, and whatever a slot
    held before must not be read (it may be NaN).

    Args:
        dtype: as torch names it ("bfloat16", "float16", "float32").
    """

    def __init__(
        self, spec: ModelSpec, num_blocks: int, block_size: int, dtype: str, device: str = "cpu"
    ) -> None:
        self.num_blocks = num_blocks
        self.num_layers = spec.num_layers
        self.block_size = block_size
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.block_bytes = kv_block_bytes(spec, block_size, dtype)
        shape = (num_blocks, spec.num_layers, 2, block_size, spec.num_kv_heads, spec.head_dim)
        self.data = (
            huge_pages.empty(shape, self.dtype)
            if device == "cpu"
            else torch.empty(shape, dtype=self.dtype, device=device)
        )
        if self.data.is_cpu:
            huge_pages.take_early(self.data)
        self._rows = self.data.view(-1, spec.num_kv_heads * spec.head_dim)
        blocks = self.data.view(num_blocks, -1).view(torch.uint8)
        self._host: HostBlock | None = blocks.numpy() if blocks.is_cpu else None
        self._copies = HostCopies(blocks) if blocks.is_cuda else None

    def mark(self) -> None:
        """A forward pass over this pool has been submitted. Whoever submits one calls it."""
        if self._copies is not None:
            self._copies.mark()

    def reader(self, block: int, passes_since: int = 0) -> Callable[[], HostBlock]:
        """How another thread gets at the bytes of one block, [block_bytes] uint8.

        On a host they are a view of the pool. Off a GPU each call copies them, beside whatever
        is computed, and they are valid until that thread's next call. The block was last written
        by the newest forward pass, or by the one `passes_since` before it; it must stay
        referenced until the reader is done.
        """
        if self._copies is None:
            return lambda: self.read_block(block)
        copies, after = self._copies, self._copies.newest(passes_since)
        return lambda: copies.read(block, after)

    def read_block(self, block: int) -> HostBlock:
        """The bytes of one block, [block_bytes] uint8: a view of the pool, or a copy off a GPU.

        The copy waits for every pass that was submitted; `reader` does not.
        """
        if self._copies is not None:
            return self._copies.read(block, self._copies.newest()).copy()
        assert self._host is not None
        view: HostBlock = self._host[block]
        return view

    def landing(self, block: int) -> HostBlock:
        """Where another thread may write the bytes of `block`; `land` makes them the block's."""
        if self._copies is not None:
            return np.empty(self.block_bytes, np.uint8)
        return self.read_block(block)

    def land(self, block: int, landed: HostBlock) -> None:
        """Take over what was written to `landing(block)`; on a host it is in place already.

        Returns when it is there. Best called on the thread that wrote it: it takes two copies.
        """
        if self._copies is not None:
            self._copies.write(block, landed)

    def rows(self, slots: Tensor) -> Tensor:
        """Where K of layer 0 lies for each slot, as indices into `gather`'s rows.

        A slot is block * block_size + offset; any shape, int64.
        """
        blocks = slots // self.block_size
        return slots + blocks * (self.block_size * (2 * self.num_layers - 1))

    def gather(self, rows: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of one layer at `rows` [N]: two copies, each [N, num_kv_heads * head_dim]."""
        k_rows = rows + layer * 2 * self.block_size
        return self._rows.index_select(0, k_rows), self._rows.index_select(
            0, k_rows + self.block_size
        )

    def write(self, rows: Tensor, layer: int, k: Tensor, v: Tensor) -> None:
        """Store k and v [N, num_kv_heads, head_dim] of one layer at `rows` [N], all different."""
        k_rows = rows + layer * 2 * self.block_size
        self._rows.index_copy_(0, k_rows, k.flatten(1))
        self._rows.index_copy_(0, k_rows + self.block_size, v.flatten(1))
