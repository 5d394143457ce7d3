"""Blocks between a pool on a GPU and the host, beside the steps that compute.

Copies run on a stream of their own and through pinned memory, so that the device's copy engines
work while a step computes, and nothing here ever makes the compute stream wait. The thread that
calls waits for its copy and for nothing else (without the GIL): call from the fabric thread, and
neither the engine nor the device stands still.

What makes the order right. `mark` records, after each forward pass is submitted, the point that
the compute stream has then reached.

* A block is read when the pass that wrote it is behind it: the copy waits for that pass's mark,
  but for none later. Later passes may be under way; they write other slots, since a block that is
  being read is full, or belongs to a sequence that computes nothing any more, and stays referenced
  until its reader has answered.
* A block is written when no pass can still touch it: the copy waits for the newest mark. A pass
  that was submitted before the block changed hands (a sequence that ended one step earlier than
  could be known) may still write there; every later pass leaves a block alone that is being
  imported.
* A pass that uses an imported block is submitted after `write` has returned, that is when the
  bytes have arrived.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

HostBlock = npt.NDArray[np.uint8]

MAX_PASSES = 4
"""Passes that may be under way when a block is read; the runner has at most two."""


class HostCopies:
    """Copies of the rows of `blocks` [num_blocks, block_bytes] uint8, on a GPU.

    cuda: `torch.cuda`, or what stands in for it. Any threads may read and write, each through
    pinned memory of its own; `mark` is called by the thread that computes.
    """

    def __init__(self, blocks: Tensor, cuda: Any = torch.cuda) -> None:
        self._blocks = blocks
        self._cuda = cuda
        self._reads, self._writes = cuda.Stream(), cuda.Stream()
        self._own = threading.local()
        self._marks: deque[Any] = deque(maxlen=MAX_PASSES)

    def mark(self) -> None:
        """A forward pass has been submitted to the current stream."""
        event = self._cuda.Event()
        event.record()
        self._marks.append(event)

    def newest(self, passes_since: int = 0) -> Any | None:
        """The mark of the newest pass, or of the one so many passes before it; None: no pass yet.

        The marks of passes too long ago are gone: a later one stands in, which is safe.
        """
        marks = list(self._marks)
        return marks[max(0, len(marks) - 1 - passes_since)] if marks else None

    def read(self, block: int, after: Any | None) -> HostBlock:
        """The bytes of a block, once `after` is passed; valid until this thread calls again."""
        return self._copy(self._reads, after, block, inward=False).numpy()

    def write(self, block: int, source: HostBlock) -> None:
        """Copy host memory into a block; returns when it is there."""
        after = self.newest()
        np.copyto(self._staging().numpy(), source)
        self._copy(self._writes, after, block, inward=True)

    def _copy(self, stream: Any, after: Any | None, block: int, inward: bool) -> Tensor:
        staging, device = self._staging(), self._blocks[block]
        done = self._cuda.Event()
        with self._cuda.stream(stream):
            if after is not None:
                stream.wait_event(after)
            if inward:
                device.copy_(staging, non_blocking=True)
            else:
                staging.copy_(device, non_blocking=True)
            done.record(stream)
        done.synchronize()
        return staging

    def _staging(self) -> Tensor:
        if not hasattr(self._own, "staging"):
            self._own.staging = torch.empty(
                self._blocks.shape[1], dtype=torch.uint8, pin_memory=self._blocks.is_cuda
            )
        staging: Tensor = self._own.staging
        return staging
