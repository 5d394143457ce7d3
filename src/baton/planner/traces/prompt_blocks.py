"""Shared prefixes from logged text: hashes of its blocks, each over all that stands before it.

Text, not tokens, is cut into blocks, so that no tokenizer is needed; two prompts share a block
exactly if they are equal up to its end. Only the hashes are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b

from baton.planner.traces.columns import look_up

BLOCK_CHARS = 64
_ID_BYTES = 7  # fits an int64, and half a billion blocks before two are likely to meet


def block_ids(text: str) -> tuple[int, ...]:
    """Ids of the full blocks of a text, chained."""
    ids = []
    chain = blake2b(digest_size=_ID_BYTES)
    for start in range(0, len(text) - BLOCK_CHARS + 1, BLOCK_CHARS):
        chain.update(text[start : start + BLOCK_CHARS].encode("utf-8", "surrogatepass"))
        ids.append(int.from_bytes(chain.digest()))
    return tuple(ids)


def prompt_text(entry: Mapping[str, object], places: tuple[str, ...]) -> str:
    """The prompt that a logged call holds, as one text: `messages` or `prompt`; else empty."""
    for at in places:
        messages = look_up(entry, at + "messages")
        if isinstance(messages, list):
            return "".join(_message_text(message) for message in messages)
        prompt = look_up(entry, at + "prompt")
        if isinstance(prompt, str):
            return prompt
    return ""


def _message_text(message: object) -> str:
    if not isinstance(message, dict):
        return ""
    content = message.get("content")
    if isinstance(content, list):  # parts: text, images
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(part for part in parts if isinstance(part, str))
    return f"\x01{message.get('role', '')}\x02{content if isinstance(content, str) else ''}"
