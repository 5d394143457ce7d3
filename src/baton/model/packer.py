"""Laying out a checkpoint's rows, in whatever order they come, as packed panels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from torch import Tensor

from baton.model.native import DTYPES, PANEL, Kernels, packed_elements
from baton.model.weights import Entry

# A piece is packed in half a millisecond, faster than it is read. With more threads every piece
# would wait for all of them, on busy cores for many times as long.
_THREADS: Final = 1


@dataclass(slots=True)
class _Target:
    """What an entry becomes: `memory` is flat. `open` are panels that came in part so far."""

    memory: Tensor
    rows: int
    width: int
    is_packed: bool
    open: dict[int, tuple[Tensor, int]] = field(default_factory=dict)


class Packer:
    """Fills the memory of entries; `put` is what `Checkpoint.read` calls.

    Panels are packed as soon as they are whole, straight from the piece that was read. Only where
    a part of a fused matrix ends within a panel do some of its rows wait for the others.
    """

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._targets: dict[str, tuple[_Target, int]] = {}

    def add(self, entry: Entry, memory: Tensor, is_packed: bool) -> None:
        """Say that the parts of `entry` belong into `memory`, flat and of the final type."""
        target = _Target(memory, entry.shape[0], entry.width or 1, is_packed)
        first = 0
        for name, rows in entry.parts.items():
            self._targets[name] = target, first
            first += rows

    def put(self, name: str, start: int, rows: Tensor) -> None:
        """Take rows of tensor `name`, the first of which is row `start` of it."""
        target, first = self._targets[name]
        row, end = first + start, first + start + rows.shape[0]
        rows = rows.to(target.memory.dtype)
        if not target.is_packed:
            target.memory[row * target.width : end * target.width].copy_(rows.flatten())
            return
        while row < end:
            panel, at = divmod(row, PANEL)
            # Up to the end if that is the matrix's, else whole panels only.
            whole = end - row if end == target.rows else (end - row) // PANEL * PANEL
            if at == 0 and whole:
                self._pack(target, panel, rows[:whole])
                taken = whole
            else:
                taken = min(PANEL - at, end - row)
                self._collect(target, panel, at, rows[:taken])
            rows, row = rows[taken:], row + taken

    def check(self) -> None:
        """Assert that no panel is half full."""
        assert not any(target.open for target, _ in self._targets.values())

    def _collect(self, target: _Target, panel: int, at: int, rows: Tensor) -> None:
        size = min(PANEL, target.rows - panel * PANEL)
        waiting, count = target.open.pop(panel, (rows.new_empty(size, target.width), 0))
        waiting[at : at + rows.shape[0]].copy_(rows)
        count += rows.shape[0]
        if count == size:
            self._pack(target, panel, waiting)
        else:
            target.open[panel] = waiting, count

    def _pack(self, target: _Target, panel: int, rows: Tensor) -> None:
        assert rows.is_contiguous()
        dtype = target.memory.dtype
        at = panel * packed_elements(PANEL, target.width, dtype) * dtype.itemsize
        self._kernels.table.pack(
            rows.data_ptr(),
            target.memory.data_ptr() + at,
            *rows.shape,
            DTYPES[dtype],
            _THREADS,
        )
