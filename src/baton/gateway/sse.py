"""Server-sent events as OpenAI frames them: `data: JSON`, a blank line; `[DONE]` at the end."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

HEADERS: list[tuple[bytes, bytes]] = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
DONE = b"data: [DONE]\n\n"

_encoder = msgspec.json.Encoder()


def events(messages: Iterable[msgspec.Struct]) -> bytes:
    """One event for each message, joined, so that they cost one write.

    The encoder escapes line feeds, so a message never breaks its frame.
    """
    buffer = bytearray()
    for message in messages:
        buffer += b"data: "
        _encoder.encode_into(message, buffer, -1)
        buffer += b"\n\n"
    return bytes(buffer)
