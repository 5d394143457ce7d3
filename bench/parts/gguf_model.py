"""A Hugging Face directory of the Llama family as one GGUF file in bf16, for llama.cpp.

Weights keep their bits. Rows of the query and key projections change places: llama.cpp rotates
neighbouring elements, checkpoints rotate the halves of a head. Prompts are sent as token ids, so
the tokenizer's pre-tokenization, for which llama.cpp knows a fixed list of names, does not matter.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np

from baton.errors import ModelError
from baton.model_spec import ModelSpec, load_model_spec

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GLOBAL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(directory: Path, file: Path) -> None:
    """Write `file` from the checkpoint in `directory`.

    Raises:
        ModelError: it is not a plain Llama in bf16.
    """
    spec = load_model_spec(directory)
    config = json.loads((directory / "config.json").read_text())
    if spec.architecture != "LlamaForCausalLM" or config.get("rope_scaling"):
        raise ModelError(f"{directory} is not a plain Llama")
    part = file.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_context_length(spec.max_position)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(spec.num_layers)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(float(config.get("rope_theta", 10_000.0)))
    writer.add_layer_norm_rms_eps(spec.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_vocab_size(spec.vocab_size)
    _add_tokenizer(writer, directory, config)
    for source in sorted(directory.glob("*.safetensors")):
        for name, bits in _tensors(source).items():
            _add_tensor(writer, spec, name, bits)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(file)


def _tensors(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file as their bf16 bits (uint16), mapped."""
    data = np.memmap(file, np.uint8, "r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    found = {}
    for name, entry in json.loads(data[8:start].tobytes()).items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "BF16":
            raise ModelError(f"{name} in {file} is {entry['dtype']}, not BF16")
        first, last = entry["data_offsets"]
        raw = data[start + first : start + last]
        found[name] = raw.view(np.uint16).reshape(entry["shape"])
    return found


def _add_tensor(writer: gguf.GGUFWriter, spec: ModelSpec, name: str, bits: np.ndarray) -> None:
    base = name.removesuffix(".weight")
    if base in _GLOBAL:
        target = _GLOBAL[base]
    else:
        _, _, index, part = base.split(".", 3)
        target = f"blk.{index}.{_LAYER[part]}"
    if base.endswith(("q_proj", "k_proj")):
        heads = spec.num_heads if base.endswith("q_proj") else spec.num_kv_heads
        halves = bits.reshape(heads, 2, spec.head_dim // 2, bits.shape[1])
        bits = halves.swapaxes(1, 2).reshape(bits.shape)
    if bits.ndim == 1:  # norms are fp32 there
        wide = (bits.astype(np.uint32) << 16).view(np.float32)
        writer.add_tensor(f"{target}.weight", wide)
    else:
        raw = np.ascontiguousarray(bits).view(np.uint8)
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(f"{target}.weight", raw, raw_dtype=kind)


def _add_tokenizer(writer: gguf.GGUFWriter, directory: Path, config: dict[str, int]) -> None:
    data = json.loads((directory / "tokenizer.json").read_text())
    vocab = dict(data["model"]["vocab"])
    special = {token["content"]: token["id"] for token in data["added_tokens"]}
    by_id = {index: token for token, index in (vocab | special).items()}
    size = config["vocab_size"]
    tokens = [by_id.get(i, f"[unused{i}]") for i in range(size)]
    control = {i for i, token in enumerate(tokens) if token in special}
    normal = gguf.TokenType.NORMAL
    kinds = [gguf.TokenType.CONTROL if i in control else normal for i in range(size)]
    merges = [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges or [f"{tokens[0]} {tokens[0]}"])  # none at all is refused
    writer.add_bos_token_id(config.get("bos_token_id", 0))
    writer.add_eos_token_id(config.get("eos_token_id", 0))
    writer.add_add_bos_token(False)
