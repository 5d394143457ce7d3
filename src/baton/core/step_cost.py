"""The time and power of one step of an engine, from its shape: pure arithmetic, microseconds.

    step = step_s + layers × layer_s + sequences × sequence_s + samples × sample_s   overhead
         + smooth max(weights' flops, weights' bytes), experts apart                  linear layers
         + tokens × activation bytes                                                  elementwise
         + query-key pairs × flops + KV read                                          attention
         + per layer, two all-reduces among tensor-parallel ranks                     communication

The smooth max of compute a and memory b is (a^p + b^p)^(1/p): it bends where real kernels bend,
near the ridge. Every term is a coefficient's, so each can be fitted, and none needs a table.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import msgspec

from baton.core.model_shape import ModelShape
from baton.core.plan import StepPlan


class ChunkShape(msgspec.Struct, frozen=True):
    """A chunk as far as its time goes. context: tokens of KV before the chunk."""

    num_tokens: int
    context: int
    samples: bool


class StepShape(msgspec.Struct, frozen=True):
    """A step as far as its time goes, summed over its chunks.

    kv_tokens: tokens of KV that are read, the chunk's own included. attention_pairs: queries times
    keys that they see.
    """

    num_tokens: int
    num_samples: int
    num_seqs: int
    kv_tokens: int
    attention_pairs: float

    @property
    def has_prompt(self) -> bool:
        """Whether it computes more than the next token of each sequence."""
        return self.num_tokens > self.num_seqs

    @classmethod
    def of(cls, chunks: Iterable[ChunkShape]) -> StepShape:
        """Sum up chunks that were made by hand."""
        num_tokens = num_samples = num_seqs = kv_tokens = 0
        pairs = 0.0
        for chunk in chunks:
            num_tokens += chunk.num_tokens
            num_samples += chunk.samples
            num_seqs += 1
            kv_tokens += chunk.context + chunk.num_tokens
            pairs += chunk.num_tokens * (chunk.context + chunk.num_tokens / 2)
        return cls(num_tokens, num_samples, num_seqs, kv_tokens, pairs)


def shape(plan: StepPlan) -> StepShape:
    """The shape of a plan's step."""
    chunks = plan.chunks
    # Most have one token; sums of halves are exact in any order.
    num_tokens = num_samples = num_seqs = len(chunks)
    kv_tokens = sum([chunk.start for chunk in chunks]) + num_seqs
    pairs = kv_tokens - num_seqs / 2
    for chunk in chunks:
        tokens = chunk.num_tokens
        if tokens != 1 or not chunk.samples:
            num_tokens += tokens - 1
            num_samples -= not chunk.samples
            kv_tokens += tokens - 1
            pairs += tokens * (chunk.start + tokens / 2) - chunk.start - 0.5
    return StepShape(num_tokens, num_samples, num_seqs, kv_tokens, pairs)


class MeasuredStep(msgspec.Struct, frozen=True):
    """A step that an engine ran, and the seconds until it could begin the next one."""

    shape: StepShape
    elapsed_s: float


class CostModel(Protocol):
    """What the simulator asks of any cost model."""

    def step_s(self, shape: StepShape) -> float:
        """Seconds that a step of this shape takes."""


@runtime_checkable
class SteadyCost(Protocol):
    """A cost model that knows a shorter way for steps that only decode, one after the other."""

    def steady_s(self, shape: StepShape, steps: int) -> list[float]:
        """Seconds of each of the `steps` that follow one of this shape, as `step_s` has them."""


