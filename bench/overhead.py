"""What the parts around the model cost, in CPU time: no figure here is a throughput.

    python bench/overhead.py [--part scheduler|gateway|rpc|engine|sampler]... [--json FILE]

`scheduler`: policy of one step. `gateway`: a streamed token, and a request. `rpc`: from a
submitted request to its delta. `engine`: batch and sampler of a decode step. `sampler`: drawing
tokens, by the sampler's definition and by the CPU kernels.

CPU time hardly depends on what else the machine does, the wall times of `rpc` and `sampler` do:
read them beside the printed load.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
from parts import gateway, rpc, runner, sampling, scheduler
from parts.table import Row, render

PARTS: dict[str, Callable[[], list[Row]]] = {
    "scheduler": scheduler.measure,
    "gateway": gateway.measure,
    "rpc": rpc.measure,
    "engine": runner.measure,
    "sampler": sampling.measure,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    args = parser.parse_args()
    before = os.getloadavg()[0]
    rows: list[Row] = []
    for part in args.part or PARTS:
        measured = PARTS[part]()
        print(render(measured), flush=True)
        rows += measured
    conditions = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before_and_after": [before, os.getloadavg()[0]],
    }
    print(", ".join(f"{name} {value}" for name, value in conditions.items()))
    if args.json is not None:
        data = {"conditions": conditions, "rows": rows}
        args.json.write_bytes(msgspec.json.format(msgspec.json.encode(data), indent=2) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
