"""Splitwise's cluster designs at equal power and at equal cost, on the Azure traces' lengths.

    python bench/reproduce/splitwise.py [--data data] [--seconds 120]

A design's throughput is the highest rate (Poisson arrivals) at which nine slow-downs hold, against
the same request alone on a DGX-A100: TTFT 2, 3 and 6 times at P50, P90 and P99; TBT and E2E 1.25,
1.5 and 5 times. Every design is searched under both readings of the decode measurements (see
`splitwise_cost`): `batch_tokens` is what the published figures were made with, `sequences` is what
the measurements say. The difference between the two is the explanation of most that differs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, get_args

import msgspec
import numpy as np

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reproduce.queues import Job, Lengths, highest, poisson_jobs
from reproduce.report import ROOT, Line, as_json, run, table
from reproduce.splitwise_cluster import Kind, serve_split, serve_together
from reproduce.splitwise_cost import MachineTimes, Reading
from reproduce.tables import read_rows

MODEL, DEVICES = "llama2-70b", 8
TRANSFER_S = {"a100-80gb": 0.008, "h100-80gb": 0.005, "h100-80gb-pcap": 0.005}
SLOWDOWNS = {"ttft_s": (2, 3, 6), "tpot_s": (1.25, 1.5, 5), "e2e_s": (1.25, 1.5, 5)}
PERCENTILES = (50, 90, 99)
STEPS = 7  # of the bisection between 5 and 400 requests a second: 3.5 % wide
POWER = {"a100-80gb": 24.8, "h100-80gb": 44.0, "h100-80gb-pcap": 0.7 * 44.0}
COST = {"a100-80gb": 17.6, "h100-80gb": 38.0, "h100-80gb-pcap": 38.0}
A, H, C = "a100-80gb", "h100-80gb", "h100-80gb-pcap"


class Design(msgspec.Struct, frozen=True):
    """Machines by kind. Without token machines, every machine does both."""

    name: str
    prompt: tuple[str, int]
    token: tuple[str, int] | None = None

    def total(self, of: dict[str, float]) -> float:
        groups = [self.prompt] + ([self.token] if self.token else [])
        return sum(number * of[kind] for kind, number in groups)


BASE_A70, BASE_A86, BASE_H40 = (
    Design("Baseline-A100", (A, 70)), Design("Baseline-A100", (A, 86)),
    Design("Baseline-H100", (H, 40)),
)  # fmt: skip
STUDIES = {
    "equal power, conv": [
        BASE_A70, BASE_H40, Design("Splitwise-AA", (A, 45), (A, 25)),
        Design("Splitwise-HH", (H, 25), (H, 15)), Design("Splitwise-HA", (H, 25), (A, 26)),
        Design("Splitwise-HHcap", (H, 25), (C, 21)),
    ],
    "equal power, code": [
        BASE_A70, BASE_H40, Design("Splitwise-AA", (A, 55), (A, 15)),
        Design("Splitwise-HH", (H, 35), (H, 5)),
    ],
    "equal cost, conv": [
        BASE_A86, BASE_H40, Design("Splitwise-AA", (A, 51), (A, 35)),
        Design("Splitwise-HH", (H, 25), (H, 15)), Design("Splitwise-HA", (H, 30), (A, 21)),
        Design("Splitwise-HHcap", (H, 30), (C, 10)),
    ],
}  # fmt: skip
PUBLISHED = (
    ("equal power, conv", "Splitwise-AA", "Baseline-A100", 2.15, "section 6.2"),
    ("equal power, conv", "Splitwise-HA", "Baseline-A100", 1.18, "at 10 % lower cost"),
    ("equal cost, conv", "Splitwise-AA", "Baseline-H100", 1.4, "+25 % power, 2 × the space"),
)
"""Study, design, baseline, ratio of their throughputs: from the paper."""


class Cluster:
    """The measurements under one reading, and what the objectives are relative to."""

    def __init__(self, data: Path, how: Reading) -> None:
        path = data / "splitwise" / "perf_model.csv.gz"
        self._kinds = {
            kind: Kind(MachineTimes(path, MODEL, kind, DEVICES, how), transfer_s)
            for kind, transfer_s in TRANSFER_S.items()
        }

    def serve(self, design: Design, jobs: Sequence[Job]) -> None:
        prompt = [self._kinds[design.prompt[0]]] * design.prompt[1]
        if design.token is None:
            serve_together(prompt, jobs)
        else:
            serve_split(prompt, [self._kinds[design.token[0]]] * design.token[1], jobs)

    def slowdowns(self, jobs: Sequence[Job]) -> dict[str, list[float]]:
        """P50, P90 and P99 of each metric, relative to the request alone on a DGX-A100."""
        times = self._kinds[A].times
        ratios: dict[str, list[float]] = {metric: [] for metric in SLOWDOWNS}
        for job in jobs:
            ttft = times.prompt_s(job.num_prompt)
            gap = times.decode_s(1, job.num_prompt + job.num_output // 2)
            ratios["ttft_s"].append(job.ttft_s / ttft)
            ratios["e2e_s"].append(job.e2e_s / (ttft + gap * (job.num_output - 1)))
            if job.num_output > 1:
                ratios["tpot_s"].append(job.tpot_s / gap)
        return {
            metric: [float(np.percentile(values, p)) for p in PERCENTILES]
            for metric, values in ratios.items()
        }

    def throughput(self, design: Design, lengths: Sequence[Lengths], seconds: float) -> float:
        """Requests a second at which all objectives hold."""

        def holds(per_s: float) -> bool:
            draw = Random(7)
            jobs = poisson_jobs(draw.choices(lengths, k=int(per_s * seconds)), per_s, 1)
            self.serve(design, jobs)
            return all(
                value <= limit
                for metric, values in self.slowdowns(jobs).items()
                for value, limit in zip(values, SLOWDOWNS[metric], strict=True)
            )

        return highest(holds, 5.0, 400.0, STEPS)


def read_lengths(path: Path) -> list[Lengths]:
    """Lengths of an Azure trace; prompt and answer stay together."""
    return [
        (int(row["ContextTokens"]), max(1, int(row["GeneratedTokens"]))) for row in read_rows(path)
    ]


def compare(found: dict[str, dict[str, float]], how: str) -> list[Line]:
    return [
        Line(
            f"{study} ({how})", f"{design} / {baseline}", ratio,
            found[study][design] / max(found[study][baseline], 1e-9), "×", 0.10, note,
        )
        for study, design, baseline, ratio, note in PUBLISHED
        if study in found
    ]  # fmt: skip


def main(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    traces = {
        kind: read_lengths(
            args.data / "traces" / "azure2023" / f"AzureLLMInferenceTrace_{kind}.csv.gz"
        )
        for kind in ("conv", "code")
    }
    text, figures = "", {}
    lines: list[Line] = []
    for how in get_args(Reading):
        cluster = Cluster(args.data, how)
        found: dict[str, dict[str, float]] = {}
        for study, designs in STUDIES.items():
            lengths = traces[study.rsplit(" ", 1)[1]]
            found[study] = {
                design.name: cluster.throughput(design, lengths, args.seconds)
                for design in designs
            }
            text += _designs(f"{study}, decode read by {how}", designs, found[study])
        lines += compare(found, how)
        figures[how] = found
    text += table("Splitwise: ratios of throughput", lines)
    return text, {"throughput": figures, "lines": as_json(lines), "seconds": args.seconds}


def _designs(title: str, designs: Sequence[Design], found: dict[str, float]) -> str:
    rows = [f"\n### {title}\n", "| design | req/s | power | $/h | req/s per $/h |"]
    rows.append("|---|---:|---:|---:|---:|")
    for design in sorted(designs, key=lambda each: -found[each.name]):
        per_s, cost = found[design.name], design.total(COST)
        rows.append(
            f"| {design.name} | {per_s:.1f} | {design.total(POWER):,.0f} | {cost:,.0f} "
            f"| {per_s / cost:.4f} |"
        )
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.exit(
        run(
            __doc__, ROOT / "data", "reproduce-splitwise.json", main,
            lambda parser: parser.add_argument(
                "--seconds", type=float, default=120.0, help="of arrivals in each simulation"
            ) and None,
        )
    )  # fmt: skip
