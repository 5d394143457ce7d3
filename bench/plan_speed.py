"""How long a full plan takes: `baton plan` on the Azure conversation trace.

    python bench/plan_speed.py [--data DIR] [--rate R] [--hardware LIST] [--processes N]

Prints the verdict as a user sees it, then how many candidates there were, how many runs of the twin
and the wall seconds. The target is at most 600 s for at least 500 candidates on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from baton.cli.main import main as baton

DATA = Path(__file__).parents[1] / "data" / "traces" / "azure2023"
TRACE = "AzureLLMInferenceTrace_conv.csv.gz"
MIN_CANDIDATES, MAX_S = 500, 600.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the trace")
    parser.add_argument("--rate", default="40", help="requests a second [40]")
    parser.add_argument("--hardware", default="H100,A100,L40S", help="[H100,A100,L40S]")
    parser.add_argument("--processes", default="2", help="[2]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "plan.json"
        began = time.perf_counter()
        code = baton([
            "plan", "--model", "Llama-3.1-8B", "--trace", str(args.data / TRACE),
            "--rate", args.rate, "--slo", "ttft=2s,tpot=50ms", "--hardware", args.hardware,
            "--processes", args.processes, "--write", f"{folder}/plan.yaml",
            "--plot", f"{folder}/frontier.svg", "--json", str(report),
        ])  # fmt: skip
        took_s = time.perf_counter() - began
        if not report.exists():
            return code
        found = json.loads(report.read_text())
    sys.stdout.write(
        f"\n{found['num_candidates']:,} candidates (target >= {MIN_CANDIDATES}), "
        f"{found['num_runs']:,} runs of the twin, {took_s:.0f} s (target <= {MAX_S:.0f})\n"
    )
    return 0 if found["num_candidates"] >= MIN_CANDIDATES and took_s <= MAX_S else 1


if __name__ == "__main__":
    sys.exit(main())
