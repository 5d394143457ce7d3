"""Tiny checkpoints that can be served: random weights with a tokenizer of the right size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from numerics.tiny_models import make_checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


def make_served_checkpoint(
    path: Path, variant: str, *, vocab_size: int = 256, **fields: Any
) -> Path:
    """A checkpoint of `variant` whose tokenizer has one token a byte, 256 in all."""
    make_checkpoint(path, variant, vocab_size=vocab_size, **fields)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    return path
