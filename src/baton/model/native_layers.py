"""The decoder layers on the CPU kernels: one call a layer, over weights packed once.

A token's result depends on its own context and nothing else: not on what else is in the batch, on
how the prompt was cut into chunks, on prefill or decode, on blocks, or on threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from baton.model.batch import Batch
from baton.model.kv_cache import KvCache
from baton.model.native import DTYPES, Kernels, LayerArgs, LinearArgs, Packed, StepArgs
from baton.model.rope import inverse_frequencies
from baton.model.weights import LayerWeights, Weights
from baton.model_spec import ModelSpec


class NativeLayers:
    """`weights` packed for `kernels`. They are consumed: their matrices lie packed from now on."""

    def __init__(self, spec: ModelSpec, weights: Weights, kernels: Kernels) -> None:
        self._spec = spec
        self._kernels = kernels
        self._dtype = weights.embed.dtype
        self._layers: list[LayerArgs] = []
        self._packed: list[Packed] = []
        self._norms: list[Tensor] = []
        for layer, window in zip(weights.layers, spec.sliding_window, strict=True):
            self._layers.append(self._layer_args(layer, window))
        tied = weights.lm_head is weights.embed
        self._lm_head = Packed(kernels, weights.lm_head)
        weights.lm_head = self._lm_head.memory
        self._embed = None if tied else weights.embed
        if tied:
            weights.embed = weights.lm_head
        self._norm = weights.norm
        self._frequencies = inverse_frequencies(spec.rope, spec.head_dim)
        self._room: dict[str, Tensor] = {}

    def forward(self, batch: Batch, kv: KvCache) -> Tensor:
        """As `Transformer.forward`."""
        spec, kernels = self._spec, self._kernels
        num_tokens = batch.token_ids.numel()
        room = self._make_room(num_tokens)
        if self._embed is None:
            x = kernels.embed(self._lm_head, batch.token_ids)
        else:
            x = self._embed.index_select(0, batch.token_ids)
        cos, sin = kernels.angles(self._frequencies, batch.positions, spec.rope.attention_factor)
        query_starts = torch.tensor(batch.query_starts)
        context_lens = torch.tensor(batch.context_lens)
        tables = batch.block_tables
        assert tables.is_contiguous() and kv.data.dtype == self._dtype
        step = StepArgs(
            tokens=num_tokens,
            sequences=len(batch.context_lens),
            slots=batch.slots.data_ptr(),
            query_starts=query_starts.data_ptr(),
            context_lens=context_lens.data_ptr(),
            tables=tables.data_ptr(),
            max_blocks=tables.shape[1],
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            kv=kv.data.data_ptr(),
            block_stride=kv.data.stride(0),
            block_size=kv.block_size,
            heads=spec.num_heads,
            kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            scale=spec.head_dim**-0.5,
            eps=spec.rms_norm_eps,
            x=x.data_ptr(),
            dtype=DTYPES[self._dtype],
            threads=torch.get_num_threads(),
            **{name: tensor.data_ptr() for name, tensor in room.items()},
        )
        for index, layer in enumerate(self._layers):
            kernels.table.layer(layer, step, index)
        last = kernels.rms_norm(x.index_select(0, batch.sample_rows), self._norm, spec.rms_norm_eps)
        return kernels.linear(last, self._lm_head, wide=True)

    def _layer_args(self, layer: LayerWeights, window: int | None) -> LayerArgs:
        def norm(weight: Tensor | None) -> int:
            if weight is None:
                return 0
            self._norms.append(weight)
            return weight.data_ptr()

        def matrix(name: str) -> LinearArgs:
            packed = Packed(self._kernels, getattr(layer, name), getattr(layer, f"{name}_bias"))
            self._packed.append(packed)
            setattr(layer, name, packed.memory)  # lets go of the unpacked one
            return packed.args

        return LayerArgs(
            input_norm=norm(layer.input_norm),
            qkv=matrix("qkv"),
            q_norm=norm(layer.q_norm),
            k_norm=norm(layer.k_norm),
            o=matrix("o"),
            post_norm=norm(layer.post_norm),
            gate_up=matrix("gate_up"),
            down=matrix("down"),
            window=window or 0,
        )

    def _make_room(self, num_tokens: int) -> dict[str, Tensor]:
        """What the layers compute in, large enough for `num_tokens`; kept for the next step."""
        if not self._room or self._room["normed"].shape[0] < num_tokens:
            spec = self._spec
            widths = {
                "normed": spec.hidden_size,
                "qkv": (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim,
                "attended": spec.num_heads * spec.head_dim,
                "gate_up": 2 * spec.intermediate_size,
                "inner": spec.intermediate_size,
            }
            self._room = {
                name: torch.empty((num_tokens, width), dtype=self._dtype)
                for name, width in widths.items()
            }
        return self._room