class Parallel(msgspec.Struct, frozen=True):
    """How one worker spreads over its devices.

    tensor: ranks that share each layer. pipeline: stages. data: groups that each compute attention
    for their share of the sequences, while the experts lie over all ranks.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1

    @property
    def num_devices(self) -> int:
        return self.tensor * self.pipeline * self.data


class Coefficients(msgspec.Struct, frozen=True):
    """What an engine reaches on a device. Rates are those of one device.

    A rate of None leaves its term out. `sharpness` is the p of the smooth max. `allreduce_s` is
    the latency of one all-reduce, `allreduce_bytes_per_s` the rate at which each rank's share
    moves; `hop_s` and `hop_bytes_per_s` are those between pipeline stages. `expert_factor`
    multiplies the time of routed experts: they share out unevenly, and their kernels are smaller;
    `mixed_kv_factor` that of reading KV in steps that decode and compute prompts: some kernels
    serve such a batch badly.
    """

    flops_per_s: float
    weight_bytes_per_s: float
    attention_flops_per_s: float
    kv_bytes_per_s: float
    activation_bytes_per_s: float | None = None
    sharpness: float = 4.0
    step_s: float = 0.0
    layer_s: float = 0.0
    sequence_s: float = 0.0
    sample_s: float = 0.0
    allreduce_s: float = 0.0
    allreduce_bytes_per_s: float | None = None
    hop_s: float = 0.0
    hop_bytes_per_s: float | None = None
    expert_factor: float = 1.0
    mixed_kv_factor: float = 1.0


class Power(msgspec.Struct, frozen=True):
    """Watts of a device: idle, and what full use of its arithmetic and of its memory adds."""

    idle_w: float
    compute_w: float
    memory_w: float
    max_w: float


class StepParts(msgspec.Struct, frozen=True):
    """Where the seconds of a step go."""

    overhead_s: float
    linear_s: float
    experts_s: float
    activation_s: float
    attention_s: float
    kv_s: float
    communication_s: float

    @property
    def total_s(self) -> float:
        parts = self.overhead_s + self.linear_s + self.experts_s + self.activation_s
        return parts + self.attention_s + self.kv_s + self.communication_s


ACTIVATION_BYTES = 2


class StepCost:
    """The cost model of one model on one kind of worker. Immutable once made."""

    def __init__(self, model: ModelShape, rates: Coefficients, parallel: Parallel) -> None:
        self.model, self.rates, self.parallel = model, rates, parallel
        tp, ranks, layers = parallel.tensor, parallel.tensor * parallel.data, model.num_layers
        self._data = parallel.data
        self._fixed_s = rates.step_s + layers * rates.layer_s
        self._fixed_s += (parallel.pipeline - 1) * rates.hop_s
        self._sharpness, self._root = rates.sharpness, 1 / rates.sharpness
        self._flop_s = 2 / rates.flops_per_s
        self._byte_s = (model.weight_bytes / rates.weight_bytes_per_s) ** rates.sharpness
        self._dense = model.dense_weights / tp
        self._head = model.vocab_size * model.hidden_size / tp
        self._experts = model.num_moe_layers * model.expert_weights / ranks * rates.expert_factor
        self._skipped = 1 - model.experts_per_token / max(model.num_experts, 1)
        inner = model.num_shared + model.experts_per_token
        wide = model.intermediate_size if not model.is_moe else inner * model.expert_size
        elements = layers * (8 * model.hidden_size + 3 * wide / tp)
        self._token_s = elements * ACTIVATION_BYTES * _per(rates.activation_bytes_per_s)
        moved = model.hidden_size * ACTIVATION_BYTES
        self._hop_token_s = (parallel.pipeline - 1) * moved * _per(rates.hop_bytes_per_s)
        self._pair_s = 4 * model.num_heads * model.head_dim / (tp * rates.attention_flops_per_s)
        share = 1 if model.kv_elements else min(tp, max(model.num_kv_heads, 1))
        self._kv_s = model.kv_bytes_per_token / layers / (share * rates.kv_bytes_per_s)
        self._full_layers = layers - model.num_window_layers
        self._reduce_s = self._reduce_token_s = 0.0
        if ranks > 1:
            self._reduce_s = 2 * layers * rates.allreduce_s
            per_token = 2 * moved * (ranks - 1) / ranks * _per(rates.allreduce_bytes_per_s)
            self._reduce_token_s = 2 * layers * per_token

    def step_s(self, shape: StepShape) -> float:
        """Seconds of a step, from its first layer to its last one (over all pipeline stages)."""
        return self.parts(shape).total_s

    def steady_s(self, shape: StepShape, steps: int) -> list[float]:
        """See `SteadyCost`: only what attention reads grows, by a token a sequence and step."""
        seqs, kv_tokens, pairs = shape.num_seqs, shape.kv_tokens, shape.attention_pairs
        if self.model.num_window_layers:
            return [
                self.step_s(StepShape(seqs, seqs, seqs, kv_tokens + i * seqs, pairs + i * seqs))
                for i in range(1, steps + 1)
            ]
        parts = self.parts(StepShape(seqs, seqs, seqs, kv_tokens, pairs))
        rest_s = parts.overhead_s + parts.linear_s + parts.experts_s + parts.activation_s
        layers, data, link_s = self._full_layers, self._data, parts.communication_s
        pair_s, kv_s = self._pair_s, self._kv_s
        found = []
        for _ in range(steps):
            kv_tokens += seqs
            pairs += seqs
            attention_s = pairs * layers * pair_s / data
            found.append(rest_s + attention_s + float(kv_tokens) * layers * kv_s / data + link_s)
        return found

    def stage_s(self, shape: StepShape) -> float:
        """Seconds after which the next step may follow: of one pipeline stage."""
        return self.step_s(shape) / self.parallel.pipeline

    def parts(self, shape: StepShape) -> StepParts:
        """The step's seconds by cause."""
        rates, tokens, seqs = self.rates, shape.num_tokens / self._data, shape.num_seqs
        overhead = self._fixed_s + seqs * rates.sequence_s + shape.num_samples * rates.sample_s
        linear = self._dense * self._roofline(tokens)
        if shape.num_samples:
            linear += self._head * self._roofline(shape.num_samples / self._data)
        experts = self._experts_s(shape.num_tokens) if self._experts else 0.0
        pairs, kv_tokens = self._seen(shape)
        if shape.num_tokens > shape.num_seqs > 1:
            kv_tokens *= rates.mixed_kv_factor
        return StepParts(
            overhead,
            linear,
            experts,
            tokens * self._token_s,
            pairs * self._pair_s / self._data,
            kv_tokens * self._kv_s / self._data,
            self._reduce_s + tokens * (self._reduce_token_s + self._hop_token_s),
        )

    def watts(self, shape: StepShape, power: Power) -> float:
        """Mean power of one device during such a step."""
        parts = self.parts(shape)
        total = parts.total_s
        if total <= 0:
            return power.idle_w
        compute = (shape.num_tokens / self._data * self._dense * self._flop_s) + parts.attention_s
        memory = (self._dense + self._head) * float(self._byte_s**self._root) + parts.kv_s
        if parts.experts_s:
            compute += min(parts.experts_s, self._experts_s(shape.num_tokens, memory=False))
            memory += parts.experts_s
        busy = power.compute_w * min(compute / total, 1) + power.memory_w * min(memory / total, 1)
        return min(power.idle_w + busy, power.max_w)

    def _roofline(self, rows: float) -> float:
        """Seconds a weight, for `rows` tokens that meet it."""
        sharpness = self._sharpness
        return float(((rows * self._flop_s) ** sharpness + self._byte_s) ** self._root)

    def _experts_s(self, num_tokens: int, memory: bool = True) -> float:
        """Each token goes to a few experts at random; a batch touches this many of them."""
        model = self.model
        compute = num_tokens * model.experts_per_token * self._flop_s
        if not memory:
            return self._experts * compute
        touched = model.num_experts * (1 - self._skipped**num_tokens)
        sharpness = self._sharpness
        return float(
            self._experts * (compute**sharpness + touched**sharpness * self._byte_s) ** self._root
        )

    def _seen(self, shape: StepShape) -> tuple[float, float]:
        """Query-key pairs and KV tokens read, times the layers in which they are."""
        pairs, kv_tokens = shape.attention_pairs, float(shape.kv_tokens)
        all_pairs, all_kv = pairs * self._full_layers, kv_tokens * self._full_layers
        if self.model.num_window_layers and shape.num_seqs:
            # The mean context stands for all: the sums do not tell them apart.
            mean = shape.kv_tokens / shape.num_seqs
            own = shape.num_tokens / shape.num_seqs
            part = min(1.0, (self.model.window + own) / mean) if mean else 1.0
            all_kv += kv_tokens * part * self.model.num_window_layers
            few = min(pairs, shape.num_tokens * float(self.model.window))
            all_pairs += few * self.model.num_window_layers
        return all_pairs, all_kv


def _per(rate: float | None) -> float:
    return 0.0 if rate is None else 1 / rate
