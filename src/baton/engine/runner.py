"""The torch body of `core.plan.Runner`: a step plan in, drawn tokens out."""

from __future__ import annotations

import time
from collections import deque

import numpy as np
import torch

from baton.core.plan import StepOutput, StepPlan
from baton.core.sequence import Sequence
from baton.model.batch import Batch
from baton.model.kv_cache import KvCache
from baton.model.sampler import SampleRow, reads_output, sample
from baton.model.transformer import Transformer


class TorchRunner:
    """Runs plans on `model` over `kv`, one at a time and at once: depth 1."""

    def __init__(self, model: Transformer, kv: KvCache, device: str) -> None:
        self._model = model
        self._kv = kv
        self._device = torch.device(device)
        self._outputs: deque[StepOutput] = deque()

    @property
    def pending(self) -> int:
        return len(self._outputs)

    def submit(self, plan: StepPlan) -> None:
        """Compute `plan`. A chunk without tokens is our own mistake, hence the assertion."""
        started = time.monotonic()
        batch = self._batch(plan)
        logits = self._model.forward(batch, self._kv)
        drawn = iter(sample(logits, [_row(chunk.seq) for chunk in plan.chunks if chunk.samples]))
        sampled = [next(drawn) if chunk.samples else None for chunk in plan.chunks]
        self._outputs.append(
            StepOutput(
                [[] if one is None else [one.token_id] for one in sampled],
                [None if one is None else one.logprobs for one in sampled],
                time.monotonic() - started,
            )
        )

    def collect(self) -> StepOutput:
        return self._outputs.popleft()

    def _batch(self, plan: StepPlan) -> Batch:
        size = self._kv.block_size
        tables = np.zeros(
            (len(plan.chunks), max(-(-chunk.end // size) for chunk in plan.chunks)), np.int64
        )
        token_ids: list[int] = []
        query_starts = [0]
        sample_rows = []
        for row, chunk in enumerate(plan.chunks):
            assert chunk.num_tokens > 0
            num_blocks = -(-chunk.end // size)
            tables[row, :num_blocks] = chunk.seq.blocks[:num_blocks]
            token_ids += chunk.seq.token_ids[chunk.start : chunk.end]
            query_starts.append(len(token_ids))
            if chunk.samples:
                sample_rows.append(len(token_ids) - 1)
        counts = np.diff(query_starts)
        rows = np.repeat(np.arange(len(plan.chunks)), counts)
        shifts = np.array([chunk.start for chunk in plan.chunks]) - query_starts[:-1]
        positions = np.arange(len(token_ids)) + np.repeat(shifts, counts)
        return Batch(
            token_ids=self._tensor(np.array(token_ids)),
            positions=self._tensor(positions),
            slots=self._tensor(tables[rows, positions // size] * size + positions % size),
            query_starts=query_starts,
            context_lens=[chunk.end for chunk in plan.chunks],
            block_tables=self._tensor(tables),
            sample_rows=self._tensor(np.array(sample_rows, np.int64)),
        )

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def _row(seq: Sequence) -> SampleRow:
    params = seq.request.sampling
    return SampleRow(
        params=params,
        choice=seq.request.choice,
        position=seq.num_tokens,
        prompt=seq.request.prompt,
        output=seq.token_ids[seq.num_prompt :] if reads_output(params) else (),
    )
