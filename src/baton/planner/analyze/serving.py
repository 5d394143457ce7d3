"""One way to serve the traffic, as far as its phases cost: by a cost model, or as measured.

`Serving` is what the analysis asks. `Modelled` answers it from a `StepCost`; an endpoint that was
measured answers it from its fit (`baton.planner.endpoint`).
"""

from __future__ import annotations

from typing import Protocol

from baton.core.cost import ChunkShape, ModelShape, Power, StepCost, StepShape

CHUNK_TOKENS = 8192
"""Prompts are computed in chunks of at most so many tokens."""


class Serving(Protocol):
    """What prefill and decode take on one kind of worker.

    label: shown. basis: where the figures come from, with their error. usd_per_hour: of the whole
    worker. kv_tokens: tokens of KV that its memory holds. flops_per_s: what it reaches in matrix
    products. None is unknown.
    """

    @property
    def label(self) -> str: ...
    @property
    def basis(self) -> str: ...
    @property
    def usd_per_hour(self) -> float | None: ...
    @property
    def kv_tokens(self) -> int | None: ...
    @property
    def flops_per_s(self) -> float | None: ...

    def prefill(self, num_tokens: int) -> tuple[float, float | None]:
        """(seconds, joules) of a prompt that is computed alone."""

    def decode(self, batch: int, context: int) -> tuple[float, float | None]:
        """(seconds, joules) of a step of `batch` sequences with `context` tokens of KV each."""


class Modelled:
    """A model on a worker whose cost model is known. Immutable."""

    def __init__(
        self,
        label: str,
        cost: StepCost,
        *,
        basis: str = "",
        usd_per_hour: float | None = None,
        power: Power | None = None,
        kv_tokens: int | None = None,
    ) -> None:
        self.label = label
        self.basis = basis
        self.usd_per_hour = usd_per_hour
        self.kv_tokens = kv_tokens
        self.flops_per_s: float | None = cost.rates.flops_per_s * cost.parallel.num_devices
        self.model: ModelShape = cost.model
        self._cost = cost
        self._power = power

    def prefill(self, num_tokens: int) -> tuple[float, float | None]:
        seconds, joules = 0.0, 0.0
        for start in range(0, num_tokens, CHUNK_TOKENS):
            size = min(CHUNK_TOKENS, num_tokens - start)
            is_last = start + size == num_tokens
            step_s, step_j = self._step([ChunkShape(size, start, is_last)])
            seconds, joules = seconds + step_s, joules + (step_j or 0.0)
        return seconds, joules if self._power else None

    def decode(self, batch: int, context: int) -> tuple[float, float | None]:
        return self._step([ChunkShape(1, context, True)] * batch)

    def _step(self, chunks: list[ChunkShape]) -> tuple[float, float | None]:
        shape = StepShape.of(chunks)
        seconds = self._cost.step_s(shape)
        if self._power is None:
            return seconds, None
        watts = self._cost.watts(shape, self._power) * self._cost.parallel.num_devices
        return seconds, seconds * watts
