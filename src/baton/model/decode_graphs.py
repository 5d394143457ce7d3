"""Decode steps recorded once per batch size and replayed: hundreds of launches become one.

A recorded step reads and writes fixed memory. So a batch of n sequences is laid into fixed inputs
of the next larger recorded size (its bucket); the rows beyond n are padding, which stores no K and
V and attends to nothing. The result is fixed memory too, and holds until the next step.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from baton.model.batch import Batch
from baton.model.triton_ops import stage_decode

MAX_ROWS = 256
"""Larger batches run unrecorded: their launches weigh little."""


class Capture(Protocol):
    """Records what `run` does on the device; calling what it returns does it again."""

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]: ...


class DecodeInputs:
    """The fixed inputs: ids, positions, slots [rows], tables [rows, max_blocks] int64; lens int32.

    They start as padding in every row.
    """

    def __init__(self, num_rows: int, max_blocks: int, device: torch.device) -> None:
        self.token_ids = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.positions = torch.zeros_like(self.token_ids)
        self.slots = torch.full_like(self.token_ids, -1)
        self.lens = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self.tables = torch.zeros((num_rows, max_blocks), dtype=torch.int64, device=device)

    def take(self, batch: Batch, bucket: int) -> None:
        """Lay `batch` into the first rows, and padding into the rest of the bucket."""
        stage_decode(
            (batch.token_ids, batch.positions, batch.slots, batch.block_tables),
            (self.token_ids, self.positions, self.slots, self.lens, self.tables),
            bucket,
        )


class DecodeGraphs:
    """The recorded steps over one set of inputs.

    compute: the step over the first n rows of the inputs, giving logits [n, vocab_size].
    """

    def __init__(
        self, inputs: DecodeInputs, compute: Callable[[int], Callable[[], Tensor]], capture: Capture
    ) -> None:
        self._inputs = inputs
        self._compute = compute
        self._capture = capture
        self._sizes = buckets(inputs.token_ids.numel())
        self._recorded: dict[int, Callable[[], Tensor]] = {}

    def bucket(self, batch: Batch) -> int | None:
        """The size to replay `batch` in; None if it is no decode step, or too large."""
        num_rows = batch.token_ids.numel()
        if num_rows != len(batch.context_lens):
            return None  # some sequence has more than one new token
        if batch.block_tables.shape[1] > self._inputs.tables.shape[1]:
            return None
        at = bisect_left(self._sizes, num_rows)
        return self._sizes[at] if at < len(self._sizes) else None

    def run(self, batch: Batch, bucket: int) -> Tensor:
        """Logits of the batch's tokens, [T, vocab_size]; valid until the next step."""
        self._inputs.take(batch, bucket)
        return self._replay(bucket)()[: batch.token_ids.numel()]

    def record(self, max_rows: int) -> None:
        """Record every size up to what `max_rows` sequences need, so that no step waits for it.

        The largest first: the others then find room in the memory that it took.
        """
        needed = self._sizes[: bisect_left(self._sizes, max_rows) + 1]
        for size in reversed(needed):
            self._replay(size)

    def _replay(self, bucket: int) -> Callable[[], Tensor]:
        if bucket not in self._recorded:
            self._recorded[bucket] = self._capture(self._compute(bucket))
        return self._recorded[bucket]


def buckets(max_rows: int) -> tuple[int, ...]:
    """1, 2, 4, then multiples of 8, up to the first that holds `max_rows`."""
    sizes = [1, 2, 4, *range(8, max_rows + 8, 8)]
    return tuple(sizes[: bisect_left(sizes, max_rows) + 1])


def capture_nothing(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The `Capture` of a device that cannot record: the step runs anew each time."""
    return run


class CudaCapture:
    """CUDA graphs that share one pool of memory, since only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        # Once for real, and not on the stream that others use: kernels are compiled and libraries
        # get their workspaces, which must not happen while recording. It computes what the replay
        # will compute again, so nothing is changed by it.
        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            run()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the device: the fabric's copies need not stand still.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = run()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay
