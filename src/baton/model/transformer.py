"""The decoder-only transformer of Llama, Mistral, Qwen2 and Qwen3.

Three bodies: plain torch, below, for any device and type; the CPU kernels (`native_layers`); and
the kernels for NVIDIA GPUs (`cuda_layers`). `bodies` chooses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from baton.model.attention import BACKENDS, Batch
from baton.model.bodies import TritonKernels
from baton.model.cuda_layers import CudaLayers
from baton.model.kv_cache import KvCache
from baton.model.layers import gated_mlp, rms_norm
from baton.model.native_layers import NativeLayers
from baton.model.packed import PackedWeights
from baton.model.rope import cos_sin, inverse_frequencies, rotate
from baton.model.weights import LayerWeights, Weights
from baton.model_spec import ModelSpec


class Transformer:
    """`spec` with its `weights`, on whatever device and in whatever type they are.

    With packed weights it runs on the CPU kernels that they were packed for.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights | PackedWeights,
        triton: TritonKernels | None = None,
        attention: str = "torch",
    ) -> None:
        self.spec = spec
        self._attend = BACKENDS[attention]
        self._scale = spec.head_dim**-0.5
        self._num_begun = 0
        self._layers: NativeLayers | CudaLayers | None = None
        if isinstance(weights, PackedWeights):
            self._layers = NativeLayers(spec, weights)
            return
        self.weights = weights
        if triton is not None:
            self._layers = CudaLayers(spec, weights, triton.exact)
            return
        frequencies = inverse_frequencies(spec.rope, spec.head_dim)
        self._frequencies = frequencies.to(weights.embed.device)

    @property
    def progress(self) -> int:
        """Layers begun so far, in all steps; any thread may read it while a step runs."""
        return self._num_begun if self._layers is None else self._layers.progress

    @torch.inference_mode()
    def prepare(self, kv: KvCache, max_num_seqs: int) -> None:
        """Do now what the first steps over `kv` would have to wait for; a CPU has nothing to do."""
        if isinstance(self._layers, CudaLayers):
            self._layers.record(kv, max_num_seqs)

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: KvCache) -> Tensor:
        """Compute the batch and write its K and V into `kv`.

        Returns:
            fp32 logits [len(batch.sample_rows), vocab_size].
        """
        body = self._torch_forward if self._layers is None else self._layers.forward
        logits = body(batch, kv)
        kv.mark()
        return logits

    def _torch_forward(self, batch: Batch, kv: KvCache) -> Tensor:
        weights, eps = self.weights, self.spec.rms_norm_eps
        x = F.embedding(batch.token_ids, weights.embed)
        cos, sin = cos_sin(
            self._frequencies, batch.positions, self.spec.rope.attention_factor, x.dtype
        )
        for index, layer in enumerate(weights.layers):
            self._num_begun += 1
            normed = rms_norm(x, layer.input_norm, eps)
            x = x + self._attention(normed, layer, index, batch, kv, cos, sin)
            normed = rms_norm(x, layer.post_norm, eps)
            x = x + gated_mlp(
                normed, layer.gate_up, layer.gate_up_bias, layer.down, layer.down_bias
            )
        x = rms_norm(x.index_select(0, batch.sample_rows), weights.norm, eps)
        return F.linear(x, weights.lm_head).float()

    def _attention(
        self,
        x: Tensor,
        layer: LayerWeights,
        index: int,
        batch: Batch,
        kv: KvCache,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        """Self-attention of one layer with its projections, [T, hidden] -> [T, hidden]."""
        spec = self.spec
        qkv = F.linear(x, layer.qkv, layer.qkv_bias).view(x.shape[0], -1, spec.head_dim)
        q, k, v = torch.split(qkv, [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], 1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = rms_norm(q, layer.q_norm, spec.rms_norm_eps)
            k = rms_norm(k, layer.k_norm, spec.rms_norm_eps)
        window = spec.sliding_window[index]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        found = self._attend(q, k, v, kv, index, batch, window, self._scale)
        return F.linear(found, layer.o, layer.o_bias)
