"""DistServe's results, from its own fitted step times: goodput over vLLM, its simulator's run, and
its table of simulated against real attainment.

    python bench/reproduce/distserve.py [--data data] [--jobs 500]

Goodput is the highest rate per GPU (Poisson arrivals) at which 90 % of the requests meet both
objectives. The lengths were not published, so every figure is shown for several shapes that share
the paper's means (see `distserve_lengths`). `host`: what the serving process adds to each step;
0 counts kernels alone, 2 ms is the constant of the authors' simulator. OPT-175B was not measured:
its row scales OPT-66B by weights per device. The table of attainments names neither model nor
objectives; it is set beside each pair that the source uses somewhere.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reproduce.distserve_cluster import (
    KV_BYTES,
    Parallel,
    StepTimes,
    kv_capacity,
    serve_split,
    serve_together,
)
from reproduce.distserve_lengths import SHAPES, drawn, fitting
from reproduce.queues import Job, Lengths, highest, poisson_jobs
from reproduce.report import ROOT, Line, as_json, run, table
from reproduce.tables import read_rows

B13, B66, B175 = "facebook/opt-13b", "facebook/opt-66b", "facebook/opt-175b"
ATTAINMENT = 0.9
STEPS = 8  # of the bisection between 0.02 and 12 requests a second and GPU: 2.5 % wide
HOSTS_S = (0.0, 0.002)
WEIGHTS = {B66: 66e9, B175: 175e9}


class System(msgspec.Struct, frozen=True):
    """A model with its layouts. measured: the (model, prompt, decode, vLLM) degrees that are used.

    OPT-175B borrows OPT-66B's coefficients at a degree with about the same weights a device.
    """

    model: str
    prompt: Parallel
    decode: Parallel
    vllm: Parallel
    measured: str = ""
    measured_vllm_tp: int = 0

    @property
    def num_devices(self) -> int:
        return self.prompt.num_devices + self.decode.num_devices


OPT13 = System(B13, Parallel(2), Parallel(1), Parallel(1))
OPT66 = System(B66, Parallel(4), Parallel(2, 2), Parallel(4))
OPT175 = System(B175, Parallel(3, 3), Parallel(4, 3), Parallel(8), B66, 3)
WORKLOADS = (
    ("OPT-13B", "ShareGPT", OPT13), ("OPT-66B", "ShareGPT", OPT66), ("OPT-175B", "ShareGPT", OPT175),
    ("OPT-66B", "HumanEval", OPT66), ("OPT-66B", "LongBench", OPT66),
)  # fmt: skip
TABLE2 = (
    ("OPT-13B 0.25/0.1 s", OPT13, 0.25, 0.1), ("OPT-13B 0.2/0.1 s", OPT13, 0.2, 0.1),
    ("OPT-66B 0.4/0.1 s", OPT66, 0.4, 0.1), ("OPT-66B 2.5/0.15 s", OPT66, 2.5, 0.15),
)  # fmt: skip


class Bench:
    """One system at one host cost: what share of the requests meets both objectives."""

    def __init__(self, data: Path, system: System, host_s: float) -> None:
        model, self.system = system.measured or system.model, system
        vllm_tp = system.measured_vllm_tp or system.vllm.tp
        self._vllm = StepTimes(
            data, "vllm", model, vllm_tp, host_s, _work(system, system.vllm, vllm_tp)
        )
        self._prompt, self._decode = (
            StepTimes(data, "distserve", model, of.tp, host_s, _work(system, of, of.tp))
            for of in (system.prompt, system.decode)
        )
        self._vllm_capacity = kv_capacity(data, system.model, system.vllm)
        self._capacity = kv_capacity(data, system.model, system.decode)
        self._kv_bytes = KV_BYTES[model] * WEIGHTS.get(system.model, 1) / WEIGHTS.get(model, 1)

    def attainment(
        self, split: bool, lengths: Sequence[Lengths], per_s: float, ttft_s: float, tpot_s: float
    ) -> float:
        """At so many requests a second for the whole system."""
        jobs = poisson_jobs(lengths, per_s, seed=3)
        if split:
            system = self.system
            serve_split(
                self._prompt, system.prompt.pp, self._decode, system.decode.pp, self._capacity,
                self._kv_bytes, jobs,
            )  # fmt: skip
        else:
            serve_together(self._vllm, self._vllm_capacity, jobs)
        return sum(_meets(job, ttft_s, tpot_s) for job in jobs) / len(jobs)

    def goodput(
        self, split: bool, lengths: Sequence[Lengths], ttft_s: float, tpot_s: float
    ) -> float:
        """Requests a second and GPU."""
        devices = self.system.num_devices if split else self.system.vllm.num_devices
        return highest(
            lambda each: self.attainment(split, lengths, each * devices, ttft_s, tpot_s)
            >= ATTAINMENT,
            0.02, 12.0, STEPS,
        )  # fmt: skip


def _work(system: System, parallel: Parallel, tp: int) -> float:
    """Weights on a device beside those of the measured model at that degree."""
    if not system.measured:
        return 1.0
    here = WEIGHTS[system.model] / parallel.num_devices
    return here / (WEIGHTS[system.measured] / tp) * parallel.pp


def _meets(job: Job, ttft_s: float, tpot_s: float) -> bool:
    return job.ttft_s <= ttft_s and job.tpot_s <= tpot_s


def goodputs(data: Path, num_jobs: int) -> list[Line]:
    """Ratios over vLLM and rates, for each workload, shape of lengths and host cost."""
    published = {
        (row["model"], row["dataset"]): row
        for row in read_rows(data / "published" / "distserve_goodput_90pct.csv")
    }
    lines = []
    for name, workload, system in WORKLOADS:
        row = published[name, workload]
        slo = float(row["ttft_slo_s"]), float(row["tpot_slo_s"])
        for shape, lengths in _lengths(data, workload, num_jobs).items():
            for host_s in HOSTS_S:
                bench = Bench(data, system, host_s)
                split, vllm = (bench.goodput(each, lengths, *slo) for each in (True, False))
                case = f"{name} {workload}, {shape}, host {1000 * host_s:.0f} ms"
                ratio = split / vllm if vllm else float("inf")
                rates = f"{split:.2f} against {vllm:.2f} req/s/GPU; published "
                rates += f"{row['distserve_req_s_gpu']} against {row['vllm_req_s_gpu']}"
                lines.append(
                    Line(case, "goodput / vLLM", float(row["x_vs_vllm"]), ratio, "×", note=rates)
                )
    return lines


def _lengths(data: Path, workload: str, count: int) -> dict[str, list[Lengths]]:
    """By name; for ShareGPT also another selection of it that is published."""
    shapes = {shape: drawn(workload, shape, count, seed=11) for shape in SHAPES[workload]}
    if workload == "ShareGPT":
        rows = read_rows(data / "traces" / "lengths" / "sharegpt_8k_llama2_lengths.csv.gz")
        pairs = [(int(row["num_prefill_tokens"]), int(row["num_decode_tokens"])) for row in rows]
        found = fitting(pairs)
        shapes["another ShareGPT, ≤ 2,048"] = found[:: max(1, len(found) // count)][:count]
    return shapes


def simulator_run(data: Path, num_jobs: int) -> list[Line]:
    """OPT-13B, 200/100 ms, at most four GPUs: the best layout's rate a GPU, and which it is."""
    layouts = [(p, d) for p in (1, 2, 4) for d in (1, 2, 4) if p + d <= 4]
    lines = []
    for shape, lengths in _lengths(data, "ShareGPT", num_jobs).items():
        for host_s in HOSTS_S:
            rates = {}
            for p, d in layouts:
                bench = Bench(data, System(B13, Parallel(p), Parallel(d), Parallel(1)), host_s)
                rates[p, d] = bench.goodput(True, lengths, 0.2, 0.1)
            best = max(rates, key=lambda each: rates[each])
            lines.append(
                Line(
                    f"OPT-13B 200/100 ms, {shape}, host {1000 * host_s:.0f} ms", "best rate", 1.56,
                    rates[best], "req/s/GPU",
                    note=f"tp {best[0]} + {best[1]}; published 2 + 1, here {rates[2, 1]:.2f}",
                )
            )  # fmt: skip
    return lines


