"""Shapes of published models, for plans without a checkpoint at hand; from their config.json.

Counts are those of the models' own configurations; latent attention is counted by its projections
and its cached latent, linear attention (Qwen3.5) as layers that read no KV.
"""

from __future__ import annotations

import difflib

from baton.core.cost import ModelShape
from baton.errors import ConfigError


def _dense(name: str, *sizes: int, mlp_matrices: int = 3) -> ModelShape:
    return ModelShape(name, *sizes, mlp_matrices=mlp_matrices)


_KNOWN: tuple[ModelShape, ...] = (
    _dense("Llama-2-7B", 32, 4096, 32, 32, 128, 11008, 32000),
    _dense("Llama-2-13B", 40, 5120, 40, 40, 128, 13824, 32000),
    _dense("Llama-2-70B", 80, 8192, 64, 8, 128, 28672, 32000),
    _dense("Llama-3.1-8B", 32, 4096, 32, 8, 128, 14336, 128256),
    _dense("Llama-3.1-70B", 80, 8192, 64, 8, 128, 28672, 128256),
    _dense("Mistral-7B", 32, 4096, 32, 8, 128, 14336, 32000),
    _dense("Yi-34B", 60, 7168, 56, 8, 128, 20480, 64000),
    _dense("Qwen3-32B", 64, 5120, 64, 8, 128, 25600, 151936),
    _dense("OPT-13B", 40, 5120, 40, 40, 128, 20480, 50272, mlp_matrices=2),
    _dense("OPT-66B", 64, 9216, 72, 72, 128, 36864, 50272, mlp_matrices=2),
    _dense("OPT-175B", 96, 12288, 96, 96, 128, 49152, 50272, mlp_matrices=2),
    _dense("BLOOM-176B", 70, 14336, 112, 112, 128, 57344, 250880, mlp_matrices=2),
    ModelShape(
        "Qwen3-30B-A3B", 48, 2048, 32, 4, 128, 0, 151936,
        num_experts=128, experts_per_token=8, expert_size=768,
    ),
    ModelShape(
        "Qwen3-235B-A22B", 94, 4096, 64, 4, 128, 0, 151936,
        num_experts=128, experts_per_token=8, expert_size=1536,
    ),
    ModelShape(
        "Qwen3.5-397B-A17B", 60, 4096, 32, 2, 256, 0, 248320,
        num_experts=512, experts_per_token=10, expert_size=1024, num_shared=1,
        window=1, num_window_layers=45,
    ),
    ModelShape(
        "gpt-oss-120b", 36, 2880, 64, 8, 64, 0, 201088,
        num_experts=128, experts_per_token=4, expert_size=2880, window=128, num_window_layers=18,
    ),
    ModelShape(
        "MiniMax-M2.5", 62, 3072, 48, 8, 128, 0, 200064,
        num_experts=256, experts_per_token=8, expert_size=1536,
    ),
    ModelShape(
        "DeepSeek-V3", 61, 7168, 128, 1, 192, 18432, 129280,
        num_experts=256, experts_per_token=8, expert_size=2048, num_shared=1, num_dense_layers=3,
        attention_weights=187_105_280, kv_elements=576,
    ),
    ModelShape(
        "Kimi-K2.5", 61, 7168, 64, 1, 192, 18432, 163840,
        num_experts=384, experts_per_token=8, expert_size=2048, num_shared=1, num_dense_layers=1,
        attention_weights=101_122_048, kv_elements=576,
    ),
    ModelShape(
        "GLM-5", 78, 6144, 64, 1, 256, 12288, 154880,
        num_experts=256, experts_per_token=8, expert_size=2048, num_shared=1, num_dense_layers=3,
        attention_weights=165_019_648, kv_elements=576, window=2048, num_window_layers=78,
    ),
)  # fmt: skip

MODELS: dict[str, ModelShape] = {shape.name.lower(): shape for shape in _KNOWN}

_ALIASES = {
    "deepseek-r1": "deepseek-v3",
    "deepseek-v3.1": "deepseek-v3",
    "deepseek-r1-0528": "deepseek-v3",
    "kimi-k2": "kimi-k2.5",
}
_SUFFIXES = ("-fp8", "-nvfp4", "-instruct", "-instruct-2507", "-bf16")


def find_model(name: str) -> ModelShape:
    """The shape of a published model, by its name or its path on the hub, in 16 bits.

    Raises:
        ConfigError: it is not known; the nearest and all names are told.
    """
    known = name.strip().rstrip("/").rpartition("/")[2].lower()
    trimmed = True
    while known not in MODELS and trimmed:
        known = _ALIASES.get(known, known)
        suffix = next((end for end in _SUFFIXES if known.endswith(end)), "")
        trimmed = bool(suffix)
        known = known.removesuffix(suffix)
    found = MODELS.get(known)
    if found is None:
        near = difflib.get_close_matches(known, MODELS, 1, cutoff=0.5)
        hint = f"; did you mean {MODELS[near[0]].name}?" if near else ""
        names = ", ".join(shape.name for shape in _KNOWN)
        raise ConfigError(
            f"the shape of model {name!r} is not known{hint} Give its directory, or one of {names}."
        )
    return found
