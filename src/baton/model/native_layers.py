"""The decoder layers on the CPU kernels: one call a layer, over weights packed once.

A token's result depends on its own context and nothing else: not on what else is in the batch, on
how the prompt was cut into chunks, on prefill or decode, on blocks, or on threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from baton.model import huge_pages
from baton.model.batch import Batch
from baton.model.kv_cache import KvCache
from baton.model.native import DTYPES, LayerArgs, StepArgs
from baton.model.packed import PackedWeights
from baton.model.rope import inverse_frequencies
from baton.model_spec import ModelSpec

_NORMS = ("input_norm", "q_norm", "k_norm", "post_norm")
_MATRICES = ("qkv", "o", "gate_up", "down")


class NativeLayers:
    """The layers of `spec` on packed `weights`, which are only read."""

    def __init__(self, spec: ModelSpec, weights: PackedWeights) -> None:
        self.progress = 0  # see `Transformer.progress`
        self._spec = spec
        self._weights = weights  # the layers point into them
        self._kernels = weights.kernels
        self._dtype = weights.dtype
        self._layers = [
            _layer_args(weights, index, window) for index, window in enumerate(spec.sliding_window)
        ]
        self._lm_head = weights.matrix("lm_head")
        self._embed = weights.tensor("embed")  # None when it is tied
        norm = weights.tensor("norm")
        assert norm is not None
        self._norm = norm
        self._frequencies = inverse_frequencies(spec.rope, spec.head_dim)
        self._room: dict[str, Tensor] = {}

    def forward(self, batch: Batch, kv: KvCache) -> Tensor:
        """As `Transformer.forward`."""
        spec, kernels = self._spec, self._kernels
        num_tokens = batch.token_ids.numel()
        room = self._make_room(num_tokens)
        x = room["x"][:num_tokens]
        if self._embed is None:
            kernels.embed(self._lm_head, batch.token_ids, out=x)
        else:
            torch.index_select(self._embed, 0, batch.token_ids, out=x)
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
            dtype=DTYPES[self._dtype],
            threads=torch.get_num_threads(),
            **{name: tensor.data_ptr() for name, tensor in room.items()},
        )
        for index, layer in enumerate(self._layers):
            self.progress += 1
            kernels.table.layer(layer, step, index)
        last = kernels.rms_norm(x.index_select(0, batch.sample_rows), self._norm, spec.rms_norm_eps)
        return kernels.linear(last, self._lm_head, wide=True)

    def _make_room(self, num_tokens: int) -> dict[str, Tensor]:
        """What the layers compute in, large enough for `num_tokens`; kept for the next step."""
        if not self._room or self._room["normed"].shape[0] < num_tokens:
            spec = self._spec
            widths = {
                "x": spec.hidden_size,
                "normed": spec.hidden_size,
                "qkv": (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim,
                "attended": spec.num_heads * spec.head_dim,
                "gate_up": 2 * spec.intermediate_size,
                "inner": spec.intermediate_size,
            }
            self._room = {
                name: huge_pages.empty((num_tokens, width), self._dtype)
                for name, width in widths.items()
            }
        return self._room


def _layer_args(weights: PackedWeights, index: int, window: int | None) -> LayerArgs:
    return LayerArgs(
        **{name: weights.address(f"{index}.{name}") for name in _NORMS},
        **{name: weights.matrix(f"{index}.{name}").args for name in _MATRICES},
        window=window or 0,
    )
