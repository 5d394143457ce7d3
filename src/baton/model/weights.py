"""The weights of a model as the forward pass wants them, and their names in a checkpoint.

Q, K and V are one matrix, and so are gate and up: one product each instead of three and two.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from baton.model_spec import ModelSpec


@dataclass(slots=True)
class LayerWeights:
    """One decoder layer; matrices are [out, in], None where the architecture has no such tensor."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    post_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


@dataclass(slots=True)
class Weights:
    """All weights; `lm_head` is `embed` itself when the two are tied."""

    embed: Tensor
    layers: list[LayerWeights]
    norm: Tensor
    lm_head: Tensor

    def nbytes(self) -> int:
        """Bytes on the device, tied tensors counted once."""
        tensors = [self.embed, self.norm]
        tensors += [self.lm_head] if self.lm_head is not self.embed else []
        for layer in self.layers:
            tensors += [t for f in fields(layer) if (t := getattr(layer, f.name)) is not None]
        return sum(tensor.nbytes for tensor in tensors)


def allocate(spec: ModelSpec, dtype: torch.dtype, device: str) -> tuple[Weights, dict[str, Tensor]]:
    """Uninitialised weights, and for each tensor of a checkpoint the view it belongs into.

    The parts of a fused matrix are views of it, so that filling them fuses without a copy.
    """
    targets: dict[str, Tensor] = {}

    def empty(name: str, *shape: int) -> Tensor:
        targets[name] = torch.empty(shape, dtype=dtype, device=device)
        return targets[name]

    def fused(prefix: str, parts: dict[str, int], suffix: str, *rest: int) -> Tensor:
        whole = torch.empty((sum(parts.values()), *rest), dtype=dtype, device=device)
        for part, view in zip(parts, torch.split(whole, list(parts.values())), strict=True):
            targets[f"{prefix}.{part}.{suffix}"] = view
        return whole

    hidden, inner, dim = spec.hidden_size, spec.intermediate_size, spec.head_dim
    q, kv = spec.num_heads * dim, spec.num_kv_heads * dim
    qkv = {"q_proj": q, "k_proj": kv, "v_proj": kv}
    gate_up = {"gate_proj": inner, "up_proj": inner}

    def layer(index: int) -> LayerWeights:
        at = f"model.layers.{index}"
        attn, mlp = f"{at}.self_attn", f"{at}.mlp"
        return LayerWeights(
            input_norm=empty(f"{at}.input_layernorm.weight", hidden),
            qkv=fused(attn, qkv, "weight", hidden),
            qkv_bias=fused(attn, qkv, "bias") if spec.qkv_bias else None,
            q_norm=empty(f"{attn}.q_norm.weight", dim) if spec.qk_norm else None,
            k_norm=empty(f"{attn}.k_norm.weight", dim) if spec.qk_norm else None,
            o=empty(f"{attn}.o_proj.weight", hidden, q),
            o_bias=empty(f"{attn}.o_proj.bias", hidden) if spec.o_bias else None,
            post_norm=empty(f"{at}.post_attention_layernorm.weight", hidden),
            gate_up=fused(mlp, gate_up, "weight", hidden),
            gate_up_bias=fused(mlp, gate_up, "bias") if spec.mlp_bias else None,
            down=empty(f"{mlp}.down_proj.weight", hidden, inner),
            down_bias=empty(f"{mlp}.down_proj.bias", hidden) if spec.mlp_bias else None,
        )

    embed = empty("model.embed_tokens.weight", spec.vocab_size, hidden)
    layers = [layer(index) for index in range(spec.num_layers)]
    norm = empty("model.norm.weight", hidden)
    tied = spec.tie_word_embeddings
    lm_head = embed if tied else empty("lm_head.weight", spec.vocab_size, hidden)
    return Weights(embed, layers, norm, lm_head), targets
