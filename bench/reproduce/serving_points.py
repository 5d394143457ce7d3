"""Measured serving points, predicted by a cost model that was fitted to other configurations.

    python bench/reproduce/serving_points.py [--data DIR] [--salt TEXT] [--rows] [--json FILE]

DIR holds `silicon_e2e.csv.gz`. A configuration is every column but lengths, batch, concurrency,
label, date and answers; a hash of it says on which side of the split all its rows are, so the fit
has seen no row of what is predicted here. Dense aggregated points, experts and split deployments
are fitted and reported apart.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from baton.planner.calibrate import hash_fraction, held_out
from baton.planner.serving import ServingFit, ServingPoint, read_points

DATA = Path(__file__).parents[2] / "data" / "aiconfigurator"
MAX_TPOT_ERROR, MIN_ORDER, MIN_DIFFERENCE = 0.10, 0.90, 0.15

Predicted = list[tuple[ServingPoint, float, float]]
"""A point of the test half, with predicted TTFT (0: none) and TPOT."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--salt", default="", help="of the hash that splits configurations")
    parser.add_argument("--salts", type=int, default=0, help="repeat with so many other splits")
    parser.add_argument("--only-dense", action="store_true", help="leave out what takes minutes")
    parser.add_argument("--rows", action="store_true", help="print every point")
    parser.add_argument("--json", type=Path, help="write all figures to FILE")
    args = parser.parse_args()
    points = read_points(args.data / "silicon_e2e.csv.gz")
    kinds = {
        "dense, aggregated": [p for p in points if not p.model.is_moe and not p.split],
        "experts, aggregated": [p for p in points if p.model.is_moe and not p.split],
        "split (all models)": [p for p in points if p.split],
    }
    figures = {}
    if args.only_dense:
        kinds = dict(list(kinds.items())[:1])
    for kind, members in kinds.items():
        started = time.monotonic()
        found = predict_half(members, args.salt)
        print(f"\n## {kind}: {len(members)} points, {len(found)} held out, ", end="")
        print(f"fitted in {time.monotonic() - started:.0f} s\n")
        figures[kind] = report(kind, found, args.rows)
    for number in range(args.salts):
        found = predict_half(kinds["dense, aggregated"], f"salt {number}")
        error = float(np.median([abs(ours / p.tpot_s - 1) for p, _, ours in found]))
        same, _ = order(found, same_concurrency=True)
        print(
            f"another split ({number}): n {len(found)}, TPOT median {error:.1%}, order {same:.1%}"
        )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    dense = figures["dense, aggregated"]
    good = dense["tpot_median"] <= MAX_TPOT_ERROR and dense["order"] >= MIN_ORDER
    return 0 if good else 1


def predict_half(points: Sequence[ServingPoint], salt: str) -> Predicted:
    """Fit one half of the configurations, predict the other."""
    train = [p for p in points if hash_fraction((salt, p.configuration)) < 0.5]
    test = [p for p in points if hash_fraction((salt, p.configuration)) >= 0.5]
    fit = ServingFit(train)
    return [(point, *fit.predict(point)) for point in test]


def report(kind: str, found: Predicted, rows: bool) -> dict[str, float]:
    if rows:
        print("| model, engine, device, ranks, in/out, batch | published TPOT ms | ours | error |")
        print("|---|---:|---:|---:|")
        for p, _, ours in found:
            where = f"{p.model.name} {p.model.weight_bytes:g}B, {p.engine}, {p.device}"
            load = f"{p.load.num_prompt_tokens}/{p.load.num_output_tokens}, {p.load.concurrency:g}"
            print(f"| {where}, {p.num_devices}, {load} | {_row(p.tpot_s, ours)} |")
        print()
    families = defaultdict(list)
    for p, _, ours in found:
        families[f"{p.model.name} {p.model.weight_bytes:g} B, {p.engine}, {p.device}"].append(
            (p.tpot_s, ours)
        )
    print("| family | n | published TPOT ms (median) | ours | bias | median error |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, pairs in sorted(families.items()):
        published, ours = np.array(pairs).T
        errors = ours / published - 1
        middle = f"{1e3 * np.median(published):.2f} | {1e3 * np.median(ours):.2f}"
        figures = f"{np.median(errors):+.1%} | {np.median(np.abs(errors)):.1%}"
        print(f"| {name} | {len(pairs)} | {middle} | {figures} |")
    error = held_out("tpot", [p.tpot_s / ours for p, _, ours in found])
    relative = np.array([abs(ours / p.tpot_s - 1) for p, _, ours in found])
    figures = {
        "n": len(found),
        "tpot_median": float(np.median(relative)),
        "tpot_p90": float(np.quantile(relative, 0.9)),
    }
    print(f"\nTPOT, n {error.num_points}: median error {figures['tpot_median']:.1%}, ", end="")
    print(f"p90 {figures['tpot_p90']:.1%}" + (" (target 10 %)" if kind.startswith("dense") else ""))
    timed = [(p.ttft_s, ours) for p, ours, _ in found if ours and p.ttft_s]
    if timed:
        published, ours = np.array(timed).T
        figures["ttft_median"] = float(np.median(np.abs(ours / published - 1)))
        print(f"TTFT, n {len(timed)}: median error {figures['ttft_median']:.1%}")
        for same, name in ((True, "order"), (False, "order_any_concurrency")):
            share, num_pairs = order(found, same)
            figures[name], figures[name + "_pairs"] = share, num_pairs
            print(
                f"{name.replace('_', ' ')} of output tokens/s/GPU, {num_pairs} pairs that ", end=""
            )
            print(f"differ by more than {MIN_DIFFERENCE:.0%}: {share:.1%} right")
    return figures


def order(found: Predicted, same_concurrency: bool) -> tuple[float, int]:
    """Share of pairs whose order by output tokens/s/GPU is right, and the number of pairs.

    Pairs have the same model and lengths, and the same concurrency unless told otherwise.
    """
    worlds = defaultdict(list)
    for p, ttft_s, tpot_s in found:
        if not p.ttft_s:
            continue
        load = (p.load.num_prompt_tokens, p.load.num_output_tokens)
        key = (p.model.name, *load, p.load.concurrency if same_concurrency else 0)
        published = p.tokens_per_device_s(p.ttft_s, p.tpot_s)
        worlds[key].append((p.configuration, published, p.tokens_per_device_s(ttft_s, tpot_s)))
    right = num_pairs = 0
    for members in worlds.values():
        for (one, a, ours_a), (other, b, ours_b) in combinations(members, 2):
            if one == other or max(a, b) / min(a, b) <= 1 + MIN_DIFFERENCE:
                continue
            num_pairs += 1
            right += (a > b) == (ours_a > ours_b)
    return right / max(num_pairs, 1), num_pairs


def _row(published: float, ours: float) -> str:
    return f"{1e3 * published:.2f} | {1e3 * ours:.2f} | {ours / published - 1:+.1%}"


if __name__ == "__main__":
    raise SystemExit(main())
