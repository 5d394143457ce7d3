"""The torch body of `core.plan.Runner`: a step plan in, drawn tokens out."""

from __future__ import annotations

import time
from collections import deque

import torch

from baton.core.plan import Chunk, StepOutput, StepPlan
from baton.engine.inputs import Inputs
from baton.model.kv_cache import KvCache
from baton.model.sampler import SampleRow, is_greedy, sample
from baton.model.transformer import Transformer


class TorchRunner:
    """Runs plans on `model` over `kv`, one at a time and at once: depth 1."""

    def __init__(self, model: Transformer, kv: KvCache, device: str) -> None:
        self._model = model
        self._kv = kv
        self._inputs = Inputs(kv.block_size, torch.device(device))
        self._outputs: deque[StepOutput] = deque()

    @property
    def pending(self) -> int:
        return len(self._outputs)

    def submit(self, plan: StepPlan) -> None:
        """Compute `plan`."""
        started = time.monotonic()
        batch = self._inputs.batch(plan)
        logits = self._model.forward(batch, self._kv)
        drawn = iter(sample(logits, [_row(chunk) for chunk in plan.chunks if chunk.samples]))
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


def _row(chunk: Chunk) -> SampleRow | None:
    """What the draw at the end of `chunk` depends on; None is a greedy one."""
    seq = chunk.seq
    params = seq.request.sampling
    if is_greedy(params):
        return None
    return SampleRow(
        params=params,
        choice=seq.request.choice,
        position=chunk.end,
        prompt=seq.request.prompt,
        output=seq.token_ids[seq.num_prompt :] if params.reads_output else (),
    )
