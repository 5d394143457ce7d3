"""Reading an OpenAI stream: server-sent events, and what one event says.

httpx's own line splitting breaks at U+2028 and its like, which JSON may hold unescaped; only line
feeds end a line here.
"""

from __future__ import annotations

from typing import Any

import msgspec

DONE = b"[DONE]"


class SseParser:
    """Cuts a byte stream into events, wherever the network cut it."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[bytes]:
        """The `data` of each event that `chunk` completes; several data lines are joined by LF."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        events: list[bytes] = []
        for raw in lines:
            line = raw.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class StreamEvent(msgspec.Struct):
    """One chunk of a streamed completion or chat completion; unknown fields are ignored."""

    choices: list[_Choice] = []
    usage: Usage | None = None
    error: Any = None

    @property
    def text(self) -> str:
        """The visible text of all choices in this chunk."""
        parts = (c.text if c.delta is None else c.delta.content for c in self.choices)
        return "".join(part or "" for part in parts)

    @property
    def has_text(self) -> bool:
        """Whether this chunk holds something that a user or a tool would see."""
        for choice in self.choices:
            delta = choice.delta or _Delta()
            if choice.text or delta.content or delta.tool_calls:
                return True
            if delta.reasoning_content or delta.reasoning:
                return True
        return False

    @property
    def num_token_ids(self) -> int | None:
        """How many generated tokens came with this chunk; None if it does not tell."""
        told = [len(c.token_ids) for c in self.choices if c.token_ids is not None]
        return sum(told) if told else None

    @property
    def finish_reason(self) -> str | None:
        return next((c.finish_reason for c in self.choices if c.finish_reason), None)

    @property
    def error_text(self) -> tuple[str, str] | None:
        """(code, message) of an error event, else None."""
        if self.error is None:
            return None
        return error_of(self.error)


_DECODER = msgspec.json.Decoder(StreamEvent)


def decode_event(data: bytes) -> StreamEvent:
    """Read one event's data.

    Raises:
        msgspec.MsgspecError: it is not an OpenAI chunk.
    """
    return _DECODER.decode(data)


def error_of(error: object) -> tuple[str, str]:
    """(code, message) of the `error` object of an OpenAI response or event, whatever its shape."""
    if not isinstance(error, dict):
        return "error", str(error)
    code = error.get("code") or error.get("type") or "error"
    return str(code), str(error.get("message") or error)


def error_in_body(body: bytes) -> tuple[str, str]:
    """(code, message) of an error response; a body that is not OpenAI's shape is quoted."""
    try:
        parsed = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return "error", body[:200].decode("utf-8", "replace").strip()
    if isinstance(parsed, dict) and "error" in parsed:
        return error_of(parsed["error"])
    return error_of(parsed)
