"""What one engine step of policy costs: `schedule`, `update` and `take` with the block pool.

1, 64 and 256 sequences decode with contexts of about one to two thousand tokens; some end and are
replaced. The runner is replaced by constants; its time is not counted. Target: under 300 µs at
256.
"""

from __future__ import annotations

import time

import numpy as np

from baton.core.lease import LeaseTable
from baton.core.limits import SchedulerConfig
from baton.core.plan import StepOutput
from baton.core.scheduler import Scheduler
from baton.core.store_index import StoreIndex
from baton.types import KvFormat, Request, SamplingParams
from parts.table import Row

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
    """CPU seconds of policy, number of chunks and number of ended sequences of one step."""
    begin = time.thread_time()
    plan = scheduler.schedule(now)
    planned = time.thread_time()
    output = StepOutput(
        [[7] if chunk.samples else [] for chunk in plan.chunks], [None] * len(plan.chunks), 0.0
    )
    computed = time.thread_time()
    scheduler.update(plan, output, now)
    update = scheduler.take()
    end = time.thread_time()
    num_ended = sum(delta.finish is not None for delta in update.deltas)
    return planned - begin + end - computed, len(plan.chunks), num_ended


def measure() -> list[Row]:
    return [_measure(1, 2000), _measure(64, 1000), _measure(256, 1000)]


def _measure(num_seqs: int, num_steps: int) -> Row:
    """CPU microseconds per step with `num_seqs` running decodes."""
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
    median = float(np.median(samples))
    values = {
        "cpu_p50_us": median,
        "cpu_p90_us": float(np.percentile(samples, 90)),
        "per_sequence_us": median / num_seqs,
    }
    if num_seqs in TARGET_US:
        values["target_us"] = TARGET_US[num_seqs]
    return Row("scheduler and pool: a step", f"{num_seqs} running", values)
