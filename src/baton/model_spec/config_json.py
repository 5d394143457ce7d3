"""config.json and generation_config.json of the supported architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from baton.errors import ModelError
from baton.model_spec.fields import Count, Positive, TokenIds, convert, read_json
from baton.model_spec.rope import read_rope
from baton.model_spec.spec import DTYPE_BYTES, ModelSpec


class _Family(msgspec.Struct, frozen=True):
    """What tells the supported architectures apart."""

    model_type: str
    num_kv_heads: int | None = None  # when config.json is silent; None means num_heads
    head_dim: int | None = None  # likewise; None means hidden_size / num_heads
    qk_norm: bool = False
    qkv_bias: bool = False
    reads_attention_bias: bool = False
    reads_mlp_bias: bool = False
    windows: Literal["none", "all", "listed"] = "none"


_FAMILIES: dict[str, _Family] = {
    "LlamaForCausalLM": _Family("llama", reads_attention_bias=True, reads_mlp_bias=True),
    "MistralForCausalLM": _Family("mistral", num_kv_heads=8, windows="all"),
    "Qwen2ForCausalLM": _Family("qwen2", num_kv_heads=32, qkv_bias=True, windows="listed"),
    "Qwen3ForCausalLM": _Family(
        "qwen3",
        num_kv_heads=32,
        head_dim=128,
        qk_norm=True,
        reads_attention_bias=True,
        windows="listed",
    ),
}

# Fields of other models that change the computation, with the values under which they do not.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "quantization_config": (),
    "compression_config": (),
    "num_experts": (0,),
    "num_local_experts": (0, 1),
    "num_experts_per_tok": (0,),
    "n_routed_experts": (0,),
    "moe_intermediate_size": (0,),
    "kv_lora_rank": (),
    "partial_rotary_factor": (1.0,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "attention_multiplier": (),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "logits_scaling": (1.0,),
    "attention_chunk_size": (),
    "no_rope_layers": ([],),
    "clip_qkv": (),
    "alibi": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "vision_config": (),
    "audio_config": (),
}


class _Config(msgspec.Struct):
    """The fields of config.json that decide something. Null differs from absent where UNSET."""

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    max_position_embeddings: Count
    architectures: list[str] | None = None
    model_type: str | None = None
    num_key_value_heads: Count | UnsetType | None = UNSET
    head_dim: Count | UnsetType | None = UNSET
    rms_norm_eps: Positive = 1e-6
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    dtype: str | None = None
    torch_dtype: str | None = None
    rope_theta: Positive | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    original_max_position_embeddings: Count | None = None
    sliding_window: Count | UnsetType | None = UNSET
    use_sliding_window: bool = False
    max_window_layers: Annotated[int, msgspec.Meta(ge=0)] = 28
    layer_types: list[str] | None = None
    auto_map: dict[str, Any] | None = None
    bos_token_id: TokenIds = None
    eos_token_id: TokenIds = None


class _Generation(msgspec.Struct):
    """The fields of generation_config.json that decide something."""

    bos_token_id: TokenIds = None
    eos_token_id: TokenIds = None


def load_model_spec(path: Path) -> ModelSpec:
    """Read the model directory `path`.

    Raises:
        ModelError: a file is missing or not JSON, the architecture is unknown, or a field is
            missing, malformed or not supported; the message names it.
    """
    raw = read_json(path / "config.json")
    # First, since a model of another kind may lack the very fields that are required below.
    name = _architecture(raw.get("architectures"), raw.get("model_type"))
    family = _FAMILIES[name]
    config = convert(raw, _Config, "config.json")
    _refuse_unsupported(raw, config)
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    kv_heads = _or_default(config.num_key_value_heads, family.num_kv_heads) or heads
    if heads % kv_heads:
        raise ModelError(f"num_key_value_heads ({kv_heads}) does not divide {heads} heads")
    head_dim = _or_default(config.head_dim, family.head_dim)
    if head_dim is None:
        head_dim, rest = divmod(config.hidden_size, heads)
        if rest:
            raise ModelError(f"num_attention_heads ({heads}) does not divide hidden_size")
    if head_dim % 2:
        raise ModelError(f"head_dim ({head_dim}) must be even")
    rope, max_position = read_rope(
        config.rope_scaling,
        config.rope_parameters,
        theta=config.rope_theta,
        max_position=config.max_position_embeddings,
        original_max_position=config.original_max_position_embeddings,
    )
    attention_bias = family.reads_attention_bias and config.attention_bias
    bos_ids, eos_ids = _special_tokens(path, config)
    return ModelSpec(
        architecture=name,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position=max_position,
        rms_norm_eps=config.rms_norm_eps,
        rope=rope,
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias or attention_bias,
        o_bias=attention_bias,
        mlp_bias=family.reads_mlp_bias and config.mlp_bias,
        sliding_window=_windows(config, family),
        tie_word_embeddings=config.tie_word_embeddings,
        dtype=_dtype(config),
        bos_ids=bos_ids,
        eos_ids=eos_ids,
    )


def _or_default(value: int | UnsetType | None, default: int | None) -> int | None:
    return default if value is UNSET else value


def _architecture(named: object, model_type: object) -> str:
    if not named:
        named = [name for name, family in _FAMILIES.items() if family.model_type == model_type]
    match named:
        case [str(architecture)] if architecture in _FAMILIES:
            pass
        case _:
            raise ModelError(
                f"architectures {named!r} (model_type {model_type!r}) is not supported; "
                f"Baton serves {', '.join(_FAMILIES)}"
            )
    if model_type not in (None, _FAMILIES[architecture].model_type):
        raise ModelError(f"model_type is {model_type!r}, but architectures says {architecture}")
    return architecture


def _refuse_unsupported(raw: dict[str, Any], config: _Config) -> None:
    for name, neutral in _NEUTRAL.items():
        value = raw.get(name)
        if value is not None and value not in neutral:
            raise ModelError(f"{name} ({value!r}) is not supported")
    if config.hidden_act not in ("silu", "swish"):
        raise ModelError(f"hidden_act {config.hidden_act!r} is not supported; only silu is")
    code = (config.auto_map or {}).keys() & {"AutoModel", "AutoModelForCausalLM"}
    if code:
        raise ModelError(f"auto_map names code of its own for {min(code)}; Baton runs none")


def _dtype(config: _Config) -> str:
    name = "dtype" if config.dtype else "torch_dtype"
    dtype = (config.dtype or config.torch_dtype or "float32").removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise ModelError(f"{name} {dtype!r} is not supported; {', '.join(DTYPE_BYTES)} are")
    return dtype


def _windows(config: _Config, family: _Family) -> tuple[int | None, ...]:
    """One window (or None) a layer, by the rules of each architecture."""
    layers = config.num_hidden_layers
    if family.windows == "listed":
        # 4096 is what these configuration classes take for an absent window (null means none).
        window = _or_default(config.sliding_window, 4096) if config.use_sliding_window else None
        slides = [window is not None and i >= config.max_window_layers for i in range(layers)]
    else:
        window = _or_default(config.sliding_window, 4096 if family.windows == "all" else None)
        slides = [window is not None] * layers
        if window is not None and family.windows == "none":
            raise ModelError(f"sliding_window is not supported for {family.model_type}")
    if config.layer_types is not None:
        unknown = set(config.layer_types) - {"full_attention", "sliding_attention"}
        if unknown:
            raise ModelError(f"layer_types names {min(unknown)!r}, which is not supported")
        if len(config.layer_types) != layers:
            raise ModelError(f"layer_types has {len(config.layer_types)} entries, not {layers}")
        listed = [kind == "sliding_attention" for kind in config.layer_types]
        if any(listed) and window is None:
            raise ModelError("layer_types has sliding_attention, but no sliding_window is in use")
        if family.windows != "listed" and listed != slides:
            raise ModelError(f"layer_types contradicts what {family.model_type} computes")
        slides = listed
    return tuple(window if slide else None for slide in slides)


def _special_tokens(path: Path, config: _Config) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """bos and eos ids: what generation_config.json says, or config.json where it is silent."""
    file = path / "generation_config.json"
    generation = convert(read_json(file), _Generation, file.name) if file.exists() else None
    found: list[tuple[int, ...]] = []
    for name in ("bos_token_id", "eos_token_id"):
        value = getattr(generation, name, None)
        if value is None:
            value = getattr(config, name)
        ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
        if any(token >= config.vocab_size for token in ids):
            raise ModelError(f"{name} {value!r} is outside the vocabulary ({config.vocab_size})")
        found.append(ids)
    return found[0], found[1]
