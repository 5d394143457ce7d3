"""How blocks travel: the seam behind which `shm`, `tcp` and `nixl` stand.

Blocks are contiguous buffers; a torch tensor comes as `tensor.view(torch.uint8).numpy()`.
Instants are seconds of `time.monotonic()` of this process.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from baton.types import Grant

Bytes = npt.NDArray[np.uint8]
WritableBlock = bytearray | memoryview | Bytes
ReadableBlock = bytes | WritableBlock


class ReadResult(enum.StrEnum):
    """What became of one block. Only after OK may its destination be used."""

    OK = "ok"
    MISSING = "missing"  # the frame holds another key, is being written, or changed meanwhile
    STALE_EPOCH = "stale_epoch"  # the store is of another start of that worker
    CORRUPT = "corrupt"  # the digest of the copy is not the one asked for
    OUT_OF_RANGE = "out_of_range"  # no such frame
    WRONG_SIZE = "wrong_size"  # the stored length is not the destination's
    UNREACHABLE = "unreachable"  # the source does not answer, or not in this protocol
    REFUSED = "refused"  # the source does not accept the grant
    WRONG_FORMAT = "wrong_format"  # the store holds another kv_format than ours
    CODEC = "codec"  # the source does not know the codec asked for
    TIMED_OUT = "timed_out"  # the deadline passed first
    UNFIT = "unfit"  # a number in it is beyond the type of our blocks


class Wanted(msgspec.Struct, frozen=True, eq=False):
    """One block to fetch: 32-byte key, hint of its frame, 16-byte digest, and where to put it.

    The destination's length is the expected length of the stored block, in bytes. num_tokens: how
    many slots are filled, from the first on; 0 is all. A lossy codec looks at no other.
    """

    key: bytes
    frame: int
    digest: bytes
    destination: WritableBlock
    num_tokens: int = 0


class Peer(msgspec.Struct, frozen=True):
    """Where a worker listens for readers over TCP, in this start of it (`epoch`).

    host: a numeric address.
    """

    worker_id: str
    epoch: int
    host: str
    port: int


class Transport(Protocol):
    """Reads blocks out of one other worker's store. Used by one thread of the fabric only."""

    def fetch(
        self, grant: Grant, wanted: Sequence[Wanted], deadline: float, codec: str = "raw"
    ) -> list[ReadResult]:
        """Copy each wanted block to its destination; one result for each, in order.

        Returns by `deadline` (a copy under way is finished first). A peer's fault is a result,
        never an exception. codec: in what form the blocks may travel; `raw` is exact, and a
        transport that needs no other may send raw whatever is allowed.
        """
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...
