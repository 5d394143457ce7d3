from __future__ import annotations

import json
from pathlib import Path

import pytest

from baton.errors import ModelError
from baton.model_spec import ModelSpec, RopeSpec, load_model_spec

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def read(path: Path, generation: dict | None = None, **changes) -> ModelSpec:
    """The spec of LLAMA with `changes`; a field set to `...` is left out."""
    config = {k: v for k, v in (LLAMA | changes).items() if v is not ...}
    (path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return load_model_spec(path)


def qwen2(**changes) -> dict:
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **changes}


def test_llama(tmp_path):
    assert read(tmp_path) == ModelSpec(
        architecture="LlamaForCausalLM",
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=160,
        num_layers=4,
        num_heads=8,
        num_kv_heads=2,
        head_dim=8,
        max_position=2048,
        rms_norm_eps=1e-5,
        rope=RopeSpec(theta=500000.0),
        qk_norm=False,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        sliding_window=(None,) * 4,
        tie_word_embeddings=False,
        dtype="bfloat16",
        bos_ids=(1,),
        eos_ids=(2,),
    )


def test_sizes(tmp_path):
    spec = read(tmp_path)
    assert spec.kv_bytes_per_token() == 2 * 4 * 2 * 8 * 2
    assert spec.kv_bytes_per_token("float32") == 2 * spec.kv_bytes_per_token()
    layer = 64 * (64 + 16 + 16) + 64 * 64 + 3 * 64 * 160 + 2 * 64
    assert spec.num_parameters() == 4 * layer + 64 + 2 * 1000 * 64
    assert read(tmp_path, tie_word_embeddings=True).num_parameters() == 4 * layer + 64 + 64000


def test_defaults_are_those_of_each_architecture(tmp_path):
    silent = {"num_key_value_heads": ..., "num_attention_heads": 32, "rope_theta": ...}
    spec = read(tmp_path, **silent, architectures=..., model_type="llama", rms_norm_eps=...)
    assert (spec.num_kv_heads, spec.head_dim) == (32, 2)
    assert (spec.rms_norm_eps, spec.rope.theta) == (1e-6, 10_000.0)
    mistral = read(tmp_path, **silent, architectures=["MistralForCausalLM"], model_type="mistral")
    assert (mistral.num_kv_heads, mistral.sliding_window) == (8, (4096,) * 4)
    qwen3 = read(tmp_path, **silent, architectures=["Qwen3ForCausalLM"], model_type="qwen3")
    assert (qwen3.num_kv_heads, qwen3.head_dim, qwen3.qk_norm) == (32, 128, True)
    assert (qwen3.qkv_bias, qwen3.o_bias) == (False, False)
    null = read(tmp_path, **qwen2(num_key_value_heads=None, head_dim=None))
    assert (null.num_kv_heads, null.head_dim) == (8, 8)
    assert (null.qkv_bias, null.o_bias, null.qk_norm) == (True, False, False)


def test_biases(tmp_path):
    spec = read(tmp_path, attention_bias=True, mlp_bias=True)
    assert (spec.qkv_bias, spec.o_bias, spec.mlp_bias) == (True, True, True)


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"sliding_window": 16}, (None,) * 4),  # without use_sliding_window
        ({"use_sliding_window": True, "sliding_window": None}, (None,) * 4),
        (
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3},
            (None, None, None, 16),
        ),
        ({"use_sliding_window": True, "max_window_layers": 0}, (4096,) * 4),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 16,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (16, None, 16, None),
        ),
    ],
)
def test_windows_of_qwen2(tmp_path, changes, windows):
    assert read(tmp_path, **qwen2(**changes)).sliding_window == windows


def test_dtype_in_both_spellings(tmp_path):
    assert read(tmp_path, dtype="float16").dtype == "float16"
    assert read(tmp_path, torch_dtype="torch.float32").dtype == "float32"
    assert read(tmp_path, torch_dtype=...).dtype == "float32"


def test_generation_config_decides_on_end_tokens(tmp_path):
    spec = read(tmp_path, {"eos_token_id": [7, 8], "temperature": 0.6})
    assert (spec.bos_ids, spec.eos_ids) == ((1,), (7, 8))
    assert read(tmp_path, {"eos_token_id": None}).eos_ids == (2,)
    assert read(tmp_path, {}, eos_token_id=...).eos_ids == ()


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}


