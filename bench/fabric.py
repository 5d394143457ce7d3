"""What the KV fabric costs: each way that blocks travel, beside a plain copy of the same blocks.

    python bench/fabric.py [--parts shm,export,...] [--rounds 9] [--json FILE]

One run; ratios are of cases that take turns within each round, and medians over the rounds. A part
whose module or dependency is not here is named, with the reason, and the others go on. Nothing
else should run meanwhile: the load is printed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
from parts.fabric import Missing, Row

MIN_ROUNDS = 7


def _part(name: str) -> Callable[[int], list[Row]]:
    """The part's `measure`; its module is imported when it is run, for it may not be there."""
    return lambda rounds: importlib.import_module(f"parts.fabric.{name}").measure(rounds)


PARTS: dict[str, Callable[[int], list[Row]]] = {
    "shm": _part("shm"),
    "export": _part("export"),
    "tcp": _part("tcp"),
    "nixl": _part("nixl"),
    "codec": _part("codec"),
    "overlap": _part("overlap"),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=9, help=f"at least {MIN_ROUNDS}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    args = parser.parse_args()
    parts = args.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if args.rounds < MIN_ROUNDS:
        parser.error(f"a median of fewer than {MIN_ROUNDS} rounds says nothing: raise --rounds")
    before = os.getloadavg()[0]
    measured: dict[str, list[Row]] = {}
    missing: dict[str, str] = {}
    for part in parts:
        try:
            measured[part] = PARTS[part](args.rounds)
        except (ImportError, Missing) as error:
            missing[part] = str(error)
            print(f"{part}: missing: {error}\n", flush=True)
        else:
            print(render(part, measured[part]), flush=True)
    conditions = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "rounds": args.rounds,
        "load_before_and_after": [before, os.getloadavg()[0]],
    }
    print(", ".join(f"{name} {value}" for name, value in conditions.items()))
    if args.json is not None:
        data = {"conditions": conditions, "parts": measured, "missing": missing}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_bytes(msgspec.json.format(msgspec.json.encode(data), indent=2) + b"\n")
    return 0


def render(part: str, rows: list[Row]) -> str:
    """A Markdown table."""
    lines = [f"| {part} | | unit | target | | |", "|---|---:|---|---|---|---|"]
    for row in rows:
        verdict = {True: "reached", False: "missed", None: ""}[row.reached]
        value = f"{row.value:,.0f}" if abs(row.value) >= 1000 else f"{row.value:.3g}"
        lines.append(
            f"| {row.name} | {value} | {row.unit} | {row.target} | {verdict} | {row.note} |"
        )
    return "\n".join(lines) + "\n"


def processor() -> str:
    """The processor's name, as the system tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    sys.exit(main())
