"""Prefix hits of the Mooncake conversation trace against the size of the cache.

    python bench/reproduce/mooncake_hits.py [--data FILE] [--json FILE]

A unified worker of the twin serves the trace, its real `BlockPool` as large as the cache, with
steps that cost next to nothing, so that requests come one after the other. Published are the
figures of a plain least-recently-used list of the trace's block ids, by the README of the data.

Ours differ by design in three ways: only full blocks are cached; a block of the answer is cached as
well; and of blocks that were used together the last are evicted first. A hit is counted in blocks,
of all blocks of all prompts, the partial ones included.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from baton.core.cost import StepShape
from baton.core.life import HandoffPolicy
from baton.core.limits import SchedulerConfig
from baton.planner.traces import read_trace, spread
from baton.twin.deployment import Deployment, WorkerSetup
from baton.twin.links import Port
from baton.twin.prompts import VOCAB_SIZE
from baton.twin.simulator import Simulator
from baton.twin.workload import TraceRequest
from baton.types import KvFormat, Role

DATA = Path(__file__).parents[2] / "data" / "traces" / "mooncake" / "conversation_trace.jsonl.gz"
BLOCK_SIZE = 512
PUBLISHED = {1.0e6: 0.054, 3.1e6: 0.139, 10.2e6: 0.287, 30.7e6: 0.359, 102e6: 0.366}
"""Capacity in tokens, as rounded there -> hit ratio of blocks."""
MAX_POINTS = 0.5


class Free:
    """Steps that take no time worth speaking of."""

    def step_s(self, shape: StepShape) -> float:
        return 1e-7


def hit_ratio(trace: Sequence[TraceRequest], capacity: float) -> float:
    """Of the blocks of all prompts, the share that was found in a pool of `capacity` tokens."""
    longest = max(each.num_prompt_tokens + each.num_output_tokens for each in trace)
    limits = SchedulerConfig(
        kv_format=KvFormat(BLOCK_SIZE, "bfloat16", 1, 1, 1, BLOCK_SIZE),
        num_blocks=round(capacity / BLOCK_SIZE),
        num_frames=0,
        max_num_seqs=256,
        max_num_batched_tokens=longest,
        max_model_len=longest + 1,
        vocab_size=VOCAB_SIZE,
        fingerprint=b"hits",
        numerics="twin",
    )
    worker = WorkerSetup("unified-0", Role.UNIFIED, limits, Free(), port="host")
    it = Deployment((worker,), {"host": Port(1e9)}, HandoffPolicy(10.0), message_s=0.0)
    result = Simulator(it, trace).run()
    num_blocks = sum(-(-each.num_prompt_tokens // BLOCK_SIZE) for each in trace)
    return sum((each.cached_tokens or 0) // BLOCK_SIZE for each in result.requests) / num_blocks


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    trace = spread(read_trace(args.data)).requests
    print(f"{'cache (tokens)':>15}{'published':>11}{'ours':>8}{'points':>8}")
    rows = []
    for capacity, published in PUBLISHED.items():
        ours = hit_ratio(trace, capacity)
        points = 100 * (ours - published)
        rows.append({"tokens": capacity, "published": published, "ours": ours, "points": points})
        print(f"{capacity / 1e6:>14.1f}M{published:>11.3f}{ours:>8.3f}{points:>+8.2f}", flush=True)
    if args.json:
        args.json.write_bytes(msgspec.json.format(msgspec.json.encode(rows)) + b"\n")
    return 0 if all(abs(row["points"]) <= MAX_POINTS for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
