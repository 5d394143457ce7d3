"""DistServe's results, from its own fitted step times: goodput over vLLM, its simulator's run, and
its table of simulated against real attainment.

    python bench/reproduce/distserve.py [--data data] [--seeds 4]

Goodput is the highest rate per GPU (Poisson arrivals) at which 90 % of the requests meet both
objectives. As many requests are sent as the paper's runs sent, which at these rates is half a
minute to two minutes of traffic: queues do not settle, and where objectives are loose the figure
depends on that. It is the mean over `--seeds` draws.

Lengths were not published, so every figure is shown for several shapes that share the paper's means
(see `distserve_lengths`). `alone`: the share of requests that meet the objectives on an idle vLLM;
where it is near 90 % the ratio says little, and published curves have such a plateau (OPT-13B: 90 %
of 100 requests at 0.25 and at 0.5 req/s, 85 % at 1). `host`: what the serving process adds to each
step; 2 ms is the constant of the authors' simulator, 0 counts kernels alone. `vLLM pads`: should
the vLLM that was measured have padded the prompts of a batch to the longest, which some versions
did, and which the fit, on equal lengths, could not see. OPT-175B was not measured: its row scales
OPT-66B by weights per device. The table of attainments names neither model nor objectives; it is
set beside each pair that the source uses somewhere.
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
LOW, HIGH = 0.02, 12.0  # requests a second and GPU, between which goodput is sought
STEPS = 8  # of the bisection: 2.5 % wide
HOST_S = 0.002
WEIGHTS = {B66: 66e9, B175: 175e9}


class Slo(msgspec.Struct, frozen=True):
    ttft_s: float
    tpot_s: float


class Draws(msgspec.Struct, frozen=True):
    """How many runs, and of how many requests: in all, or for each GPU."""

    seeds: int
    jobs_per_gpu: int = 0
    jobs: int = 0


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
    ("OPT-13B", "ShareGPT", OPT13, 100), ("OPT-66B", "ShareGPT", OPT66, 25),
    ("OPT-175B", "ShareGPT", OPT175, 25), ("OPT-66B", "HumanEval", OPT66, 50),
    ("OPT-66B", "LongBench", OPT66, 25),
)  # fmt: skip
"""Model, workload, layouts, and how many requests were sent per GPU at each rate."""
SIMULATOR_JOBS = 300
TABLE2 = (
    ("OPT-13B 0.25/0.1 s", OPT13, Slo(0.25, 0.1)), ("OPT-13B 0.2/0.1 s", OPT13, Slo(0.2, 0.1)),
    ("OPT-66B 0.4/0.1 s", OPT66, Slo(0.4, 0.1)), ("OPT-66B 2.5/0.15 s", OPT66, Slo(2.5, 0.15)),
)  # fmt: skip


class Bench:
    """One system at one host cost: what share of the requests meets both objectives."""

    def __init__(
        self, data: Path, system: System, host_s: float = HOST_S, pads: bool = False
    ) -> None:
        model, self.system = system.measured or system.model, system
        self._pads = pads
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
        self, split: bool, lengths: Sequence[Lengths], per_s: float, slo: Slo, seed: int
    ) -> float:
        """At so many requests a second for the whole system."""
        jobs = poisson_jobs(lengths, per_s, seed)
        if split:
            system = self.system
            serve_split(
                self._prompt, system.prompt.pp, self._decode, system.decode.pp, self._capacity,
                self._kv_bytes, jobs,
            )  # fmt: skip
        else:
            serve_together(self._vllm, self._vllm_capacity, jobs, self._pads)
        return sum(_meets(job, slo) for job in jobs) / len(jobs)

    def mean(
        self, split: bool, lengths: Sequence[Lengths], per_gpu: float, slo: Slo, draws: Draws
    ) -> float:
        """Mean attainment over `draws.seeds` runs, each with its own part of the lengths."""
        devices = self.system.num_devices if split else self.system.vllm.num_devices
        count = draws.jobs or draws.jobs_per_gpu * devices
        shares = []
        for seed in range(draws.seeds):
            start = seed * count % len(lengths)
            part = [*lengths[start:], *lengths[:start]][:count]
            shares.append(self.attainment(split, part, per_gpu * devices, slo, seed))
        return sum(shares) / len(shares)

    def goodput(self, split: bool, lengths: Sequence[Lengths], slo: Slo, draws: Draws) -> float:
        """Requests a second and GPU; 0 if there is no rate."""
        return highest(
            lambda rate: self.mean(split, lengths, rate, slo, draws) >= ATTAINMENT, LOW, HIGH, STEPS
        )


def _work(system: System, parallel: Parallel, tp: int) -> float:
    """Weights on a device beside those of the measured model at that degree."""
    if not system.measured:
        return 1.0
    here = WEIGHTS[system.model] / parallel.num_devices
    return here / (WEIGHTS[system.measured] / tp) * parallel.pp


def _meets(job: Job, slo: Slo) -> bool:
    return job.ttft_s <= slo.ttft_s and job.tpot_s <= slo.tpot_s


def goodputs(data: Path, seeds: int) -> list[Line]:
    """Ratios over vLLM and, for the usual shape of lengths, the two rates that they are of."""
    published = {
        (row["model"], row["dataset"]): row
        for row in read_rows(data / "published" / "distserve_goodput_90pct.csv")
    }
    lines = []
    for name, workload, system, jobs_per_gpu in WORKLOADS:
        row, draws = published[name, workload], Draws(seeds, jobs_per_gpu)
        slo = Slo(float(row["ttft_slo_s"]), float(row["tpot_slo_s"]))
        shapes = _lengths(data, workload)
        usual = next(iter(shapes))
        variants = [(shape, "", Bench(data, system)) for shape in shapes]
        variants.append((usual, ", host 0", Bench(data, system, host_s=0.0)))
        variants.append((usual, ", vLLM pads", Bench(data, system, pads=True)))
        for shape, variant, bench in variants:
            lengths = shapes[shape]
            split, vllm = (bench.goodput(each, lengths, slo, draws) for each in (True, False))
            alone = bench.mean(False, lengths, LOW, slo, draws)
            case = f"{name} {workload}, {shape}{variant}"
            note = f"{split:.2f} / {vllm:.2f} req/s/GPU; vLLM alone {alone:.0%}"
            ratio = split / vllm if vllm else None
            lines.append(
                Line(case, "goodput / vLLM", float(row["x_vs_vllm"]), ratio, "×", note=note)
            )
            if (shape, variant) == (usual, ""):
                for who, rate in (("distserve", split), ("vllm", vllm)):
                    theirs = float(row[f"{who}_req_s_gpu"])
                    lines.append(Line(case, f"goodput of {who}", theirs, rate, "req/s/GPU"))
    return lines


def order(lines: Sequence[Line]) -> str:
    """The workloads by their ratio at the usual shape, published and ours."""
    usual = [line for line in lines if line.case.endswith(", log-normal") and line.unit == "×"]
    names = {id(line): line.case.removesuffix(", log-normal") for line in usual}
    theirs = sorted(usual, key=lambda line: -(line.published or 0))
    ours = sorted(usual, key=lambda line: -(line.ours or float("inf")))
    return (
        f"\nOrder, published: {' > '.join(names[id(line)] for line in theirs)}"
        f"\nOrder, ours:      {' > '.join(names[id(line)] for line in ours)}\n"
    )


def _lengths(data: Path, workload: str) -> dict[str, list[Lengths]]:
    """By name; for ShareGPT also another selection of it that is published."""
    shapes = {shape: drawn(workload, shape, 2000, seed=11) for shape in SHAPES[workload]}
    if workload == "ShareGPT":
        rows = read_rows(data / "traces" / "lengths" / "sharegpt_8k_llama2_lengths.csv.gz")
        pairs = [(int(row["num_prefill_tokens"]), int(row["num_decode_tokens"])) for row in rows]
        found = fitting(pairs)
        shapes["another ShareGPT, ≤ 2,048"] = found[:: max(1, len(found) // 2000)]
    return shapes


def simulator_run(data: Path, seeds: int) -> list[Line]:
    """OPT-13B, 200/100 ms, at most four GPUs: the best layout's rate a GPU, and which it is."""
    layouts = [(p, d) for p in (1, 2, 4) for d in (1, 2, 4) if p + d <= 4]
    lines = []
    for shape, lengths in _lengths(data, "ShareGPT").items():
        rates = {}
        for p, d in layouts:
            bench = Bench(data, System(B13, Parallel(p), Parallel(d), Parallel(1)))
            draws = Draws(seeds, jobs=SIMULATOR_JOBS)
            rates[p, d] = bench.goodput(True, lengths, Slo(0.2, 0.1), draws)
        best = max(rates, key=lambda each: rates[each])
        note = f"tp {best[0]} + {best[1]} (published 2 + 1); here 2 + 1 has {rates[2, 1]:.2f}"
        case = f"OPT-13B 200/100 ms, {shape}"
        lines.append(Line(case, "best rate", 1.56, rates[best], "req/s/GPU", note=note))
    return lines


