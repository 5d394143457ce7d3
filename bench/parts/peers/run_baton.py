"""Baton's engine loop: scheduler, paged KV, runner, as a worker has them; no HTTP.

python -m parts.peers.run_baton MODEL_DIR THREADS KV_TOKENS TOKEN_BUDGET
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from baton.engine.inbox import Abort, Submit
from baton.engine.llm import LLM
from baton.model_spec import load_model_spec
from baton.types import Request, SamplingParams
from parts.peers.child import Cell, draw_prompts, serve


class Measurement:
    """Requests in one engine, stepped by hand."""

    def __init__(self, directory: str, threads: int, kv_tokens: int, budget: int) -> None:
        spec = load_model_spec(Path(directory))
        options = {
            "threads": threads,
            "kernels": "native",
            "max_num_batched_tokens": budget,
            "kv_cache_bytes": kv_tokens * spec.kv_bytes_per_token(),
        }
        self._engine = LLM(directory, engine=options).engine
        self._scheduler = self._engine.scheduler
        self._vocab_size = spec.vocab_size
        self._num_requests = 0
        numerics = self._scheduler.config.numerics
        self.about = f"{numerics}, max_num_batched_tokens={budget}, threads={threads}"

    def measure(self, cell: Cell) -> float:
        seed, steps = cell["seed"], cell["steps"]
        prompts = draw_prompts(seed, cell["batch"], cell["context"], self._vocab_size)
        if cell["kind"] == "prefill":
            return self._timed_to_end(prompts, 1)
        if cell["kind"] == "burst":
            return self._timed_to_end(prompts, steps)
        running = self._submit(prompts, steps + 90)  # some run ahead while others are prefilled
        while self._num_generated() < len(prompts) or self._scheduler.load().num_waiting_tokens:
            self._engine.step()
        seconds = self._mixed(cell) if cell["kind"] == "mixed" else self._decode(cell)
        for request in running:
            self._engine.inbox.put(Abort((request.id, 0, 0)))
        while self._scheduler.num_sequences:
            self._engine.step()
        return seconds

    def _decode(self, cell: Cell) -> float:
        before = self._num_generated_ever()
        start = time.perf_counter()
        for _ in range(cell["steps"]):
            self._engine.step()
        seconds = time.perf_counter() - start
        if self._num_generated_ever() - before != cell["batch"] * cell["steps"]:
            raise RuntimeError("a step was not one token for each sequence")
        return seconds / cell["steps"]

    def _mixed(self, cell: Cell) -> float:
        seed = cell["seed"] + "/arrivals"
        arrivals = draw_prompts(seed, cell["arrivals"], cell["arrival_tokens"], self._vocab_size)
        target = self._num_generated_ever() + cell["batch"] * cell["steps"] + len(arrivals)
        start = time.perf_counter()
        self._submit(arrivals, 1)
        while self._num_generated_ever() < target:
            self._engine.step()
        return time.perf_counter() - start

    def _timed_to_end(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> float:
        start = time.perf_counter()
        self._submit(prompts, num_tokens)
        while self._engine.step():
            pass
        return time.perf_counter() - start

    def _submit(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[Request]:
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0)
        requests = []
        for prompt in prompts:
            self._num_requests += 1
            requests.append(Request(f"r{self._num_requests}", tuple(prompt), sampling))
            self._engine.inbox.put(Submit(requests[-1]))
        self._first_token = self._num_generated_ever()
        return requests

    def _num_generated(self) -> int:
        return self._num_generated_ever() - self._first_token

    def _num_generated_ever(self) -> int:
        return self._scheduler.counters["tokens_generated"]


def start() -> tuple[str, Callable[[Cell], float]]:
    measurement = Measurement(sys.argv[1], *map(int, sys.argv[2:5]))
    return measurement.about, measurement.measure


if __name__ == "__main__":
    serve(start)
