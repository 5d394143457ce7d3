"""Small tokenizers of the shapes real models have, made on the spot.

Each function returns a `tokenizers.Tokenizer`; `write_model_dir` puts one into a directory as a
checkpoint would hold it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Hello, world! It's 2024.\n",
    "def main(argv: list[str]) -> int:\n    return 0\n\n\tx = {'a': 1}\n",
    "日本語のテキスト。你好,世界!안녕하세요 세계. Привет, мир!\n",
    "Emoji 😀 👩‍👩‍👧 🇩🇪 👍🏽 and café naïve e\u0301 नमस्ते\n",
] * 3

BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_GPT4_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level_bpe(vocab_size: int = 400) -> Tokenizer:
    """As Llama 3 and Qwen have it: byte-level BPE, ids 0..3 special, `<s>` put first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_GPT4_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    tokenizer.post_processor = _bos_first(tokenizer)
    return tokenizer


def byte_fallback_bpe(vocab_size: int = 200) -> Tokenizer:
    """As Llama 2 and Mistral have it: `▁` for spaces, one put before every text, and a token for
    each byte that the vocabulary cannot spell otherwise (here: most of CJK and emoji)."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, limit_alphabet=90, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    learned = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *BYTE_TOKENS]
    tokens += sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: id for id, token in enumerate(tokens)},
            merges=[tuple(merge) for merge in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = _bos_first(tokenizer)
    return tokenizer


def byte_fallback_unigram() -> Tokenizer:
    """A sentencepiece Unigram with byte fallback and Metaspace; no post-processor."""
    pieces = [
        "▁the",
        "▁quick",
        "he",
        "ll",
        "o",
        "▁",
        "▁▁",
        "日本",
        "語",
        "😀",
        "é",
        "\u0301",
        "a▁b",
    ]
    letters = sorted(set("abcdefghijklmnopqrstuvwxyzTHE.,!0123456789\n") - set(pieces))
    tokens = ["<unk>", "<s>", "</s>", *BYTE_TOKENS, *pieces, *letters]
    tokenizer = Tokenizer(
        models.Unigram(
            vocab=[(token, -1.0 - len(tokens) / (1 + len(token))) for token in tokens],
            unk_id=0,
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def write_model_dir(
    directory: Path, tokenizer: Tokenizer, config: dict[str, Any] | None = None
) -> Path:
    """tokenizer.json and a tokenizer_config.json with a ChatML-like template; `config` adds to or
    replaces the fields of the latter. Returns `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    fields = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "special": True},
        "chat_template": CHAT_TEMPLATE,
        **(config or {}),
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(fields), encoding="utf-8")
    return directory


def _bos_first(tokenizer: Tokenizer) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single="<s> $A",
        pair="<s> $A <s> $B",
        special_tokens=[("<s>", tokenizer.token_to_id("<s>"))],
    )


SHAPES = {
    "byte_level_bpe": byte_level_bpe,
    "byte_fallback_bpe": byte_fallback_bpe,
    "byte_fallback_unigram": byte_fallback_unigram,
}
