"""What the supervisor writes: its own lines, its children's with a prefix, one status line."""

from __future__ import annotations

import sys
from typing import Final, TextIO

_COLOURS: Final = (36, 33, 32, 35, 34, 96, 93, 92, 95, 94)
_CLEAR: Final = "\r\x1b[K"


class Console:
    """Lines to `stream`; on a terminal with colours and a last line that is written over."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._is_terminal = self._stream.isatty()
        self._colours: dict[str, int] = {}
        self._status = ""

    def line(self, text: str) -> None:
        """A line of the supervisor's own."""
        self._write(f"{text}\n")

    def child_line(self, name: str, text: str) -> None:
        """A line of a child's output, without its newline."""
        prefix = f"[{name}]"
        if self._is_terminal:
            colour = self._colours.setdefault(name, _COLOURS[len(self._colours) % len(_COLOURS)])
            prefix = f"\x1b[{colour}m{prefix}\x1b[0m"
        self._write(f"{prefix} {text}\n")

    def status(self, text: str) -> None:
        """Replace the status line, or with "" remove it; nothing unless this is a terminal."""
        if self._is_terminal and text != self._status:
            self._status = text
            self._write("")

    def _write(self, text: str) -> None:
        if self._is_terminal:
            text = f"{_CLEAR}{text}{self._status}"
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            pass  # the reader of our output is gone; serving goes on
