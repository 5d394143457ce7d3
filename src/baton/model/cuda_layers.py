"""The decoder layers on a GPU: Triton kernels between the library's products, decode recorded.

Every kernel computes a token by itself; the products of the vendor's library do not, so that a
token's last bits depend on the size of its batch. In `exact` mode products and attention are of
one shape and one order of summation whatever the batch: a token's result then depends on its own
context and nothing else. It costs speed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from baton.model.attention_triton import AttentionPlan, PagedAttention
from baton.model.batch import Batch
from baton.model.decode_graphs import (
    MAX_ROWS,
    Capture,
    CudaCapture,
    DecodeGraphs,
    DecodeInputs,
    capture_nothing,
)
from baton.model.kv_cache import KvCache
from baton.model.rope import cos_sin, inverse_frequencies
from baton.model.triton_ops import add_rms_norm, exact_linear, linear, rotate_and_write, silu_mul
from baton.model.weights import Weights
from baton.model_spec import ModelSpec


@dataclass(slots=True)
class _Step:
    """What the layers read of a batch; without sample_rows the logits of all tokens are wanted."""

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    tables: Tensor
    plan: AttentionPlan
    sample_rows: Tensor | None = None


class CudaLayers:
    """`weights`, on their device. `capture` records decode steps; by default as CUDA graphs.

    It is bound to the first `kv` that it sees, and to another one only by forgetting what it has
    recorded.
    """

    def __init__(
        self, spec: ModelSpec, weights: Weights, exact: bool, capture: Capture | None = None
    ) -> None:
        self.progress = 0  # see `Transformer.progress`; a recorded step moves it once
        self._spec = spec
        self._weights = weights
        self._device = weights.embed.device
        self._linear = exact_linear if exact else linear
        self._attention = PagedAttention(spec, weights.embed.dtype, self._device, exact)
        self._frequencies = inverse_frequencies(spec.rope, spec.head_dim).to(self._device)
        if capture is None:
            capture = CudaCapture() if self._device.type == "cuda" else capture_nothing
        self._capture = capture
        self._bound: tuple[KvCache, DecodeGraphs] | None = None

    def forward(self, batch: Batch, kv: KvCache) -> Tensor:
        """As `Transformer.forward`."""
        graphs = self._graphs(kv)
        self.progress += 1
        if (bucket := graphs.bucket(batch)) is not None:
            logits = graphs.run(batch, bucket)
            # Rows are in order and wanted once each, so as many as there are means all of them.
            if batch.sample_rows.numel() < logits.shape[0]:
                logits = logits.index_select(0, batch.sample_rows)
        else:
            plan = self._attention.plan(batch.query_starts, batch.context_lens)
            step = _Step(
                batch.token_ids,
                batch.positions,
                batch.slots,
                batch.block_tables,
                plan,
                batch.sample_rows,
            )
            logits = self._compute(step, kv)
        return logits.to(torch.float32, copy=True)  # a recorded step's own are overwritten

    def record(self, kv: KvCache, max_num_seqs: int) -> None:
        """Record decode steps of up to `max_num_seqs` sequences now and not when first needed."""
        self._graphs(kv).record(max_num_seqs)

    def _graphs(self, kv: KvCache) -> DecodeGraphs:
        if self._bound is None or self._bound[0] is not kv:
            most = -(-self._spec.max_position // kv.block_size) + 1  # one ahead of time
            inputs = DecodeInputs(MAX_ROWS, min(most, kv.num_blocks), self._device)

            def compute(num_rows: int) -> Callable[[], Tensor]:
                step = _Step(
                    inputs.token_ids[:num_rows],
                    inputs.positions[:num_rows],
                    inputs.slots[:num_rows],
                    inputs.tables[:num_rows],
                    self._attention.plan_decode(inputs.lens[:num_rows]),
                )
                return lambda: self._compute(step, kv)

            self._bound = kv, DecodeGraphs(inputs, compute, self._capture)
        return self._bound[1]

    def _compute(self, step: _Step, kv: KvCache) -> Tensor:
        spec, weights, eps = self._spec, self._weights, self._spec.rms_norm_eps
        x = F.embedding(step.token_ids, weights.embed)
        cos, sin = cos_sin(
            self._frequencies, step.positions, spec.rope.attention_factor, torch.float32
        )
        delta: Tensor | None = None  # what is still to be added to x
        for index, layer in enumerate(weights.layers):
            self.progress += 1
            k, v = kv.data[:, index, 0], kv.data[:, index, 1]
            normed = add_rms_norm(x, delta, layer.input_norm, eps)
            qkv = self._linear(normed, layer.qkv, layer.qkv_bias).view(len(x), -1, spec.head_dim)
            norms = None
            if layer.q_norm is not None and layer.k_norm is not None:
                norms = layer.q_norm, layer.k_norm
            rotate_and_write(qkv, norms, cos, sin, step.slots, k, v, eps)
            attended = self._attention(
                qkv, k, v, step.tables, step.plan, spec.sliding_window[index]
            )
            delta = self._linear(attended, layer.o, layer.o_bias)
            normed = add_rms_norm(x, delta, layer.post_norm, eps)
            inner = silu_mul(self._linear(normed, layer.gate_up, layer.gate_up_bias))
            delta = self._linear(inner, layer.down, layer.down_bias)
        assert delta is not None, "a model without layers"
        if step.sample_rows is not None:
            x, delta = (part.index_select(0, step.sample_rows) for part in (x, delta))
        last = add_rms_norm(x, delta, weights.norm, eps)
        return self._linear(last, weights.lm_head)
