"""A tokenizer with one token a byte, so that any text has a known number of tokens."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
NUM_BYTES = len(_ALPHABET)
"""Ids below are bytes; those from here on are whole words, which no text is encoded to."""
LETTERS = tuple(_ALPHABET.index(char) for char in "abcdefghijklmnopqrstuvwxyz")
"""Token ids whose text is one letter each."""


def vocabulary(size: int = NUM_BYTES) -> list[str]:
    """Each id's token, in the byte-level alphabet: the bytes, then a word for each further id."""
    return _ALPHABET + [f"Ġw{i}" for i in range(NUM_BYTES, size)]


def write_tokenizer(directory: Path, vocab_size: int = NUM_BYTES) -> None:
    """Put tokenizer.json, tokenizer_config.json and an empty config.json into `directory`."""
    tokens = {token: i for i, token in enumerate(vocabulary(vocab_size))}
    tokenizer = Tokenizer(models.BPE(tokens, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text("{}")
