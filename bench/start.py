"""From `baton serve` to ready: how long it takes, and where the time goes.

    python bench/start.py [--model 0.5B] [--layouts 1U,1P1D] [--rounds 5] [--peers .peers]
                          [--json FILE]

The model, a random one of a real shape or a model directory, is read before every round, so that
its files are in the page cache; then each layout is started and ended in turns. The clock begins
before the command's process and ends when `/ready` answers 200 (asked every 10 ms). In between:

    started   the process was started: what came before is its parent's time
    imported  its first line of log: Python, torch and all other modules are loaded
    loaded    of a worker: it has its weights, packed by itself or by another one
    serving   it listens

Seconds, medians, and the range of the whole. The first start of each layout, in which Python may
compile modules, is not counted.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median

import msgspec
from parts.peers.models import prepare
from parts.peers.servers import free_ports
from parts.start import Reached, Started, start


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="0.5B", help="a shape or a model directory [0.5B]")
    parser.add_argument("--layouts", default="1U,1P1D", help="[1U,1P1D]")
    parser.add_argument("--rounds", type=int, default=5, help="[5]")
    parser.add_argument("--peers", type=Path, default=Path(".peers"), help="for models [.peers]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    args = parser.parse_args()
    model, _, _ = prepare(args.model, args.peers.resolve())
    found: list[Started] = []
    for number in range(args.rounds + 1):
        for file in model.iterdir():
            file.read_bytes()
        for layout in args.layouts.split(","):
            one = start(model, layout, *free_ports(2))
            if number > 0:
                found.append(one)
    print(render(found))
    if args.json is not None:
        args.json.write_text(json.dumps(msgspec.to_builtins(found), indent=2) + "\n")
    return 0


def render(starts: list[Started]) -> str:
    """A Markdown table: a row for each layout, and one for each of its processes."""
    columns = Reached.__struct_fields__
    lines = [
        "| layout | process | " + " | ".join((*columns, "ready (range)")) + " |",
        "|---|---" + "|---:" * (len(columns) + 1) + "|",
    ]
    for layout in dict.fromkeys(one.layout for one in starts):
        own = [one for one in starts if one.layout == layout]
        ready = sorted(one.ready_s for one in own)
        whole = f"**{median(ready):.2f}** ({ready[0]:.2f}–{ready[-1]:.2f})"
        lines.append(f"| {layout} | all |" + " |" * len(columns) + f" {whole} |")
        for name in own[0].processes:
            values = (median(getattr(o.processes[name], column) for o in own) for column in columns)
            cells = " | ".join(f"{value:.2f}" if value else "" for value in values)
            lines.append(f"| {layout} | {name} | {cells} | |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
