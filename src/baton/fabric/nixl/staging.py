"""Memory of ours that blocks land in, before they are copied and digested into their places.

    pages of headers, read before the frames, and again after them
    banks of frames; some are copied out while the next lands in another

A read that missed its deadline keeps its whole `Staging` until it has ended. On a GPU `Banks` would
be device memory: `kind`, `device`, `address`, `num_bytes` and `take_out` are all that is asked of
it. Headers stay in host memory.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from baton.fabric.arena import FRAME_HEADERS, PAGE_BYTES
from baton.fabric.digest import gather_and_digest
from baton.fabric.nixl.agent import MEMORY
from baton.fabric.transport import Bytes, WritableBlock

BANK_BYTES: Final = 2 << 20
"""Small enough to be copied out of a cache, large enough for the hand-over not to be felt."""
NUM_BANKS: Final = 4
NUM_PAGES: Final = 257
"""Of headers at one time; page 0 of the arena is one of them."""


class Banks:
    """Host memory for `NUM_BANKS` times `frames_per_bank` frames, `stride` bytes apart."""

    kind = MEMORY
    device = 0

    def __init__(self, stride: int) -> None:
        self.stride = stride
        self.frames_per_bank = max(1, BANK_BYTES // stride)
        self.num_bytes = NUM_BANKS * self.frames_per_bank * stride
        self._bytes: Bytes = np.frombuffer(mmap.mmap(-1, self.num_bytes), dtype=np.uint8)
        self.address = int(self._bytes.ctypes.data)

    def take_out(
        self,
        bank: int,
        turns: Sequence[int],
        sizes: Sequence[int],
        destinations: Sequence[WritableBlock],
    ) -> list[bytes]:
        """Copy frames of `bank`, `sizes` bytes of each, to `destinations`; the copies' digests.

        turns: which frames, counted from the bank's first.
        """
        first = bank * self.frames_per_bank
        starts = [(first + turn) * self.stride for turn in turns]
        return gather_and_digest(self._bytes, starts, sizes, destinations)


class Staging:
    """What one fetch at a time lands in; see the top of this module."""

    def __init__(self, stride: int) -> None:
        self.banks = Banks(stride)
        self.pages: Bytes = np.frombuffer(mmap.mmap(-1, 2 * NUM_PAGES * PAGE_BYTES), dtype=np.uint8)
        self.pages_address = int(self.pages.ctypes.data)

    @property
    def num_bytes(self) -> int:
        return self.banks.num_bytes + self.pages.size

    def page_0(self, after: bool) -> bytes:
        """The arena's first page, as it was before the frames were read, or after that."""
        start = NUM_PAGES * PAGE_BYTES if after else 0
        return self.pages[start : start + PAGE_BYTES].tobytes()

    def headers(self, after: bool, places: npt.NDArray[np.int64]) -> npt.NDArray[np.void]:
        """Headers, [len(places)] of `FRAME_HEADERS`, from places counted from the first page's."""
        start = NUM_PAGES * PAGE_BYTES if after else 0
        return self.pages[start : start + NUM_PAGES * PAGE_BYTES].view(FRAME_HEADERS)[places]
