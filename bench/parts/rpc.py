"""The way of a request to a worker and of its first token back: `WorkerLink` and `WorkerServer`.

Two processes and a Unix socket. The worker reports a token as soon as it has the request. One
request after the other, so nothing is batched.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

import numpy as np
import uvloop

from baton.rpc.auth import create_secret
from baton.rpc.client import WorkerLink
from baton.rpc.messages import Hello, StepReport
from baton.types import Request, SamplingParams
from parts.fake_worker import WORKER_ID
from parts.processes import cpu_s, running, wait_until
from parts.table import Row

NUM_WARM = 200
NUM_TRIPS = 2000
PROMPTS = (16, 1000)


def measure() -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as name:
        secret = create_secret(Path(name))
        address = Path(name) / f"{WORKER_ID}.sock"
        with running("-m", "parts.fake_worker", name, "0") as worker:
            wait_until(address.exists, worker)
            for num_prompt in PROMPTS:
                trips, both = uvloop.run(_trips(f"unix:{address}", secret, num_prompt, worker.pid))
                values = {
                    "wall_p50_us": float(np.median(trips)),
                    "wall_p99_us": float(np.percentile(trips, 99)),
                    "cpu_both_ends_us": both,
                }
                rows.append(Row("rpc: submit to delta", f"prompt of {num_prompt} tokens", values))
    return rows


async def _trips(
    address: str, secret: bytes, num_prompt: int, worker_pid: int
) -> tuple[list[float], float]:
    """Wall microseconds of each trip, and CPU microseconds of one at both ends together."""
    heard = asyncio.Event()
    lost: list[str] = []

    def on_hello(hello: Hello) -> None:
        heard.set()

    def on_report(report: StepReport) -> None:
        if report.deltas:
            heard.set()

    def on_lost(reason: str) -> None:
        lost.append(reason)
        heard.set()

    link = WorkerLink(address, "gateway", num_prompt, secret, on_hello, on_report, on_lost)
    link.start()
    await heard.wait()
    sampling = SamplingParams(max_tokens=1)
    prompt = tuple(range(num_prompt))
    trips: list[float] = []
    for number in range(NUM_WARM + NUM_TRIPS):
        if number == NUM_WARM:
            trips.clear()
            cpu = time.process_time() + cpu_s(worker_pid)
        heard.clear()
        started = time.perf_counter()
        link.submit(Request(f"r{number}", prompt, sampling))
        await heard.wait()
        trips.append(1e6 * (time.perf_counter() - started))
        if lost:
            raise RuntimeError(f"the link is lost: {lost[0]}")
    cpu = time.process_time() + cpu_s(worker_pid) - cpu
    await link.close()
    return trips, 1e6 * cpu / NUM_TRIPS
