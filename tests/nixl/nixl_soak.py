"""Reads through NIXL until `NUM_READS` transfers are done: every byte right, nothing grows.

A script, `make nixl-soak`: transports of other systems have died after 90 thousand transfers.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from pathlib import Path

from nixl_ends import KV_FORMAT, NUM_BLOCKS, Writer, expected
from nixl_writer import frame, key

from baton.fabric.nixl import NixlTransport
from baton.fabric.nixl.door import Doors
from baton.fabric.transport import ReadResult, Wanted

NUM_READS = 200_000
REPORT_EVERY = 20_000
MAX_GROWTH_BYTES = 16 << 20


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def main() -> int:
    rng = random.Random(0)
    places = [bytearray(KV_FORMAT.block_bytes) for _ in range(NUM_BLOCKS)]
    with tempfile.TemporaryDirectory() as directory:
        runtime_dir = Path(directory) / "run"
        writer = Writer(runtime_dir)
        transport = NixlTransport(Doors(runtime_dir), KV_FORMAT)
        pids = {"reader": os.getpid(), "serving process": writer.hello.serving_pid}
        before: dict[str, int] = {}
        started, reported, num_blocks = time.monotonic(), 0, 0
        while transport.num_reads < NUM_READS:
            blocks = rng.sample(range(NUM_BLOCKS), rng.choice((1, 2, 3, 4, NUM_BLOCKS)))
            wanted = [
                Wanted(key(at), frame(at, NUM_BLOCKS), writer.hello.digests[at], places[at])
                for at in blocks
            ]
            results = transport.fetch(writer.hello.grant, wanted, time.monotonic() + 5)
            assert results == [ReadResult.OK] * len(blocks), results
            assert all(places[at] == expected(at, 1) for at in blocks)
            for at in blocks:
                places[at][::4096] = bytes(len(places[at][::4096]))
            num_blocks += len(blocks)
            if transport.num_reads - reported >= REPORT_EVERY:
                reported = transport.num_reads
                now = {name: resident_bytes(pid) for name, pid in pids.items()}
                before = before or now
                for name, size in now.items():
                    assert size - before[name] < MAX_GROWTH_BYTES, f"{name} has grown to {size}"
                sizes = ", ".join(f"{name} {size >> 20} MiB" for name, size in now.items())
                print(f"{reported} transfers, {num_blocks} blocks right; {sizes}", flush=True)
        elapsed_s = time.monotonic() - started
        assert writer.serving_pid == writer.hello.serving_pid, "it was started again"
        transport.close()
        writer.close()
    print(f"{NUM_READS} transfers in {elapsed_s:.0f} s, {num_blocks} blocks, all right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
