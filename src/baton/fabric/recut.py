"""Blocks of a store that is unlike ours, on their way into blocks of our own.

    fetch a batch under the source's keys ──▶ staged ──pieces: copy, or convert──▶ destinations

The source's blocks are verified as they were stored, before anything is made of them. A
destination is good when all its pieces are. What no number of our type can hold is no block of
ours: it is `unfit`, never rounded to infinity. Numbers that are not finite at the source stay so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from baton.core.plan import Piece, Recut
from baton.fabric.transport import ReadResult, Wanted, WritableBlock
from baton.types import KvFormat

MAX_STAGED_BYTES: Final = 16 << 20
"""Memory for blocks as the source has them, or one block if it has more."""

_STORED: Final = {"bfloat16": "<u2", "float16": "<f2", "float32": "<f4"}
_INFINITE, _QUIET = np.uint32(0x7F80), np.uint32(0x40)  # of bf16
_Floats = npt.NDArray[np.float32]
_Array = npt.NDArray[Any]


def fetch_recut(
    recut: Recut,
    destinations: Sequence[WritableBlock],
    fetch: Callable[[Sequence[Wanted]], list[ReadResult]],
) -> list[ReadResult]:
    """Fetch the source's blocks and fill `destinations`; one result for each of these.

    fetch: as a transport's, of the source's blocks. After one that did not come nothing more is
    fetched, since what follows it in the sequence would be recomputed anyway.
    """
    source, target = recut.source, recut.target
    results: list[ReadResult] = [ReadResult.OK] * len(destinations)
    at_once = min(len(recut.blocks), max(1, MAX_STAGED_BYTES // source.block_bytes))
    staged = np.empty((at_once, source.block_bytes), np.uint8)
    failed: ReadResult | None = None
    for first in range(0, len(recut.blocks), max(1, at_once)):
        batch = recut.blocks[first : first + at_once]
        rows = staged[: len(batch)]
        if failed is None:
            found = fetch(
                [Wanted(b.key, b.frame, b.digest, row) for b, row in zip(batch, rows, strict=True)]
            )
            failed = next((result for result in found if result is not ReadResult.OK), None)
        else:
            found = [failed] * len(batch)
        for block, row, result in zip(batch, rows, found, strict=True):
            for piece in block.pieces:
                if results[piece.turn] is ReadResult.OK:
                    into = destinations[piece.turn]
                    is_ok = result is ReadResult.OK
                    fits = not is_ok or _put(piece, row, source, into, target)
                    results[piece.turn] = result if fits else ReadResult.UNFIT
    return results


def convert(values: _Array, source: str, target: str) -> _Array | None:
    """Numbers of one type as another's, rounded to nearest even; None if one is beyond it.

    Types are as torch names them; bf16 comes and goes as uint16. The shape stays.
    """
    if source == target:
        return values
    wide = _widen(values, source)
    if target == "float32":
        return wide
    with np.errstate(all="ignore"):
        if target == "float16":
            half = wide.astype("<f2")
            return None if (np.isinf(half) & np.isfinite(wide)).any() else half
        bits = wide.view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
        rounded = np.where(np.isnan(wide), bits >> 16 | _QUIET, rounded)
        if ((rounded & _INFINITE == _INFINITE) & np.isfinite(wide)).any():
            return None
        return rounded.astype("<u2")


def _widen(values: _Array, source: str) -> _Floats:
    if source == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(all="ignore"):
        return values.astype(np.float32)


def _put(
    piece: Piece, row: WritableBlock, source: KvFormat, into: WritableBlock, target: KvFormat
) -> bool:
    """Copy a piece of one block into another; False if a number of it does not fit."""
    tokens = slice(piece.start, piece.start + piece.num_tokens)
    slots = slice(piece.slot, piece.slot + piece.num_tokens)
    if source.dtype == target.dtype:
        _slots(into, target, "u1")[:, :, slots] = _slots(row, source, "u1")[:, :, tokens]
        return True
    taken = _slots(row, source, _STORED[source.dtype])[:, :, tokens]
    converted = convert(taken, source.dtype, target.dtype)
    if converted is None:
        return False
    _slots(into, target, _STORED[target.dtype])[:, :, slots] = converted
    return True


def _slots(block: WritableBlock, fmt: KvFormat, dtype: str) -> _Array:
    """A block as [num_layers, 2 (K, V), block_size, a token's numbers (or bytes) of one part]."""
    flat: _Array = np.frombuffer(block, dtype=dtype)
    return flat.reshape(fmt.num_layers, 2, fmt.block_size, -1)