def attainments(data: Path, seeds: int) -> list[Line]:
    """The table of attainments, beside every pair of model and objectives it may be of."""
    rows = list(read_rows(data / "published" / "distserve_table2_sim_vs_real.csv"))
    lengths = _lengths(data, "ShareGPT")["log-normal"]
    draws = Draws(seeds, jobs=SIMULATOR_JOBS)
    lines = []
    for name, system, slo in TABLE2:
        bench = Bench(data, system)
        for per_gpu in (True, False):
            for split, column in ((True, "distserve_low_real_pct"), (False, "vllm_real_pct")):
                devices = system.num_devices if split else system.vllm.num_devices
                errors, shown = [], []
                for row in rows:
                    rate = float(row["rate_req_s"]) / (1 if per_gpu else devices)
                    ours = 100 * bench.mean(split, lengths, rate, slo, draws)
                    errors.append(abs(ours - float(row[column])))
                    shown.append(f"{ours:.0f}/{float(row[column]):.0f}")
                who, which = "DistServe" if split else "vLLM", "a GPU" if per_gpu else "in all"
                note = "ours/real % at 1…4 req/s: " + " ".join(shown)
                error = sum(errors) / len(errors)
                case = f"{name}, rates {which}, {who}"
                lines.append(Line(case, "mean error, points", None, error, note=note))
    return lines


def main(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    ratios = goodputs(args.data, args.seeds)
    best = simulator_run(args.data, args.seeds)
    shares = attainments(args.data, args.seeds)
    text = table("DistServe: goodput over vLLM (90 % attainment of both objectives)", ratios)
    text += order(ratios)
    text += table("DistServe's simulator: OPT-13B on at most four GPUs", best)
    text += table("DistServe's table of attainments: which configuration it is of", shares)
    figures = {
        "goodput": as_json(ratios), "simulator": as_json(best), "attainments": as_json(shares),
        "seeds": args.seeds,
    }  # fmt: skip
    return text, figures


if __name__ == "__main__":
    sys.exit(
        run(
            __doc__, ROOT / "data", "reproduce-distserve.json", main,
            lambda parser: parser.add_argument(
                "--seeds", type=int, default=4, help="runs of each case"
            ),
        )
    )  # fmt: skip
