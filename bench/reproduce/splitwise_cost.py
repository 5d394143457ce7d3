"""Times of a DGX machine from Splitwise's measurements (Llama-2-70B, 8 devices, 2023 vLLM).

Prompts: by the tokens of the batch, straight between measured points. Decoding is read in two ways:

* `sequences`: a + b × sequences + c × KV tokens, by least squares over the measured points;
* `batch_tokens`: as the authors' simulator does. It lays the measured points along prompt tokens ×
  batch, but looks them up at the number of sequences, so nearly every batch costs what one sequence
  costs; a request alone is looked up at its prompt's tokens. KV counts all 64 heads, where the
  model keeps 8, and a gap is the time after the first token by all tokens, the first included.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np

from reproduce.tables import Curve, read_rows

Reading = Literal["sequences", "batch_tokens"]
MIXED = 1.1  # the authors' factor for a step with prompts and decodes
MEMORY_BYTES, WEIGHT_BYTES = 640e9, 135e9
KV_BYTES = {"sequences": 2 * 80 * 8 * 128 * 2, "batch_tokens": 2 * 80 * 8192 * 2}
"""A token, over the 80 layers, by reading."""


class MachineTimes:
    """Seconds on one kind of machine, named as in the measurements."""

    def __init__(self, path: Path, model: str, hardware: str, devices: int, how: Reading) -> None:
        prompts: dict[float, list[float]] = defaultdict(list)
        tokens: dict[float, list[float]] = defaultdict(list)
        rows, times = [], []
        for row in read_rows(path):
            kind = (row["model"], row["hardware"], int(row["tensor_parallel"]))
            if kind != (model, hardware, devices):
                continue
            prompt, batch = float(row["prompt_size"]), float(row["batch_size"])
            prompts[prompt * batch].append(float(row["prompt_time"]))
            tokens[prompt * batch].append(float(row["token_time"]))
            rows.append((1.0, batch, batch * (prompt + float(row["token_size"]) / 2)))
            times.append(float(row["token_time"]))
        if not rows:
            raise ValueError(f"no measurement of {model} on {devices} × {hardware}")
        self._how = how
        self.kv_tokens = int((MEMORY_BYTES - WEIGHT_BYTES) / KV_BYTES[how])
        self._prompts = Curve({x: median(ys) for x, ys in prompts.items()})
        self._tokens = Curve({x: median(ys) for x, ys in tokens.items()})
        self._law: list[float] = np.linalg.lstsq(np.array(rows), np.array(times), rcond=None)[
            0
        ].tolist()

    def prompt_s(self, num_tokens: int) -> float:
        """A step with prompts of so many tokens in all."""
        return 1e-3 * self._prompts(num_tokens)

    def decode_s(self, num_sequences: int, kv_tokens: int) -> float:
        """A step that draws a token each."""
        if self._how == "batch_tokens":
            return 1e-3 * self._tokens(num_sequences)
        fixed, per_sequence, per_token = self._law
        return 1e-3 * (fixed + per_sequence * num_sequences + per_token * kv_tokens)

    def alone_s(self, num_prompt: int, num_output: int) -> tuple[float, float]:
        """The first token of a request that has the machine to itself, and each further one."""
        if self._how == "batch_tokens":
            return self.prompt_s(num_prompt), 1e-3 * self._tokens(num_prompt)
        return self.prompt_s(num_prompt), self.decode_s(1, num_prompt + num_output // 2)

    def num_gaps(self, num_output: int) -> int:
        return num_output if self._how == "batch_tokens" else num_output - 1

    def mixed_s(self, num_prompt_tokens: int, num_sequences: int) -> float:
        """A step with prompts and decodes."""
        return MIXED * self.prompt_s(num_prompt_tokens + num_sequences)
