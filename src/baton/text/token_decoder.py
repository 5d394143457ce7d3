"""What bytes a token stands for, by the `decoder` section of tokenizer.json.

Decoding here is a concatenation: each token is a fixed string of bytes (the first token of a text
may differ), the bytes of all tokens are joined and read as UTF-8, and what is not valid UTF-8
becomes U+FFFD as Python's `errors="replace"` has it. So a stream can be decoded token by token in
constant time and gives what the whole gives, whatever the bytes.

`tokenizers` differs in one place: its ByteFallback turns *every* byte of a run of byte tokens into
U+FFFD if any byte of the run is bad, which no stream could reproduce without holding the whole
run back. Here a valid character beside a bad byte stays. On valid UTF-8 the two agree, and for
ByteLevel they always agree.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from baton.errors import ConfigError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
_SUPPORTED = "ByteLevel, ByteFallback, Metaspace, Replace, Fuse, Strip and Sequence"

# One decoder on one token; bytes are final and pass through later decoders untouched.
_Step = Callable[[str, bool], str | bytes]


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each of the 256 bytes, inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + rank): byte for rank, byte in enumerate(others)})
    return alphabet


_BYTE_LEVEL = _byte_level_alphabet()


def _byte_level(token: str, first: bool) -> bytes:
    try:
        return bytes([_BYTE_LEVEL[char] for char in token])
    except KeyError:  # an added token with characters outside the alphabet stands for itself
        return token.encode("utf-8")


def _byte_fallback(token: str, first: bool) -> str | bytes:
    match = _BYTE_TOKEN.match(token)
    return token if match is None else bytes([int(match[1], 16)])


def _joined_by_spaces(token: str, first: bool) -> str:
    return token if first else " " + token


class TokenDecoder:
    """Token text to bytes; `strip` = (character, how many) to drop at the start of a text."""

    def __init__(self, spec: object, where: str) -> None:
        """Compile the `decoder` object of tokenizer.json; `where` names the file in errors.

        Raises:
            ConfigError: a decoder that is malformed or not a per-token one.
        """
        self.strip: tuple[str, int] = ("", 0)
        self._steps: list[_Step] = []
        self._fused = False
        self._where = where
        if spec is None:
            self._steps.append(_joined_by_spaces)
        else:
            self._compile(spec)

    def to_bytes(self, token: str, first: bool) -> bytes:
        """Bytes of `token`; `first`: no other token comes before it in its text."""
        value: str | bytes = token
        for step in self._steps:
            if isinstance(value, bytes):
                break
            value = step(value, first)
        return value.encode("utf-8") if isinstance(value, str) else value

    def _compile(self, spec: object) -> None:
        kind = spec.get("type") if isinstance(spec, dict) else None
        if not isinstance(spec, dict) or not isinstance(kind, str):
            raise self._refusal("must be an object with a `type`")
        if kind == "Sequence":
            for inner in self._field(spec, "decoders", list):
                self._compile(inner)
        elif kind == "Fuse":
            self._fused = True
        elif kind == "Strip":
            self._compile_strip(spec)
        elif self._fused:
            raise self._refusal(f"has {kind} after Fuse; only Strip may follow it")
        elif kind == "ByteLevel":
            self._steps.append(_byte_level)
        elif kind == "ByteFallback":
            self._steps.append(_byte_fallback)
        elif kind == "Metaspace":
            self._compile_metaspace(spec)
        elif kind == "Replace":
            self._compile_replace(spec)
        else:
            raise self._refusal(f"has type {kind!r}; supported are {_SUPPORTED}")

    def _compile_strip(self, spec: dict[str, Any]) -> None:
        content = self._field(spec, "content", str)
        start, stop = self._field(spec, "start", int), self._field(spec, "stop", int)
        if start == stop == 0:
            return
        if not self._fused or stop != 0 or self.strip[1] or len(content) != 1:
            raise self._refusal("may hold one Strip, after Fuse, of one character, at the start")
        self.strip = (content, start)

    def _compile_metaspace(self, spec: dict[str, Any]) -> None:
        mark = self._field(spec, "replacement", str)
        if len(mark) != 1:
            raise self._refusal("has a Metaspace whose replacement is not one character")
        prepends = spec.get("prepend_scheme", "always") != "never"

        def metaspace(token: str, first: bool) -> str:
            return token.replace(mark, "" if first and prepends else " ")

        self._steps.append(metaspace)

    def _compile_replace(self, spec: dict[str, Any]) -> None:
        pattern = self._field(spec, "pattern", dict)
        old, new = self._field(pattern, "String", str), self._field(spec, "content", str)
        if not old:
            raise self._refusal("has a Replace with an empty pattern")
        self._steps.append(lambda token, first: token.replace(old, new))

    def _field(self, spec: dict[str, Any], name: str, kind: type) -> Any:
        value = spec.get(name)
        if not isinstance(value, kind):
            raise self._refusal(f"needs `{name}` of type {kind.__name__} in {sorted(spec)}")
        return value

    def _refusal(self, problem: str) -> ConfigError:
        return ConfigError(
            f"{self._where}: `decoder` {problem}. Baton streams text token by token and needs a"
            " decoder that works on each token by itself"
        )
