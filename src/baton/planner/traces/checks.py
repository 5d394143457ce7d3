"""From what stands in a trace to numbers, or to a sentence that says what to change."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime

import msgspec

from baton.errors import ConfigError

MAX_TOKENS = 10_000_000
"""More than any model's context: beyond it, a column is not what it was taken for."""
_FRACTION = re.compile(r"[.,](\d+)")
MIN_EPOCH_S = 1e9
MAX_EPOCH_S = 1e10


class Place(msgspec.Struct, frozen=True):
    """Where something stands, for messages: `trace.csv, line 7`."""

    source: str
    line: int
    unit: str = "line"

    def wrong(self, what: str) -> ConfigError:
        return ConfigError(f"{self.source}, {self.unit} {self.line}: {what}")

    def number(self, value: object, name: str) -> float:
        """A finite number; text is read.

        Raises:
            ConfigError: it is none.
        """
        parsed = math.nan
        if isinstance(value, int | float) and not isinstance(value, bool):
            parsed = float(value) if abs(value) < 1e300 else math.inf
        elif isinstance(value, str):
            try:
                parsed = float(value)
            except ValueError:
                parsed = math.nan
        if not math.isfinite(parsed):
            raise self.wrong(f"{name} is {shown(value)}; write a number, or delete the {self.unit}")
        return parsed

    def tokens(self, value: object, name: str, *, least: int = 0) -> int:
        """A count of tokens, from `least` to `MAX_TOKENS`.

        Raises:
            ConfigError: it is none.
        """
        parsed = self.number(value, name)
        if parsed != int(parsed) or parsed < least:
            raise self.wrong(
                f"{name} is {shown(value)}; write a whole number from {least} on, "
                f"or delete the {self.unit}"
            )
        if parsed > MAX_TOKENS:
            raise self.wrong(
                f"{name} is {shown(value)}, more than {MAX_TOKENS:,} tokens; check that this is "
                "the right column, or delete the line"
            )
        return int(parsed)

    def duration(self, value: object, name: str) -> float | None:
        """Seconds, at least 0; None for nothing (null, an empty cell).

        Raises:
            ConfigError: something else.
        """
        if value is None or value == "":
            return None
        parsed = self.number(value, name)
        if parsed < 0:
            raise self.wrong(f"{name} is {shown(value)}; a time cannot be negative")
        return parsed

    def time(self, value: object, name: str, scale: float = 1.0) -> float:
        """Seconds: a number times `scale`, or a date and time (UTC where it names no zone).

        Raises:
            ConfigError: neither.
        """
        if isinstance(value, str) and not _is_number(value):
            moment = parse_date(value)
            if moment is None:
                raise self.wrong(
                    f"{name} is {shown(value)}; write seconds, or a date such as "
                    "2024-05-10 00:00:00.25+00:00"
                )
            return moment
        return self.number(value, name) * scale


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def parse_date(text: str) -> float | None:
    """Seconds since 1970 of an ISO date and time with any number of decimals; None if it is none.

    A time without a zone is taken as UTC, so that the result does not depend on where it is read.
    """
    text = text.strip()
    fraction = 0.0
    match = _FRACTION.search(text)
    if match:
        fraction = float(f"0.{match[1][:12]}")
        text = text[: match.start()] + text[match.end() :]
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return moment.timestamp() + fraction
    except (ValueError, OverflowError):
        return None


def epoch_scale(stamp: float) -> float:
    """What makes seconds of a count since 1970 in s, ms, us or ns, told by its size; else 1."""
    for scale in (1.0, 1e-3, 1e-6, 1e-9):
        if MIN_EPOCH_S <= stamp * scale < MAX_EPOCH_S:
            return scale
    return 1.0


def is_epoch(stamp_s: float) -> bool:
    """Whether seconds look like a time of day of our decades rather than a time from a start."""
    return MIN_EPOCH_S <= stamp_s < MAX_EPOCH_S


def shown(value: object) -> str:
    """A value in a message, cut short."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