@pytest.mark.parametrize(
    ("scaling", "rope", "max_position"),
    [
        ({"type": "linear", "factor": 2}, RopeSpec("linear", 5e5, 2.0), 2048),
        ({"rope_type": "dynamic", "factor": 2.0}, RopeSpec("dynamic", 5e5, 2.0), 2048),
        (
            {
                "rope_type": "llama3",
                "type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            },
            RopeSpec("llama3", 5e5, 8.0, 512, low_freq_factor=1.0, high_freq_factor=4.0),
            2048,
        ),
        (YARN, RopeSpec("yarn", 5e5, 4.0, 2048, attention_factor=1.1386294361119891), 8192),
        (
            YARN | {"original_max_position_embeddings": 512, "attention_factor": 1.5},
            RopeSpec("yarn", 5e5, 4.0, 512, attention_factor=1.5),
            2048,
        ),
        (
            {"rope_type": "yarn", "original_max_position_embeddings": 1024, "factor": None},
            RopeSpec("yarn", 5e5, 2.0, 1024, attention_factor=1.0693147180559945),
            2048,
        ),
        ({"rope_type": "default"}, RopeSpec(theta=5e5), 2048),
    ],
)
def test_rope_in_both_spellings(tmp_path, scaling, rope, max_position):
    old = read(tmp_path, rope_scaling=scaling)
    assert (old.rope, old.max_position) == (rope, max_position)
    new = read(tmp_path, rope_parameters={"rope_theta": 5e5, **scaling}, rope_theta=...)
    assert (new.rope, new.max_position) == (rope, max_position)


MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "architectures"),
        ({"architectures": ..., "model_type": ...}, "architectures"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"architectures": [["x"]]}, "architectures"),
        ({"model_type": "mixtral"}, "model_type"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"num_experts": 64}, "num_experts"),
        ({"moe_intermediate_size": 64}, "moe_intermediate_size"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"auto_map": {"AutoModelForCausalLM": "x.Y"}}, "auto_map"),
        ({"hidden_size": ...}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"vocab_size": True}, "vocab_size"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, "num_attention_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype"),
        ({"dtype": "int8"}, "dtype"),
        ({"sliding_window": 128}, "sliding_window"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        (MISTRAL | {"layer_types": ["full_attention"] * 4}, "layer_types"),
        (MISTRAL | {"sliding_window": 0}, "sliding_window"),
        (qwen2(layer_types=["full_attention"] * 3), "layer_types"),
        (qwen2(layer_types=["chunked_attention"] * 4), "layer_types"),
        (qwen2(max_window_layers=-1), "max_window_layers"),
        ({"eos_token_id": 1000}, "eos_token_id"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1]}}, "rope_type"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_type"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "mrope_section": []}}, "mrope"),
        ({"rope_scaling": YARN | {"beta_slow": "x"}}, "beta_slow"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 4,
                    "high_freq_factor": 4,
                }
            },
            "high_freq_factor",
        ),
    ],
)
def test_unsupported_fields_are_named(tmp_path, changes, named):
    with pytest.raises(ModelError, match=rf"\b{named}"):
        read(tmp_path, **changes)


def test_what_the_architecture_ignores_is_ignored(tmp_path):
    plain = read(tmp_path)
    harmless = {
        "attention_dropout": 0.1,
        "use_cache": False,
        "pretraining_tp": 2,
        "_name_or_path": "x",
        "unsloth_version": "1",
        "partial_rotary_factor": 1.0,
        "quantization_config": None,
        "layer_types": ["full_attention"] * 4,
        "rope_scaling": None,
        "auto_map": {"AutoTokenizer": "x.Y"},
    }
    assert read(tmp_path, **harmless) == plain


def test_files_that_are_none(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        load_model_spec(tmp_path)
    for text in ("{", "[]", '{"a": NaN}', ""):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match=r"config\.json is not a JSON object"):
            load_model_spec(tmp_path)
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        read(tmp_path, {"eos_token_id": "end"})
