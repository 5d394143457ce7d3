"""A random Llama-shaped checkpoint of half a billion parameters, written shard by shard."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from baton.model_spec import ModelSpec, load_model_spec
from parts.tokenizer_dir import write_tokenizer

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, VOCAB = 1536, 4096, 16, 24, 8, 32_000
MAX_POSITION = 4096


def write_model(directory: Path) -> ModelSpec:
    """Fill `directory` (about 1 GB, bf16); at most one layer is in memory at a time."""
    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(directory)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "max_position_embeddings": MAX_POSITION,
        "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "tie_word_embeddings": False,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    weight_map: dict[str, str] = {}
    shards = [{"model.embed_tokens.weight": (VOCAB, HIDDEN)}]
    shards += [_layer(index) for index in range(LAYERS)]
    shards += [{"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}]
    for number, shapes in enumerate(shards):
        file = f"model-{number:05}.safetensors"
        weight_map.update(dict.fromkeys(shapes, file))
        _write_shard(directory / file, shapes, rng)
    index = {"weight_map": weight_map}
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
        for shape in shapes.values():
            stream.write(_random_bf16(rng, shape))


def _layer(index: int) -> dict[str, tuple[int, ...]]:
    width = HIDDEN // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (width, HIDDEN),
        "self_attn.v_proj": (width, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER), "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }  # fmt: skip
    return {f"model.layers.{index}.{name}.weight": shape for name, shape in shapes.items()}


def _random_bf16(rng: np.random.Generator, shape: tuple[int, ...]) -> bytes:
    """Norms are 1; the rest has random sign and mantissa, and magnitudes from 2^-6 to 2^-5."""
    if len(shape) == 1:
        return np.full(shape, 0x3F80, np.uint16).tobytes()
    bits = rng.integers(0, 1 << 16, size=shape, dtype=np.uint16)
    bits &= 0x807F
    bits |= 121 << 7
    return bits.tobytes()
