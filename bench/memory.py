"""Peak memory of each worker of a served 1P1D, against what it was given.

    python bench/memory.py [--kv-mib 256] [--store-mib 128] [--json FILE]

A random 0.5 B model in bf16 is written to a temporary directory, served by `baton serve`, and
asked enough different prompts that KV pools and stores are full. The peak is the kernel's
(VmHWM of /proc/PID/status): it includes code, shared memory that was touched (the own store, and
in the decode worker the prefill worker's) and pages of files that were mapped.

    bound = weights + KV pool + store + 600 MB           exit code 1 if a worker is above it
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import msgspec
from parts.big_model import write_model
from parts.memory import Peaks, measure

SPARE_BYTES = 600_000_000


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kv-mib", type=int, default=256, help="KV pool of a worker")
    parser.add_argument("--store-mib", type=int, default=128, help="block store of a worker")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="baton-memory-") as name:
        spec = write_model(Path(name) / "model")
        peaks = measure(Path(name) / "model", spec, args.kv_mib << 20, args.store_mib << 20)
    print(render(peaks))
    if args.json is not None:
        args.json.write_text(json.dumps(msgspec.to_builtins(peaks), indent=2) + "\n")
    return 0 if all(peak.over_bytes <= SPARE_BYTES for peak in peaks) else 1


def render(peaks: list[Peaks]) -> str:
    """A Markdown table in MB (10^6 bytes)."""
    lines = [
        "| worker | peak, MB | weights | KV pool | store | the rest | shared at end | own growth |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for p in peaks:
        given = (p.weight_bytes, p.kv_bytes, p.store_bytes)
        sizes = (p.peak_bytes, *given, p.over_bytes, p.shared_bytes, p.grown_bytes)
        cells = " | ".join(f"{size / 1e6:,.0f}" for size in sizes)
        lines.append(f"| {p.worker} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
