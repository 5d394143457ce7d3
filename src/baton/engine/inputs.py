"""From a step plan to the model's input, with what stays the same kept from step to step.

The costly part of the input is the block tables, and of these a decode step changes next to
nothing: a row gets one more block every `block_size` steps. So each block table has a row in one
array, which is only ever added to. A row is known by the list that it copies, since a table that
is not merely longer is another list (`Sequence.blocks`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.core.plan import Chunk, StepPlan
from baton.model.batch import Batch

_Ints = npt.NDArray[np.int64]


@dataclass(slots=True)
class _Row:
    """A block table in row `index` of the array, the first `num_copied` blocks of it."""

    index: int
    blocks: list[int]
    num_copied: int = 0


@dataclass(frozen=True, slots=True)
class Drawn:
    """Tokens that a step draws, [S] int64 on the device; `rows` by id of the sequence."""

    token_ids: Tensor
    rows: dict[int, int]


class BlockTables:
    """Block tables as one array [capacity, width] int64; both grow as they have to."""

    def __init__(self, num_rows: int = 16, num_blocks: int = 16) -> None:
        self._array: _Ints = np.zeros((num_rows, num_blocks), np.int64)
        self._rows: dict[int, _Row] = {}  # by id of the list, which its row keeps alive
        self._free = list(range(num_rows - 1, -1, -1))

    def take(self, chunks: tuple[Chunk, ...]) -> _Ints:
        """The tables of `chunks`, [len(chunks), the longest's blocks]; a row's rest is arbitrary
        block numbers."""
        rows = []
        longest = 0
        for chunk in chunks:
            blocks = chunk.seq.blocks
            row = self._rows.get(id(blocks))
            if row is None:
                row = self._enter(blocks, chunks)
            num_blocks = len(blocks)
            if row.num_copied != num_blocks:
                self._extend(row)
            if num_blocks > longest:
                longest = num_blocks
            rows.append(row.index)
        return self._array[rows, :longest]

    def _enter(self, blocks: list[int], chunks: tuple[Chunk, ...]) -> _Row:
        if not self._free:
            self._make_room(chunks)
        row = self._rows[id(blocks)] = _Row(self._free.pop(), blocks)
        return row

    def _make_room(self, chunks: tuple[Chunk, ...]) -> None:
        """Forget the tables that this step does without; if it needs all, get more rows."""
        used = {id(chunk.seq.blocks) for chunk in chunks}
        gone = [key for key in self._rows if key not in used]
        self._free = [self._rows.pop(key).index for key in gone]
        if not gone:
            height = len(self._array)
            self._array = np.concatenate([self._array, np.zeros_like(self._array)])
            self._free = list(range(2 * height - 1, height - 1, -1))

    def _extend(self, row: _Row) -> None:
        width = self._array.shape[1]
        num_blocks = len(row.blocks)
        if num_blocks > width:
            more = max(width, num_blocks - width)
            self._array = np.pad(self._array, ((0, 0), (0, more)))
        self._array[row.index, row.num_copied : num_blocks] = row.blocks[row.num_copied :]
        row.num_copied = num_blocks


class Inputs:
    """Makes the batches of one runner. `block_size` in tokens."""

    def __init__(self, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._device = device
        self._tables = BlockTables()

    def batch(self, plan: StepPlan, ahead: Drawn | None = None) -> Batch:
        """The model's input for `plan`. A chunk without tokens is our own mistake.

        A token that a sequence does not have yet is taken from `ahead`.
        """
        chunks, size = plan.chunks, self._block_size
        tables = self._tables.take(chunks)
        token_ids: list[int] = []
        starts, ends, query_starts, sample_rows = [], [], [0], []
        unknown: list[int] = []  # where in token_ids, and in which row of `ahead` it will be found
        found: list[int] = []
        for chunk in chunks:
            start, num_tokens = chunk.start, chunk.num_tokens
            assert num_tokens > 0
            known = chunk.seq.token_ids
            if num_tokens > 1:
                token_ids += known[start : start + num_tokens]
            elif start < len(known):
                token_ids.append(known[start])
            else:
                assert ahead is not None, "a token is wanted that no step draws"
                unknown.append(len(token_ids))
                found.append(ahead.rows[id(chunk.seq)])
                token_ids.append(0)
            starts.append(start)
            ends.append(start + num_tokens)
            query_starts.append(len(token_ids))
            if chunk.samples:
                sample_rows.append(len(token_ids) - 1)
        positions, rows = np.array(starts), np.arange(len(chunks))
        if len(token_ids) > len(chunks):
            counts = np.diff(query_starts)
            shifts = positions - query_starts[:-1]
            positions = np.arange(len(token_ids)) + np.repeat(shifts, counts)
            rows = np.repeat(rows, counts)
        blocks, offsets = np.divmod(positions, size)
        tokens = self._tensor(np.array(token_ids))
        if ahead is not None and unknown:
            at, of = self._tensor(np.array(unknown)), self._tensor(np.array(found))
            tokens.index_copy_(0, at, ahead.token_ids.index_select(0, of))
        return Batch(
            token_ids=tokens,
            positions=self._tensor(positions),
            slots=self._tensor(tables[rows, blocks] * size + offsets),
            query_starts=query_starts,
            context_lens=ends,
            block_tables=self._tensor(tables),
            sample_rows=self._tensor(np.array(sample_rows, np.int64)),
        )

    def _tensor(self, array: _Ints) -> Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type == "cuda":  # else the copy would wait for the device
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)
