"""Tiny random checkpoints of every architecture, made on the spot, and what transformers computes.

Biases and norm weights are random too (transformers starts them at 0 and 1, where a mistake in
them would not show), and the weights are large enough that greedy outputs vary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# name -> (transformers' model type, fields of its config beyond the common ones)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-mha-biases-tied": (
        "llama",
        {
            "num_key_value_heads": 4,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "llama-linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama-dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "llama-llama3": ("llama", {"rope_parameters": _LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": _YARN | {"original_max_position_embeddings": 256}}),
    "llama-yarn-mscale": (
        "llama",
        {
            "rope_parameters": _YARN
            | {
                "original_max_position_embeddings": 256,
                "beta_fast": 8.0,
                "beta_slow": 2.0,
                "mscale": 2.0,
                "mscale_all_dim": 0.5,
                "truncate": False,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": 24}),
    "mistral-unwindowed": ("mistral", {"sliding_window": None, "head_dim": 24}),
    "qwen2": ("qwen2", {"use_sliding_window": False, "tie_word_embeddings": True}),
    "qwen2-windowed": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-biases-windowed": (
        "qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}

VOCAB_SIZE = 199


def make_checkpoint(
    path: Path, variant: str, *, seed: int = 0, dtype: str = "float32", **fields: Any
) -> Path:
    """Write a random model of `variant` into the directory `path` and return it.

    It has 3 layers, hidden size 64, 4 heads on 2 KV heads, VOCAB_SIZE tokens, 1024 positions and
    no end-of-sequence token. `fields` override the config's. There is no tokenizer.
    """
    model_type, own = VARIANTS[variant]
    common = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    config = transformers.AutoConfig.for_model(model_type, **(common | own | fields))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.normal_(parameter, std=0.3)
            elif "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.to(getattr(torch, dtype)).save_pretrained(path)
    return path


def reference_model(path: Path) -> Any:
    """The checkpoint as transformers runs it, in fp32, attention written out."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.inference_mode()
def reference_logits(model: Any, prompt: Sequence[int]) -> torch.Tensor:
    """fp32 logits [len(prompt), VOCAB_SIZE] of one pass without a cache."""
    logits: torch.Tensor = model(torch.tensor([list(prompt)]), use_cache=False).logits[0]
    return logits.float()


def reference_greedy(model: Any, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The `num_tokens` most likely tokens, one after the other."""
    ids = torch.tensor([list(prompt)])
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
    )
    return found[0, ids.shape[1] :].tolist()


def is_greedy(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> bool:
    """Whether `answer` is the greedy continuation of `prompt`, token for token.

    One pass over prompt and answer decides it: each token must be the most likely one after those
    before it, which by induction is what greedy decoding would have chosen.
    """
    logits = reference_logits(model, [*prompt, *answer[:-1]])
    return logits[len(prompt) - 1 :].argmax(-1).tolist() == list(answer)
