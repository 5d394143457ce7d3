"""A tokenizer with one token a byte, so that any text has a known number of tokens."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
LETTERS = tuple(_ALPHABET.index(char) for char in "abcdefghijklmnopqrstuvwxyz")
"""Token ids whose text is one letter each."""


def write_tokenizer(directory: Path) -> None:
    """Put tokenizer.json, tokenizer_config.json and an empty config.json into `directory`."""
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(_ALPHABET)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    (directory / "config.json").write_text("{}")
