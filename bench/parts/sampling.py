"""What drawing tokens costs: the sampler's definition in numpy and torch, and the CPU kernels.

Random normal logits; `deviation` 3 is about that of a trained model, and with 1 the tokens that
top_p leaves are thousands. Both draw the same tokens, which is checked, in turns. Medians of CPU
time on one thread, and of wall time where the kernels have two.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from baton.model.native import ISAS, find_kernels
from baton.model.sampler import SampleRow, sample
from baton.types import SamplingParams
from parts.table import Row

SIZES = ((4096, 1), (4096, 64), (32_000, 1), (32_000, 32), (32_000, 64), (151_936, 32))
"""Vocabulary, sequences."""
SAMPLING: dict[str, dict[str, float]] = {
    "T=1": {"temperature": 1.0},
    "T=0.8 top_p=0.95": {"temperature": 0.8, "top_p": 0.95},
    "T=0.8 top_k=40": {"temperature": 0.8, "top_k": 40},
}
DEVIATIONS = (1, 3)
ROUNDS = 21


def measure() -> list[Row]:
    kernels = next(filter(None, map(find_kernels, ISAS)), None)
    if kernels is None:
        return []
    threads, rows = torch.get_num_threads(), []
    for vocab_size, batch in SIZES:
        for deviation in DEVIATIONS:
            generator = torch.Generator().manual_seed(0)
            logits = deviation * torch.randn(batch, vocab_size, generator=generator)
            for name, params in SAMPLING.items():
                draws = [SamplingParams(9, seed=i, **params) for i in range(batch)]  # type: ignore[arg-type]
                asked = [SampleRow(draw, 0, 100, (), ()) for draw in draws]
                ways = {
                    "definition_us": (1, time.thread_time, None),
                    "kernels_us": (1, time.thread_time, kernels),
                    "kernels_2_threads_wall_us": (2, time.perf_counter, kernels),
                }
                times: dict[str, list[float]] = {column: [] for column in ways}
                expected = sample(logits, asked)
                for _ in range(ROUNDS):
                    for column, (num_threads, clock, body) in ways.items():
                        torch.set_num_threads(num_threads)
                        start = clock()
                        found = sample(logits, asked, body)
                        times[column].append(1e6 * (clock() - start))
                        assert found == expected
                values = {column: float(np.median(taken)) for column, taken in times.items()}
                case = f"{vocab_size:,}, {batch} sequences, deviation {deviation}, {name}"
                rows.append(Row("sampler: a step's draws", case, values))
    torch.set_num_threads(threads)
    return rows
