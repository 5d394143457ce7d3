"""Random Llama-shaped checkpoints of real sizes, written shard by shard."""

from __future__ import annotations

import json
import math
from pathlib import Path

import msgspec
import numpy as np

from baton.model_spec import ModelSpec, load_model_spec
from parts.tokenizer_dir import NUM_BYTES, write_tokenizer


class Shape(msgspec.Struct, frozen=True):
    """The dimensions of a checkpoint; heads are of `hidden / heads` elements."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int = 32_000
    max_position: int = 8192


SHAPES = {
    "0.1B": Shape(hidden=768, inner=2048, layers=12, heads=12, kv_heads=4),
    "0.5B": Shape(hidden=1536, inner=4096, layers=16, heads=24, kv_heads=8),
    "1B": Shape(hidden=2048, inner=5632, layers=22, heads=32, kv_heads=4),
}


def write_model(directory: Path, shape: Shape = SHAPES["0.5B"]) -> ModelSpec:
    """Fill `directory` (bf16, 1 GB for 0.5B); at most one layer is in memory at a time."""
    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(directory, shape.vocab)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "vocab_size": shape.vocab, "hidden_size": shape.hidden, "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "max_position_embeddings": shape.max_position,
        "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "tie_word_embeddings": False,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    weight_map: dict[str, str] = {}
    table = (shape.vocab, shape.hidden)
    shards: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": table}]
    shards += [_layer(shape, index) for index in range(shape.layers)]
    shards += [{"model.norm.weight": (shape.hidden,), "lm_head.weight": table}]
    for number, shapes in enumerate(shards):
        file = f"model-{number:05}.safetensors"
        weight_map.update(dict.fromkeys(shapes, file))
        _write_shard(directory / file, shapes, rng)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return load_model_spec(directory)


def _write_shard(file: Path, shapes: dict[str, tuple[int, ...]], rng: np.random.Generator) -> None:
    """The safetensors format: length of the header, header (JSON), tensors one after the other."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            bits = _random_bf16(rng, shape)
            if name == "lm_head.weight":
                bits[:NUM_BYTES] = 0  # greedy answers hold words only: text with every token
            stream.write(bits.tobytes())


def _layer(shape: Shape, index: int) -> dict[str, tuple[int, ...]]:
    hidden, inner, width = shape.hidden, shape.inner, shape.hidden // shape.heads * shape.kv_heads
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (width, hidden),
        "self_attn.v_proj": (width, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    return {f"model.layers.{index}.{name}.weight": shape for name, shape in shapes.items()}


def _random_bf16(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Norms are 1; the rest has random sign and mantissa, and magnitudes from 2^-6 to 2^-5."""
    if len(shape) == 1:
        return np.full(shape, 0x3F80, np.uint16)
    bits = rng.integers(0, 1 << 16, size=shape, dtype=np.uint16)
    bits &= 0x807F
    bits |= 121 << 7
    return bits
