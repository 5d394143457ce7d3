"""llama.cpp through its own `llama-batched-bench`, one process a cell, the model mapped.

    python -m parts.peers.run_llama BIN_DIR GGUF THREADS

The tool decodes random tokens of its own after random prompts; what it does not time (loading, a
warm-up) is not counted. It cannot take a prompt in while others decode, so the mixed cell is the
sum of the tool's times for the prompts and for the steps.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from parts.peers.child import Cell, serve

FLAGS = ("-b", "2048", "-ub", "512", "-fa", "on")


ATTEMPTS = 10
"""Its result goes through a thread that the end of the process may outrun: then it says nothing."""


class Measurement:
    def __init__(self, tools: str, model: str, threads: int) -> None:
        tool = str(Path(tools) / "llama-batched-bench")
        count = str(threads)
        self._command = (tool, "-m", model, *FLAGS, "-t", count, "-tb", count)
        flags = " ".join(FLAGS)
        self.about = f"llama-batched-bench {flags}, bf16 GGUF, built native, threads={threads}"

    def measure(self, cell: Cell) -> float:
        if cell["kind"] == "prefill":
            return self._run(1, cell["context"], 1)["t_pp"]
        run = self._run(cell["batch"], cell["context"], cell["steps"])
        if cell["kind"] == "decode":
            return run["t_tg"] / cell["steps"]
        if cell["kind"] == "burst":
            return run["t_pp"] + run["t_tg"]
        return run["t_tg"] + cell["arrivals"] * self._run(1, cell["arrival_tokens"], 1)["t_pp"]

    def _run(self, batch: int, num_prompt: int, num_steps: int) -> dict[str, float]:
        size = (
            "-npl", str(batch), "-npp", str(num_prompt), "-ntg", str(num_steps),
            "-c", str(batch * (num_prompt + num_steps)),
        )  # fmt: skip
        command = (*self._command, *size, "--output-format", "jsonl")
        for _ in range(ATTEMPTS):
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            rows = [line for line in run.stdout.splitlines() if line.startswith("{")]
            if rows or run.returncode:
                break
        if run.returncode or len(rows) != 1:
            raise RuntimeError(f"{command} ended with {run.returncode}: {run.stderr[-500:]}")
        row: dict[str, float] = json.loads(rows[0])
        return row


def start() -> tuple[str, Callable[[Cell], float]]:
    measurement = Measurement(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    return measurement.about, measurement.measure


if __name__ == "__main__":
    serve(start, mixes=False)
