"""What of a fetch is read together, and what has come of it. Vectors: blocks can be many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from baton.fabric.arena import FRAME_HEADERS, KEY_BYTES, PAGE_BYTES, Geometry
from baton.fabric.digest import num_bytes_of
from baton.fabric.nixl.staging import NUM_PAGES, Banks
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


class Landing:
    """The blocks of one section on their way to their destinations.

    before, after: their headers as they were before the frames were read and after that,
    [num_blocks] of `FRAME_HEADERS`. `take_out` is called batch by batch, from one thread; `finish`
    when all of that is over.
    """

    def __init__(
        self, section: Section, wanted: Sequence[Wanted], before: npt.NDArray[np.void]
    ) -> None:
        self.after = before
        self._before = before
        self._blocks = [wanted[index] for index in section.indices]
        self._indices = section.indices
        self._found: list[ReadResult] = []

    def take_out(self, geometry: Geometry, banks: Banks, bank: int, batch: slice) -> None:
        """Copy the blocks of `batch`, whose frames are in `bank`, if their headers were right."""
        blocks = self._blocks[batch]
        sizes = [num_bytes_of(block.destination) for block in blocks]
        found = judge(geometry, self._before[batch], blocks, sizes)
        turns = [turn for turn, result in enumerate(found) if result is ReadResult.OK]
        digests = banks.take_out(
            bank,
            turns,
            [sizes[turn] for turn in turns],
            [blocks[turn].destination for turn in turns],
        )
        for turn, digest in zip(turns, digests, strict=True):
            if digest != blocks[turn].digest:
                found[turn] = ReadResult.CORRUPT
        self._found += found

    def finish(self, results: list[ReadResult | None]) -> None:
        """Say what has become of each block, by its place in the fetch."""
        changed = (self._before["generation"] != self.after["generation"]).tolist()
        for index, result, reused in zip(self._indices, self._found, changed, strict=False):
            copied = result is ReadResult.OK or result is ReadResult.CORRUPT
            results[index] = ReadResult.MISSING if reused and copied else result


def judge(
    geometry: Geometry,
    headers: npt.NDArray[np.void],
    blocks: Sequence[Wanted],
    num_bytes: Sequence[int],
) -> list[ReadResult]:
    """What the header of each block's frame says of it; OK if it may be read. num_bytes: theirs."""
    keys = [block.key if len(block.key) == KEY_BYTES else bytes(KEY_BYTES) for block in blocks]
    sizes = np.array(num_bytes, dtype=np.uint64)
    asked = np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, 4)
    missing = (headers["generation"] % 2 == 1) | (headers["key"] != asked).any(axis=1)
    misfit = (headers["num_bytes"] != sizes) | (sizes > geometry.frame_bytes)
    if not (missing | misfit).any():
        return [ReadResult.OK] * len(blocks)
    return [
        ReadResult.MISSING if absent else ReadResult.WRONG_SIZE if wrong else ReadResult.OK
        for absent, wrong in zip(missing.tolist(), misfit.tolist(), strict=True)
    ]
