"""Simulate many seeds: python -m sim.run --seeds 100000 [--first 0] [--processes 2] | --seed N.

Prints the first failures, each with the seed that brings it back, and what was covered.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections import Counter
from collections.abc import Iterable

from sim.cluster import simulate

MAX_SHOWN = 10
Outcome = tuple[Counter[str], str | None]


def one(seed: int) -> Outcome:
    """Every fourth history is without faults."""
    try:
        return (simulate(seed) if seed % 4 else simulate(seed, faults=())), None
    except AssertionError as error:
        return Counter(), str(error)


def many(seeds: Iterable[int], processes: int) -> tuple[Counter[str], list[str]]:
    """Totals over all seeds, and the failures."""
    totals: Counter[str] = Counter()
    failures = []
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for counters, failure in pool.imap_unordered(one, seeds, chunksize=50):
            totals.update(counters)
            if failure is not None:
                failures.append(failure)
    return totals, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, help="this one alone, with its traceback")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    if args.seed is not None:
        print(dict(simulate(args.seed) if args.seed % 4 else simulate(args.seed, faults=())))
        return 0
    totals, failures = many(range(args.first, args.first + args.seeds), args.processes)
    for failure in failures[:MAX_SHOWN]:
        print(failure)
    print(f"{args.seeds} seeds, {len(failures)} failures")
    for name, count in sorted(totals.items()):
        print(f"  {name}: {count}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
