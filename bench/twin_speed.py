"""How many seconds of a deployment the twin simulates in a second, on one core.

    python bench/twin_speed.py [--data DIR] [--case NAME]... [--repeats N] [--json FILE]

The real scheduler, router and handoff code on the Azure conversation trace of 2023, scaled to so
many requests a second, with a cost model like that of an 8 B model on an H100. CPU seconds of this
process are counted, as other work on the machine does not add to them; wall seconds stand beside.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from baton.core.cost import Coefficients, Link, Parallel, StepCost
from baton.core.life import HandoffPolicy
from baton.core.limits import SchedulerConfig
from baton.planner.models import find_model
from baton.planner.traces import read_trace
from baton.twin.deployment import Deployment, WorkerSetup
from baton.twin.links import Port
from baton.twin.prompts import VOCAB_SIZE
from baton.twin.simulator import Simulator
from baton.twin.workload import TraceRequest, scale
from baton.types import KvFormat, Role

DATA = Path(__file__).parents[1] / "data" / "traces" / "azure2023"
TRACE = "AzureLLMInferenceTrace_conv.csv.gz"
BLOCK_SIZE = 16
KV_BYTES = 40e9
STORE_BYTES = 16e9
NIC_BYTES_PER_S = 25e9
# What such a GPU reaches, in round figures: they set how many steps there are, nothing else.
RATES = Coefficients(
    flops_per_s=450e12,
    weight_bytes_per_s=2.6e12,
    attention_flops_per_s=250e12,
    kv_bytes_per_s=2.2e12,
    step_s=0.002,
    sequence_s=5e-6,
)


class Case(msgspec.Struct, frozen=True):
    """workers by role, requests a second over all of them, how much is simulated, the target."""

    name: str
    counts: dict[Role, int]
    rate: float
    duration_s: float
    keep_blocks: bool
    target: float | None


CASES = (
    Case("16U, 10 req/s each", {Role.UNIFIED: 16}, 160.0, 60.0, False, 15.0),
    Case("16U, store kept", {Role.UNIFIED: 16}, 160.0, 30.0, True, None),
    Case("2U, 1 req/s each", {Role.UNIFIED: 2}, 2.0, 600.0, False, 100.0),
    Case("1P1D, 1 req/s each", {Role.PREFILL: 1, Role.DECODE: 1}, 2.0, 600.0, False, 100.0),
    Case("8P8D, 10 req/s each", {Role.PREFILL: 8, Role.DECODE: 8}, 160.0, 20.0, False, None),
)


def deployment(case: Case) -> Deployment:
    model = find_model("Llama-3.1-8B")
    block_bytes = round(model.kv_bytes_per_token * BLOCK_SIZE)
    limits = SchedulerConfig(
        kv_format=KvFormat(
            BLOCK_SIZE, "bfloat16", model.num_layers, model.num_kv_heads, 128, block_bytes
        ),
        num_blocks=int(KV_BYTES // block_bytes),
        num_frames=int(STORE_BYTES // block_bytes),
        max_num_seqs=256,
        max_num_batched_tokens=2048,
        max_model_len=32768,
        vocab_size=VOCAB_SIZE,
        fingerprint=b"speed",
        numerics="twin",
        keep_blocks=case.keep_blocks,
    )
    cost = StepCost(model, RATES, Parallel())
    workers = [
        WorkerSetup(f"{role.value}-{number}", role, limits, cost, port=f"{role.value}-{number}")
        for role, count in case.counts.items()
        for number in range(count)
    ]
    ports = {worker.worker_id: Port(NIC_BYTES_PER_S) for worker in workers}
    policy, link = HandoffPolicy(10.0), Link(0.0, 20e-6)
    return Deployment(tuple(workers), ports, policy, link, max_queued_requests=1 << 14)


def measure(case: Case, trace: list[TraceRequest], repeats: int) -> dict[str, float]:
    """Medians over the repeats."""
    requests = [each for each in scale(trace, case.rate) if each.arrival_s <= case.duration_s]
    cpu, wall = [], []
    for _ in range(repeats):
        simulator = Simulator(deployment(case), requests)
        cpu_began, wall_began = time.process_time(), time.perf_counter()
        result = simulator.run()
        cpu.append(time.process_time() - cpu_began)
        wall.append(time.perf_counter() - wall_began)
    failed = sum(each.failure is not None for each in result.requests)
    kinds = {(each.failure, each.detail) for each in result.requests if each.failure}
    assert not failed, f"{failed} requests failed: {sorted(kinds)[:3]}"
    tokens = sum(each.output_tokens for each in result.requests)
    return {
        "requests": len(requests),
        "simulated_s": result.end_s,
        "cpu_s": statistics.median(cpu),
        "wall_s": statistics.median(wall),
        "times_real": result.end_s / statistics.median(cpu),
        "times_real_wall": result.end_s / statistics.median(wall),
        "cpu_us_per_request": 1e6 * statistics.median(cpu) / len(requests),
        "cpu_us_per_token": 1e6 * statistics.median(cpu) / tokens,
        "utilisation": statistics.mean(each.utilisation for each in result.workers),
        "seqs_per_step": statistics.mean(each.mean_seqs for each in result.workers),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA, metavar="DIR", help=f"with {TRACE}")
    names = [case.name for case in CASES]
    parser.add_argument("--case", action="append", choices=names, help="default: all")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    trace = read_trace(args.data / TRACE).requests
    rows = []
    show: Callable[..., None] = print
    show(f"{'case':<22}{'target':>8}{'CPU':>8}{'wall':>8}{'µs/req':>9}{'busy':>7}{'seqs':>7}")
    for case in CASES:
        if args.case and case.name not in args.case:
            continue
        row = measure(case, trace, args.repeats)
        rows.append({"case": case.name, "target": case.target, **row})
        target = "-" if case.target is None else f">={case.target:g}"
        show(
            f"{case.name:<22}{target:>8}{row['times_real']:>8.4g}{row['times_real_wall']:>8.4g}"
            f"{row['cpu_us_per_request']:>9.0f}{row['utilisation']:>7.0%}"
            f"{row['seqs_per_step']:>7.3g}",
            flush=True,
        )
    show("simulated seconds a second, medians; busy and seqs are those of the simulated workers")
    if args.json:
        args.json.write_bytes(msgspec.json.format(msgspec.json.encode(rows)) + b"\n")
    missed = [row for row in rows if row["target"] and row["times_real"] < row["target"]]
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
