"""A trace file as lines or as one JSON document; gzip is recognised by its first bytes.

Whatever is wrong with a file ends as a `ConfigError`; sizes are capped before they are read.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

import msgspec

from baton.errors import ConfigError

MAX_LINE_BYTES = 64 << 20
MAX_BYTES = 4 << 30
_GZIP = b"\x1f\x8b"


class Source:
    """One trace file. Nothing is kept open between calls."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __str__(self) -> str:
        return str(self.file)

    def lines(self) -> Iterator[tuple[int, str]]:
        """(line number from 1, text without its end) of every line that is not blank.

        Raises:
            ConfigError: the file cannot be read, or is no text, or is beyond the caps.
        """
        total = 0
        try:
            with self._open() as handle:
                for number, raw in enumerate(iter(lambda: handle.readline(MAX_LINE_BYTES), b""), 1):
                    total += len(raw)
                    if len(raw) == MAX_LINE_BYTES or total > MAX_BYTES:
                        raise ConfigError(self._too_long(number))
                    text = self._decode(raw, number)
                    if text.strip():
                        yield number, text.rstrip("\r\n")
        except (OSError, EOFError, zlib.error) as error:
            raise ConfigError(f"cannot read {self.file}: {_reason(error)}") from None

    def first_line(self) -> str:
        """The first line that is not blank.

        Raises:
            ConfigError: there is none.
        """
        for _, text in self.lines():
            return text
        raise ConfigError(f"{self.file} is empty: give a trace with one request a line")

    def document(self) -> object:
        """The whole file as one JSON value.

        Raises:
            ConfigError: it is not JSON, or cannot be read.
        """
        text = "\n".join(text for _, text in self.lines())
        try:
            return cast(object, msgspec.json.decode(text))
        except (msgspec.MsgspecError, RecursionError) as error:
            raise ConfigError(f"{self.file} is no JSON: {error}") from None

    def objects(self) -> Iterator[tuple[int, dict[str, object]]]:
        """(line number, object) of JSON lines.

        Raises:
            ConfigError: a line is not a JSON object.
        """
        for number, text in self.lines():
            try:
                value = cast(object, msgspec.json.decode(text))
            except (msgspec.MsgspecError, RecursionError) as error:
                raise ConfigError(
                    f"{self.file}, line {number}: no JSON ({error}); correct or delete the line"
                ) from None
            if not isinstance(value, dict):
                raise ConfigError(
                    f"{self.file}, line {number}: a JSON object is needed, such as "
                    '{"timestamp": 0, ...}; correct or delete the line'
                )
            yield number, value

    def header(self) -> list[str]:
        """The names in the first line of a CSV file."""
        return [name.strip() for name in next(self._cells())[1]]

    def records(self) -> Iterator[tuple[int, dict[str, object]]]:
        """(line number, cells by column name) of a CSV file with a header.

        Raises:
            ConfigError: a line has more or fewer cells than the header.
        """
        rows = self._cells()
        header = [name.strip() for name in next(rows)[1]]
        for number, cells in rows:
            if len(cells) != len(header):
                raise ConfigError(
                    f"{self.file}, line {number}: {len(cells)} cells under {len(header)} columns; "
                    "correct or delete the line"
                )
            yield number, dict(zip(header, cells, strict=True))

    def _cells(self) -> Iterator[tuple[int, list[str]]]:
        last = 0

        def texts() -> Iterator[str]:
            nonlocal last
            for number, text in self.lines():
                last = number
                yield text

        try:
            for cells in csv.reader(texts(), strict=True):
                yield last, cells
        except csv.Error as error:
            raise ConfigError(
                f"{self.file}, line {last}: no CSV ({error}); correct or delete the line"
            ) from None
        if last == 0:
            raise ConfigError(f"{self.file} is empty: give a trace with one request a line")

    def _open(self) -> IO[bytes]:
        with self.file.open("rb") as handle:
            packed = handle.read(2) == _GZIP
        return cast(IO[bytes], gzip.open(self.file)) if packed else self.file.open("rb")

    def _decode(self, raw: bytes, number: int) -> str:
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise ConfigError(
                f"{self.file}, line {number}: no UTF-8 text; give a text file, gzipped or not"
            ) from None
        if "\0" in text:
            raise ConfigError(
                f"{self.file}, line {number}: a zero byte; give a text file, gzipped or not"
            )
        return text

    def _too_long(self, number: int) -> str:
        return (
            f"{self.file}, line {number}: a line above {MAX_LINE_BYTES >> 20} MiB, or a file above "
            f"{MAX_BYTES >> 30} GiB; cut the trace into parts"
        )


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{error} (is the file whole?)"
