"""vLLM's CPU build, offline: its engine stepped by hand, in its own environment.

python -m parts.peers.run_vllm MODEL_DIR THREADS KV_BYTES TOKEN_BUDGET
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence

from parts.peers.child import Cell, draw_prompts, serve
from parts.peers.vllm_env import vllm_env


class Measurement:
    """Requests in one engine, whose outputs are taken step by step."""

    def __init__(self, directory: str, threads: int, budget: int) -> None:
        import vllm
        from vllm import EngineArgs, LLMEngine, SamplingParams

        args = EngineArgs(
            model=directory, dtype="bfloat16", seed=0,
            enable_prefix_caching=False, max_num_batched_tokens=budget, max_num_seqs=256,
            disable_log_stats=True,
        )  # fmt: skip
        self._sampling = SamplingParams
        self._engine = LLMEngine.from_engine_args(args)
        self._vocab_size = self._engine.model_config.get_vocab_size()
        self._num_requests = 0
        self._counts: dict[str, int] = {}
        self.about = (
            f"vllm {vllm.__version__} compiled (its default), "
            f"max_num_batched_tokens={budget}, threads bound to {threads} cores"
        )

    def measure(self, cell: Cell) -> float:
        steps = cell["steps"]
        prompts = draw_prompts(cell["seed"], cell["batch"], cell["context"], self._vocab_size)
        if cell["kind"] in ("prefill", "burst"):
            return self._timed_to_end(prompts, 1 if cell["kind"] == "prefill" else steps)
        names = self._submit(prompts, steps + 90)
        while len(self._counts) < len(prompts):
            self._step()
        seconds = self._mixed(cell, names) if cell["kind"] == "mixed" else self._decode(cell)
        self._engine.abort_request(names)
        while self._engine.has_unfinished_requests():
            self._step()
        return seconds

    def _decode(self, cell: Cell) -> float:
        """By tokens: the core does not wait for us, and may tell several steps at once."""
        self._step()
        before, start = sum(self._counts.values()), time.perf_counter()
        for _ in range(cell["steps"]):
            self._step()
        seconds = time.perf_counter() - start
        return seconds * cell["batch"] / (sum(self._counts.values()) - before)

    def _mixed(self, cell: Cell, names: Sequence[str]) -> float:
        seed = cell["seed"] + "/arrivals"
        arrivals = draw_prompts(seed, cell["arrivals"], cell["arrival_tokens"], self._vocab_size)
        target = sum(self._counts.values()) + cell["batch"] * cell["steps"] + len(arrivals)
        start = time.perf_counter()
        self._submit(arrivals, 1, forget=False)
        while sum(self._counts.values()) < target:
            self._step()
        return time.perf_counter() - start

    def _timed_to_end(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> float:
        start = time.perf_counter()
        self._submit(prompts, num_tokens)
        while self._engine.has_unfinished_requests():
            self._step()
        return time.perf_counter() - start

    def _submit(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, forget: bool = True
    ) -> list[str]:
        sampling = self._sampling(
            max_tokens=num_tokens, temperature=0.0, ignore_eos=True, detokenize=False
        )
        if forget:
            self._counts = {}
        names = []
        for prompt in prompts:
            self._num_requests += 1
            names.append(f"r{self._num_requests}")
            self._engine.add_request(names[-1], {"prompt_token_ids": list(prompt)}, sampling)
        return names

    def _step(self) -> None:
        for output in self._engine.step():
            count = len(output.outputs[0].token_ids)
            if count:
                self._counts[output.request_id] = count


def start() -> tuple[str, Callable[[Cell], float]]:
    directory, threads = sys.argv[1], int(sys.argv[2])
    kv_bytes, budget = int(sys.argv[3]), int(sys.argv[4])
    os.environ |= vllm_env(kv_bytes, range(threads))
    measurement = Measurement(directory, threads, budget)
    return measurement.about, measurement.measure


if __name__ == "__main__":
    serve(start)