def attainments(data: Path, num_jobs: int) -> list[Line]:
    """The table of attainments, beside every pair of model and objectives it may be of."""
    rows = list(read_rows(data / "published" / "distserve_table2_sim_vs_real.csv"))
    lengths = drawn("ShareGPT", "log-normal", num_jobs, seed=11)
    lines = []
    for name, system, ttft_s, tpot_s in TABLE2:
        for per_gpu in (True, False):
            bench = Bench(data, system, HOSTS_S[1])
            for split, column in ((True, "distserve_low_real_pct"), (False, "vllm_real_pct")):
                devices = system.num_devices if split else system.vllm.num_devices
                errors, shown = [], []
                for row in rows:
                    rate = float(row["rate_req_s"]) * (devices if per_gpu else 1)
                    ours = 100 * bench.attainment(split, lengths, rate, ttft_s, tpot_s)
                    errors.append(abs(ours - float(row[column])))
                    shown.append(f"{ours:.0f}/{float(row[column]):.0f}")
                who = "DistServe" if split else "vLLM"
                which = "a GPU" if per_gpu else "in all"
                case = f"{name}, rates {which}, {who}"
                error = sum(errors) / len(errors)
                note = "ours/real % at 1…4 req/s: " + " ".join(shown)
                lines.append(Line(case, "mean error, points", None, error, note=note))
    return lines


def main(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    ratios = goodputs(args.data, args.jobs)
    best = simulator_run(args.data, args.jobs)
    shares = attainments(args.data, args.jobs)
    text = table("DistServe: goodput over vLLM (90 % attainment of both objectives)", ratios)
    text += table("DistServe's simulator: OPT-13B on at most four GPUs", best)
    text += table("DistServe's table of attainments: which configuration it is of", shares)
    figures = {
        "goodput": as_json(ratios), "simulator": as_json(best), "attainments": as_json(shares),
        "jobs": args.jobs,
    }  # fmt: skip
    return text, figures


if __name__ == "__main__":
    sys.exit(
        run(
            __doc__, ROOT / "data", "reproduce-distserve.json", main,
            lambda parser: parser.add_argument(
                "--jobs", type=int, default=500, help="requests in each simulation"
            ) and None,
        )
    )  # fmt: skip
