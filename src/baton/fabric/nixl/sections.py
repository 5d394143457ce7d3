"""What of a fetch is read together, and what the headers say of it. Vectors: blocks can be many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from baton.fabric.arena import FRAME_HEADERS, KEY_BYTES, PAGE_BYTES, Geometry
from baton.fabric.digest import num_bytes_of
from baton.fabric.nixl.staging import NUM_PAGES
from baton.fabric.transport import ReadResult, Wanted

SECTION_BYTES: Final = 64 << 20
"""Results of blocks are known at the end of their section: what a deadline may cost."""

_HEADERS_PER_PAGE = PAGE_BYTES // FRAME_HEADERS.itemsize


class Section(msgspec.Struct, frozen=True, eq=False):
    """Blocks to fetch together, by rising frame.

    indices: where they are in the fetch. frames: [num_blocks]. pages: [num_pages] of the arena,
    page 0 and those with the headers. places: [num_blocks] of the headers in these pages, counted
    in headers.
    """

    indices: list[int]
    frames: npt.NDArray[np.int32]
    pages: npt.NDArray[np.int32]
    places: npt.NDArray[np.int64]


def sections(
    geometry: Geometry, wanted: Sequence[Wanted], results: list[ReadResult | None]
) -> Iterator[Section]:
    """All blocks that have no result yet; those without a frame in the arena get theirs here."""
    indices = []
    for index, block in enumerate(wanted):
        if results[index] is None:
            if 0 <= block.frame < geometry.num_frames:
                indices.append(index)
            else:
                results[index] = ReadResult.OUT_OF_RANGE
    unordered = np.array([wanted[index].frame for index in indices], dtype=np.int64)
    order = np.argsort(unordered, kind="stable")
    frames = unordered[order]
    pages, offsets = np.divmod(geometry.header_at(0) + frames * FRAME_HEADERS.itemsize, PAGE_BYTES)
    unique, numbers = np.unique(pages, return_inverse=True)
    max_blocks = max(1, SECTION_BYTES // geometry.stride)
    start = 0
    while start < len(frames):
        first = numbers[start]
        end = min(start + max_blocks, int(np.searchsorted(numbers, first + NUM_PAGES - 1)))
        section = slice(start, end)
        yield Section(
            [indices[at] for at in order[section]],
            frames[section].astype(np.int32),
            np.concatenate(([0], unique[first : numbers[end - 1] + 1])).astype(np.int32),
            (1 + numbers[section] - first) * _HEADERS_PER_PAGE
            + offsets[section] // FRAME_HEADERS.itemsize,
        )
        start = end


def judge(
    geometry: Geometry, headers: npt.NDArray[np.void], blocks: Sequence[Wanted]
) -> list[ReadResult]:
    """What the header of each block's frame says of it; OK if it may be read."""
    keys = [block.key if len(block.key) == KEY_BYTES else bytes(KEY_BYTES) for block in blocks]
    sizes = np.array([num_bytes_of(block.destination) for block in blocks], dtype=np.uint64)
    asked = np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, 4)
    missing = (headers["generation"] % 2 == 1) | (headers["key"] != asked).any(axis=1)
    misfit = (headers["num_bytes"] != sizes) | (sizes > geometry.frame_bytes)
    return [
        ReadResult.MISSING if absent else ReadResult.WRONG_SIZE if wrong else ReadResult.OK
        for absent, wrong in zip(missing.tolist(), misfit.tolist(), strict=True)
    ]
