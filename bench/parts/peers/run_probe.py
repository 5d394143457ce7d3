"""What the machine gives at this moment: memory bandwidth and the peak of bf16 matrix products.

    python -m parts.peers.run_probe THREADS

Bandwidth is that of reading a buffer far larger than any cache, the best of some passes. The peak
is the better one of torch's matrix product and of Baton's own kernel, which may be the faster.
A cell's `kind` says which: bandwidth (bytes a second), torch or native (FLOP a second).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from baton.model.native import ISAS, Packed, find_kernels
from parts.peers.child import Cell, serve

BUFFER_BYTES = 512 << 20
NUM_PASSES = 4
ROWS, WIDTH = 1024, 2048


class Probe:
    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._buffer = torch.ones(BUFFER_BYTES // 4)
        self._x = torch.randn(ROWS, WIDTH, dtype=torch.bfloat16)
        weight = torch.randn(WIDTH, WIDTH, dtype=torch.bfloat16)
        self._weight = weight
        found = [kernels for isa in ISAS if (kernels := find_kernels(isa)) is not None]
        self._kernels = found[0] if found else None
        self._packed = Packed(found[0], weight.clone()) if found else None
        self.about = f"best of {NUM_PASSES} passes, threads={threads}"

    def measure(self, cell: Cell) -> float:
        """The rate, a second. 0 for the kernel that this machine does not have."""
        flops = 2.0 * ROWS * WIDTH * WIDTH
        if cell["kind"] == "bandwidth":
            return BUFFER_BYTES / self._best(self._buffer.sum)
        if cell["kind"] == "torch":
            return flops / self._best(lambda: self._x @ self._weight.T)
        kernels, packed = self._kernels, self._packed
        if kernels is None or packed is None:
            return 0.0
        return flops / self._best(lambda: kernels.linear(self._x, packed))

    def _best(self, call: Callable[[], object]) -> float:
        times = []
        for _ in range(NUM_PASSES):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)


def start() -> tuple[str, Callable[[Cell], float]]:
    probe = Probe(int(sys.argv[1]))
    return probe.about, probe.measure


if __name__ == "__main__":
    serve(start)
