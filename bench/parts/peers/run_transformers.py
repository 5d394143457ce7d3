"""transformers: a plain loop over `model(...)` with its cache, greedy; no server, no batching.

    python -m parts.peers.run_transformers MODEL_DIR THREADS

It has no way to take a prompt in while others decode (but `generate_batch`, which is far slower),
so the mixed cell is its prompts one after the other, and then the steps.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from parts.peers.child import Cell, draw_prompts, serve

STEP_TOKENS = 4096
"""Most tokens of all prompts together in one call, to bound the memory of activations."""


class Measurement:
    def __init__(self, directory: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        self._vocab_size = self._model.config.vocab_size
        self.about = (
            f"transformers {transformers.__version__} eager, sdpa, DynamicCache, threads={threads}"
        )

    @torch.inference_mode()
    def measure(self, cell: Cell) -> float:
        prompts = draw_prompts(cell["seed"], cell["batch"], cell["context"], self._vocab_size)
        start = time.perf_counter()
        last, cache = self._prefill(prompts)
        if cell["kind"] == "prefill":
            return time.perf_counter() - start
        if cell["kind"] == "burst":
            self._decode(last, cache, cell["steps"] - 1)
            return time.perf_counter() - start
        last = self._decode(last, cache, 1)
        start = time.perf_counter()
        if cell["kind"] == "mixed":
            seed = cell["seed"] + "/arrivals"
            count, length = cell["arrivals"], cell["arrival_tokens"]
            for prompt in draw_prompts(seed, count, length, self._vocab_size):
                self._prefill([prompt])
        self._decode(last, cache, cell["steps"])
        seconds = time.perf_counter() - start
        return seconds / cell["steps"] if cell["kind"] == "decode" else seconds

    def _prefill(self, prompts: list[list[int]]) -> tuple[torch.Tensor, DynamicCache]:
        ids, cache = torch.tensor(prompts), DynamicCache(config=self._model.config)
        width = max(1, STEP_TOKENS // len(prompts))
        for part in ids.split(width, dim=1):
            logits = self._call(part, cache)
        return logits.argmax(-1), cache

    def _decode(self, last: torch.Tensor, cache: DynamicCache, num_steps: int) -> torch.Tensor:
        for _ in range(num_steps):
            last = self._call(last, cache).argmax(-1)
        return last

    def _call(self, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """Logits [B, 1, vocabulary] after the last of `ids` [B, T]."""
        output = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: torch.Tensor = output.logits
        return logits


def start() -> tuple[str, Callable[[Cell], float]]:
    measurement = Measurement(sys.argv[1], int(sys.argv[2]))
    return measurement.about, measurement.measure


if __name__ == "__main__":
    serve(start, mixes=False)
