"""Reads the small JSON files that stand beside a checkpoint's weights.

Nothing here is cached: the caller reads once, at start.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from baton.errors import ConfigError

_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
)
_LISTED = ("additional_special_tokens", "extra_special_tokens")


def read_text(path: Path) -> str | None:
    """The UTF-8 text of `path`, None if there is no such file.

    Raises:
        ConfigError: it is there and cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}; restore the file") from error


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, None if there is no such file.

    Raises:
        ConfigError: it is there and is unreadable, not JSON, or not an object.
    """
    text = read_text(path)
    if text is None:
        return None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not valid JSON ({error}); copy it again from the original checkpoint"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


class SpecialTokens:
    """The special tokens that `tokenizer_config.json` and `special_tokens_map.json` name.

    `named` maps `bos_token`, `eos_token`, … to their text; `extra` are those without a role.
    `tokenizer_config.json` wins where both files speak.
    """

    def __init__(self, directory: Path) -> None:
        self.named: dict[str, str] = {}
        self.extra: tuple[str, ...] = ()
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            path = directory / name
            config = read_json(path) or {}
            for role in _NAMED:
                if config.get(role) is not None:
                    self.named[role] = _content(config[role], path, role)
            for field in _LISTED:
                listed = config.get(field)
                if isinstance(listed, dict):
                    listed = list(listed.values())
                if isinstance(listed, list) and listed:
                    self.extra = tuple(_content(entry, path, field) for entry in listed)


def _content(entry: object, path: Path, field: str) -> str:
    """Both spellings of a token: a string, and an object with `content`."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    if not isinstance(text, str):
        raise ConfigError(f"{path}: {field} must be a string or an object with `content`")
    return text
