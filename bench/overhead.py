"""What the parts between the model and the client cost, without a model.

    python bench/overhead.py --part scheduler [--json FILE]

`scheduler`: one engine step of policy, that is `schedule` + `update` + `take` with the block
pool, while 1, 64 and 256 sequences decode with contexts of a few hundred to a few thousand tokens
and some end and are replaced. The runner is replaced by constants; its time is not counted.
Target: under 300 µs at 256.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from baton.core.lease import LeaseTable
from baton.core.limits import SchedulerConfig
from baton.core.plan import StepOutput
from baton.core.scheduler import Scheduler
from baton.core.store_index import StoreIndex
from baton.types import KvFormat, Request, SamplingParams

BLOCK_SIZE = 16
PROMPT_TOKENS = 1000
MAX_TOKENS = 2000
TARGET_US = {256: 300.0}


def _make_scheduler(num_seqs: int) -> Scheduler:
    num_blocks = num_seqs * ((PROMPT_TOKENS + MAX_TOKENS) // BLOCK_SIZE + 2) + 64
    config = SchedulerConfig(
        kv_format=KvFormat(BLOCK_SIZE, "bfloat16", 1, 1, 1, 64),
        num_blocks=num_blocks,
        num_frames=0,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=max(8192, num_seqs),
        max_model_len=PROMPT_TOKENS + MAX_TOKENS,
        vocab_size=1 << 16,
        fingerprint=b"bench",
        numerics="none",
    )
    index = StoreIndex(0)
    return Scheduler(config, LeaseTable("bench", 1, bytes(32), index), index)


def _add(scheduler: Scheduler, number: int) -> None:
    # A third of each prompt is shared; lengths differ, so block borders fall in different steps.
    own = [(number * 31 + i) % 65000 for i in range(PROMPT_TOKENS * 2 // 3 + number % 61)]
    prompt = tuple(range(PROMPT_TOKENS // 3)) + tuple(own)
    sampling = SamplingParams(MAX_TOKENS - 500 - (number * 37) % 300, temperature=0.0)
    scheduler.add(Request(f"r{number}", prompt, sampling), 0.0)


def _step(scheduler: Scheduler, now: float) -> tuple[float, int, int]:
    """Seconds of policy, number of chunks and number of ended sequences of one step."""
    begin = time.perf_counter()
    plan = scheduler.schedule(now)
    planned = time.perf_counter()
    output = StepOutput(
        [[7] if chunk.samples else [] for chunk in plan.chunks], [None] * len(plan.chunks), 0.0
    )
    computed = time.perf_counter()
    scheduler.update(plan, output, now)
    update = scheduler.take()
    end = time.perf_counter()
    num_ended = sum(delta.finish is not None for delta in update.deltas)
    return planned - begin + end - computed, len(plan.chunks), num_ended


def measure_scheduler(num_seqs: int, num_steps: int) -> dict[str, Any]:
    """Microseconds per step with `num_seqs` running decodes."""
    scheduler = _make_scheduler(num_seqs)
    for number in range(num_seqs):
        _add(scheduler, number)
    now, number = 0.0, num_seqs
    while True:
        _, num_chunks, _ = _step(scheduler, now)
        if num_chunks == num_seqs and scheduler.load().num_waiting_tokens == 0:
            break
    samples = []
    for step in range(num_steps):
        now = float(step)
        elapsed, _, num_ended = _step(scheduler, now)
        samples.append(elapsed * 1e6)
        for _ in range(num_ended):
            _add(scheduler, number)
            number += 1
    samples.sort()
    return {
        "num_seqs": num_seqs,
        "num_steps": num_steps,
        "min_us": round(samples[0], 1),
        "median_us": round(statistics.median(samples), 1),
        "p90_us": round(samples[int(0.9 * len(samples))], 1),
        "median_us_per_seq": round(statistics.median(samples) / num_seqs, 2),
        "target_us": TARGET_US.get(num_seqs),
    }


def bench_scheduler() -> list[dict[str, Any]]:
    return [measure_scheduler(1, 2000), measure_scheduler(64, 1000), measure_scheduler(256, 1000)]


PARTS: dict[str, Callable[[], list[dict[str, Any]]]] = {"scheduler": bench_scheduler}


def _print_table(part: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{part}")
    names = list(rows[0])
    print("  ".join(f"{name:>17}" for name in names))
    for row in rows:
        cells = ["-" if row[name] is None else row[name] for name in names]
        print("  ".join(f"{cell:>17}" for cell in cells))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", action="append", choices=sorted(PARTS), help="default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    args = parser.parse_args(argv)
    results = {}
    for part in args.part or sorted(PARTS):
        results[part] = PARTS[part]()
        _print_table(part, results[part])
    if args.json is not None:
        machine = {"python": platform.python_version(), "processor": platform.machine()}
        args.json.write_text(json.dumps({"machine": machine, **results}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
