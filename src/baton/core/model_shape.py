"""What a model weighs and computes, as far as the time of a step depends on it."""

from __future__ import annotations

import msgspec

from baton.model_spec.spec import DTYPE_BYTES, ModelSpec


class ModelShape(msgspec.Struct, frozen=True):
    """Sizes of a decoder-only model; also of such as Baton cannot run (experts, latent KV).

    name: the family or checkpoint. weight_bytes, kv_bytes: bytes of a weight and of an element of
    KV; quantised ones may be fractions. An expert has `expert_size` inner neurons; `num_shared`
    experts see every token, as does the MLP of the first `num_dense_layers` layers.
    `attention_weights` (a layer) and `kv_elements` (a layer and token, not split by tensor
    parallelism) replace the usual counts where attention is latent. Of the layers,
    `num_window_layers` see the last `window` tokens only.
    """

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    weight_bytes: float = 2.0
    kv_bytes: float = 2.0
    mlp_matrices: int = 3
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    num_shared: int = 0
    num_dense_layers: int = 0
    attention_weights: int = 0
    kv_elements: int = 0
    window: int = 0
    num_window_layers: int = 0

    @property
    def attention_weights_per_layer(self) -> int:
        """Weights of the projections around attention."""
        if self.attention_weights:
            return self.attention_weights
        heads = 2 * self.num_heads + 2 * self.num_kv_heads
        return self.hidden_size * heads * self.head_dim

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers if self.num_experts else 0

    @property
    def expert_weights(self) -> int:
        """Weights of one expert of one layer."""
        return self.mlp_matrices * self.hidden_size * self.expert_size

    @property
    def dense_weights(self) -> int:
        """Weights in all layers that every token meets; without embeddings and head."""
        mlp = self.mlp_matrices * self.hidden_size * self.intermediate_size
        dense = (self.num_layers - self.num_moe_layers) * mlp
        shared = self.num_moe_layers * self.num_shared * self.expert_weights
        return self.num_layers * self.attention_weights_per_layer + dense + shared

    @property
    def num_weights(self) -> int:
        """All of them, the vocabulary's counted twice (embedding and head)."""
        experts = self.num_moe_layers * self.num_experts * self.expert_weights
        return self.dense_weights + experts + 2 * self.vocab_size * self.hidden_size

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes of KV that a token takes over all layers."""
        elements = self.kv_elements or 2 * self.num_kv_heads * self.head_dim
        return self.num_layers * elements * self.kv_bytes

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0


def model_shape(spec: ModelSpec, name: str = "", dtype: str | None = None) -> ModelShape:
    """The shape of a model that Baton runs, in `dtype` (the checkpoint's own if None)."""
    num_bytes = float(DTYPE_BYTES[dtype or spec.dtype])
    windows = [window for window in spec.sliding_window if window is not None]
    return ModelShape(
        name=name or spec.architecture,
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        intermediate_size=spec.intermediate_size,
        vocab_size=spec.vocab_size,
        weight_bytes=num_bytes,
        kv_bytes=num_bytes,
        window=min(windows, default=0),
        num_window_layers=len(windows),
    )
