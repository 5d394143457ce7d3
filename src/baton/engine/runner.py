"""The torch body of `core.plan.Runner`: a step plan in, drawn tokens out.

    submit n ─▶ inputs ─▶ forward ─▶ draw ─┬─▶ collect n: the tokens, on the host
                  ▲                        └─ on the device ─┐
                  └────────────── submit n+1 ◀───────────────┘

With depth 2 the tokens of a step stay on the device as well, and the next one takes from there
those that the host does not know yet. Then nothing waits for the device but `collect`, as long as
all draws of a step are greedy; others are made on the host, so that `submit` waits for the logits.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.core.plan import Chunk, StepOutput, StepPlan
from baton.engine.inputs import Drawn, Inputs
from baton.model.kv_cache import KvCache
from baton.model.native import Kernels
from baton.model.sampler import (
    Sampled,
    SampleRow,
    check_finite,
    is_greedy,
    largest_logits,
    sample,
)
from baton.model.transformer import Transformer

DEPTHS = {"cpu": 1, "cuda": 2}
"""On a host a step is computed by the thread that plans the next one: nothing runs beside it."""


class TorchRunner:
    """Runs plans on `model` over `kv`; `depth` steps may be submitted before one is collected."""

    def __init__(
        self,
        model: Transformer,
        kv: KvCache,
        device: str,
        depth: int | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        """On a CPU `kernels` may draw the tokens; they change none."""
        self._model = model
        self._kernels = kernels
        self._kv = kv
        self._device = torch.device(device)
        self._inputs = Inputs(kv.block_size, self._device)
        self._depth = DEPTHS[self._device.type] if depth is None else depth
        self._steps: deque[_Step] = deque()
        self._drawn: Drawn | None = None
        self._last_end = 0.0

    @property
    def depth(self) -> int:
        return self._depth

    @property
    def pending(self) -> int:
        return len(self._steps)

    @property
    def progress(self) -> int:
        return self._model.progress

    def submit(self, plan: StepPlan) -> None:
        started = time.monotonic()
        batch = self._inputs.batch(plan, self._drawn if self._steps else None)
        logits = self._model.forward(batch, self._kv)
        sampling = [chunk for chunk in plan.chunks if chunk.samples]
        rows = [_row(chunk) for chunk in sampling]
        if self._depth == 1:
            drawn: list[Sampled] | _Greedy = sample(logits, rows, self._kernels)
        else:
            drawn = self._draw_ahead(logits, rows, sampling)
        self._steps.append(_Step(plan, drawn, started))

    def collect(self) -> StepOutput:
        step = self._steps.popleft()
        drawn = step.drawn if isinstance(step.drawn, list) else step.drawn.read()
        sampled = iter(drawn)
        each = [next(sampled) if chunk.samples else None for chunk in step.plan.chunks]
        ended = time.monotonic()
        # A step that was submitted early begins when the one before it ends.
        elapsed_s = ended - max(step.started, self._last_end)
        self._last_end = ended
        return StepOutput(
            [[] if one is None else [one.token_id] for one in each],
            [None if one is None else one.logprobs for one in each],
            elapsed_s,
        )

    def _draw_ahead(
        self, logits: Tensor, rows: list[SampleRow | None], sampling: list[Chunk]
    ) -> list[Sampled] | _Greedy:
        """Draw, and leave the tokens on the device for the next step."""
        drawn: list[Sampled] | _Greedy
        if any(row is not None for row in rows):
            drawn = sample(logits, rows, self._kernels)
            token_ids = torch.tensor([one.token_id for one in drawn], device=self._device)
        else:
            token_ids, largest = largest_logits(logits)
            drawn = _Greedy(token_ids, largest)
        where = {id(chunk.seq): row for row, chunk in enumerate(sampling)}
        self._drawn = Drawn(token_ids, where)
        return drawn


class _Greedy:
    """Greedy draws on their way to the host; the copy is ordered behind the step itself."""

    def __init__(self, token_ids: Tensor, largest: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        self._token_ids, self._largest = token_ids, largest
        if token_ids.is_cuda:
            self._token_ids, self._largest = _to_host(token_ids), _to_host(largest)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def read(self) -> list[Sampled]:
        """Wait for the copy, but for nothing that was submitted after it."""
        if self._copied is not None:
            self._copied.synchronize()
        check_finite(self._largest)
        return [Sampled(token) for token in self._token_ids.tolist()]


@dataclass(frozen=True, slots=True)
class _Step:
    plan: StepPlan
    drawn: list[Sampled] | _Greedy
    started: float


def _to_host(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


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
