"""The shape of a model: frozen structs without behaviour beyond arithmetic."""

from __future__ import annotations

from typing import Literal

import msgspec

DTYPE_BYTES: dict[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4}

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn"]


class RopeSpec(msgspec.Struct, frozen=True):
    """Rotary embedding: base `theta` and how its frequencies are scaled.

    `original_max_position` is the length of pretraining, in tokens (llama3, yarn).
    `attention_factor` multiplies cos and sin; it is 1 except under yarn.

    `dynamic` has unscaled frequencies up to the model's `max_position`, and that is where Baton
    stops: beyond it they would depend on the current length, which keys that are already rotated
    and cached cannot follow.
    """

    type: RopeType = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


class ModelSpec(msgspec.Struct, frozen=True):
    """The shape of a decoder-only model.

    `max_position` is the longest sequence in tokens. `sliding_window` has one entry a layer: None
    sees everything, `w` sees the last `w` tokens, its own included. `dtype` is the checkpoint's,
    as torch names it. `eos_ids` end a sequence unless the client says otherwise.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float
    rope: RopeSpec
    qk_norm: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    sliding_window: tuple[int | None, ...]
    tie_word_embeddings: bool
    dtype: str
    bos_ids: tuple[int, ...] = ()
    eos_ids: tuple[int, ...] = ()

    def kv_bytes_per_token(self, dtype: str | None = None) -> int:
        """Bytes of K and V that one token takes over all layers (dtype: the model's own)."""
        width = self.num_kv_heads * self.head_dim
        return 2 * self.num_layers * width * DTYPE_BYTES[dtype or self.dtype]

    def num_parameters(self) -> int:
        """Weights in all, tied embeddings counted once."""
        hidden, q = self.hidden_size, self.num_heads * self.head_dim
        qkv = q + 2 * self.num_kv_heads * self.head_dim
        layer = hidden * qkv + q * hidden + 3 * hidden * self.intermediate_size + 2 * hidden
        layer += qkv * self.qkv_bias + hidden * self.o_bias + 2 * self.head_dim * self.qk_norm
        layer += (2 * self.intermediate_size + hidden) * self.mlp_bias
        embeddings = self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_layers * layer + hidden
