"""The weights of a model as the forward pass wants them, and their names in a checkpoint.

Q, K and V are one matrix, and so are gate and up: one product each instead of three and two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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
    """All weights; `lm_head` is `embed` itself when the two are tied.

    `fingerprint` tells checkpoints apart (`loader.weights_fingerprint`); empty if there was none.
    """

    embed: Tensor
    layers: list[LayerWeights]
    norm: Tensor
    lm_head: Tensor
    fingerprint: bytes = b""

    def nbytes(self) -> int:
        """Bytes on the device, tied tensors counted once."""
        tensors = [self.embed, self.norm]
        tensors += [self.lm_head] if self.lm_head is not self.embed else []
        for layer in self.layers:
            tensors += [t for f in fields(layer) if (t := getattr(layer, f.name)) is not None]
        return sum(tensor.nbytes for tensor in tensors)


@dataclass(slots=True, frozen=True)
class Entry:
    """One tensor of a model: the checkpoint's tensors that are its rows, one after the other.

    `name` is the field's, after the number of its layer if it is in one: `3.qkv`. `parts` are
    names in the checkpoint and their numbers of rows. A vector has no `width`.
    """

    name: str
    parts: dict[str, int]
    width: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.part_shape(sum(self.parts.values()))

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def part_shape(self, rows: int) -> tuple[int, ...]:
        """Of a part, or any other run of rows."""
        return (rows,) if self.width is None else (rows, self.width)


def entries(spec: ModelSpec) -> Iterator[Entry]:
    """What `spec` has, in the order of use; without `lm_head` when it is tied."""
    hidden, inner, dim = spec.hidden_size, spec.intermediate_size, spec.head_dim
    q, kv = spec.num_heads * dim, spec.num_kv_heads * dim
    matrices = {
        "qkv": ("self_attn", {"q_proj": q, "k_proj": kv, "v_proj": kv}, hidden, spec.qkv_bias),
        "o": ("self_attn", {"o_proj": hidden}, q, spec.o_bias),
        "gate_up": ("mlp", {"gate_proj": inner, "up_proj": inner}, hidden, spec.mlp_bias),
        "down": ("mlp", {"down_proj": hidden}, inner, spec.mlp_bias),
    }

    def layer(index: int) -> Iterator[Entry]:
        at = f"model.layers.{index}"

        def vector(name: str, tensor: str, size: int) -> Entry:
            return Entry(f"{index}.{name}", {f"{at}.{tensor}.weight": size})

        def matrix(name: str) -> Iterator[Entry]:
            block, rows, width, has_bias = matrices[name]
            for suffix, field, columns in (("weight", name, width), ("bias", f"{name}_bias", None)):
                if suffix == "weight" or has_bias:
                    parts = {f"{at}.{block}.{part}.{suffix}": n for part, n in rows.items()}
                    yield Entry(f"{index}.{field}", parts, columns)

        yield vector("input_norm", "input_layernorm", hidden)
        yield from matrix("qkv")
        if spec.qk_norm:
            yield vector("q_norm", "self_attn.q_norm", dim)
            yield vector("k_norm", "self_attn.k_norm", dim)
        yield from matrix("o")
        yield vector("post_norm", "post_attention_layernorm", hidden)
        yield from matrix("gate_up")
        yield from matrix("down")

    yield Entry("embed", {"model.embed_tokens.weight": spec.vocab_size}, hidden)
    for index in range(spec.num_layers):
        yield from layer(index)
    yield Entry("norm", {"model.norm.weight": hidden})
    if not spec.tie_word_embeddings:
        yield Entry("lm_head", {"lm_head.weight": spec.vocab_size}, hidden)


def allocate(spec: ModelSpec, dtype: torch.dtype, device: str) -> tuple[Weights, dict[str, Tensor]]:
    """Uninitialised weights, and for each tensor of a checkpoint the view it belongs into.

    The parts of a fused tensor are views of it, so that filling them fuses without a copy.
    """
    found: dict[str, Tensor] = {}
    targets: dict[str, Tensor] = {}
    for entry in entries(spec):
        found[entry.name] = torch.empty(entry.shape, dtype=dtype, device=device)
        views = torch.split(found[entry.name], list(entry.parts.values()))
        targets.update(zip(entry.parts, views, strict=True))
    layers = [
        LayerWeights(**{f.name: found.get(f"{index}.{f.name}") for f in fields(LayerWeights)})  # type: ignore[arg-type]
        for index in range(spec.num_layers)
    ]
    head = found.get("lm_head", found["embed"])
    return Weights(found["embed"], layers, found["norm"], head), targets
