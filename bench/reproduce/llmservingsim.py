"""Real vLLM runs, request by request, predicted from kernels that were measured one by one.

    python bench/reproduce/llmservingsim.py [--data data/llmservingsim] [--run NAME]

What goes in: arrivals and lengths, the limits that the engine was started with, the kernel tables
of the same device, and for several devices the link that the source's own configuration names.
What comes out is set beside the times that vLLM measured, and beside the errors of the simulator
that the data were published with. `runs.json` in the data's folder says which files belong
together; other data of that form can be given with --data.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

import msgspec

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from baton.twin.workload import TraceRequest
from reproduce.engine_loop import Outcome, serve
from reproduce.kernels import LinkOf, Served, StepKernels
from reproduce.report import ROOT, Line, as_json, run, table
from reproduce.tables import read_rows
from reproduce.vllm_v1 import VllmLimits, VllmScheduler

DEPTH = 2  # vLLM 0.19 plans a step while the one before it runs
TARGETS = {"ttft_s": 0.15, "tpot_s": 0.05, "e2e_s": 0.05}


class Run(msgspec.Struct, frozen=True):
    """One entry of `runs.json`."""

    requests: str
    kernels: str
    model: Served
    max_num_seqs: int
    max_num_batched_tokens: int
    num_blocks: int
    usual_skew: float | None = None
    link: LinkOf = LinkOf(1.0, 0.0)

    @property
    def limits(self) -> VllmLimits:
        return VllmLimits(self.max_num_seqs, self.max_num_batched_tokens, self.num_blocks)


def read_runs(data: Path) -> dict[str, Run]:
    return msgspec.json.decode((data / "runs.json").read_bytes(), type=dict[str, Run])


def read_arrivals(path: Path) -> list[TraceRequest]:
    """What was sent and when: nothing that was measured."""
    return [
        TraceRequest(
            max(0.0, float(row["arrival_s"])), int(row["input_toks"]), int(row["output_toks"])
        )
        for row in read_rows(path)
    ]


def read_measured(path: Path) -> list[Outcome]:
    """What vLLM measured, for comparison."""
    arrivals = read_arrivals(path)
    rows = read_rows(path)
    return [
        Outcome(arrival, float(row["first_token_s"]), float(row["last_token_s"]))
        for arrival, row in zip(arrivals, rows, strict=True)
    ]


def predict(data: Path, each: Run) -> tuple[list[Outcome], int]:
    """Every request's times, and how often one was preempted."""
    engines = [VllmScheduler(each.limits) for _ in range(max(1, each.model.expert_ranks))]
    outcomes = serve(
        engines, _kernels(data, each).step_s, read_arrivals(data / each.requests), DEPTH
    )
    return outcomes, sum(engine.num_preemptions for engine in engines)


def _kernels(data: Path, each: Run) -> StepKernels:
    graph = min(512, 2 * each.max_num_seqs)  # vLLM's default
    return StepKernels(
        each.model, data / "profile", each.kernels, each.link, graph, each.usual_skew
    )


def read_simulator_errors(data: Path) -> dict[tuple[str, str], str]:
    """By run and metric: what the source's own simulator was off by."""
    path = data / "simulator_errors.csv"
    rows = read_rows(path) if path.exists() else ()
    return {
        (row["run"], row["metric"]): f"its own simulator {float(row['error']):+.1%}" for row in rows
    }


def compare(
    name: str,
    each: Run,
    ours: list[Outcome],
    measured: list[Outcome],
    theirs_too: dict[tuple[str, str], str],
) -> list[Line]:
    """Means with their targets (dense models), medians and 90th percentiles without."""
    lines = []
    for metric, target in TARGETS.items():
        theirs = [getattr(outcome, metric) for outcome in measured]
        values = [getattr(outcome, metric) for outcome in ours]
        for what, of in (("mean", mean), ("p50", median), ("p90", _p90)):
            goal = target if what == "mean" and not each.model.experts else None
            unit, scale = ("ms", 1e3) if metric == "tpot_s" else ("s", 1.0)
            label = f"{what} {metric[:-2].upper()}"
            note = theirs_too.get((name, metric), "") if what == "mean" else ""
            figures = scale * of(theirs), scale * of(values)
            lines.append(Line(name, label, *figures, unit, goal, note))
    return lines


def grid_error(data: Path, each: Run) -> tuple[int, float, float]:
    """Attention at measured points that lie off the grid in use: how many, median error, p90."""
    attention = _kernels(data, each).attention
    errors = [
        abs(attention(*point) / us - 1)
        for point, us in attention.points.items()
        if not attention.is_on_grid(point)
    ]
    return (len(errors), median(errors), _p90(errors)) if len(errors) > 1 else (0, 0.0, 0.0)


def main(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    runs = read_runs(args.data)
    chosen = {name: each for name, each in runs.items() if args.run in (None, name)}
    if not chosen:
        raise SystemExit(f"no run is called {args.run}: choose one of {', '.join(runs)}")
    lines: list[Line] = []
    text, notes = "", {}
    for name, each in chosen.items():
        ours, num_preemptions = predict(args.data, each)
        measured = read_measured(args.data / each.requests)
        lines += compare(name, each, ours, measured, read_simulator_errors(args.data))
        num_points, middle, p90 = grid_error(args.data, each)
        notes[name] = {
            "preemptions": num_preemptions,
            "attention_off_grid": {"n": num_points, "median": middle, "p90": p90},
        }
        text += f"\n{name}: {num_preemptions} preemptions"
        if num_points:
            text += f"; attention off the grid: n {num_points}, median {middle:.1%}, p90 {p90:.1%}"
    text = table("vLLM 0.19 runs, predicted from kernel profiles", lines) + text + "\n"
    return text, {"lines": as_json(lines), "runs": notes}


def _p90(values: list[float]) -> float:
    return quantiles(values, n=10)[8]


if __name__ == "__main__":
    sys.exit(
        run(
            __doc__, ROOT / "data" / "llmservingsim", "reproduce-llmservingsim.json", main,
            lambda parser: parser.add_argument("--run", help="only this one"),
        )
    )  # fmt: skip
