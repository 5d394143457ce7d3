"""When which request arrives and how long it is: Poisson arrivals, or a trace.

Traces are JSONL as Mooncake has them (`timestamp` in ms, `input_length`, `output_length`, optional
`hash_ids` of shared 512-token prefix blocks) or CSV as Azure has them (`TIMESTAMP`,
`ContextTokens`, `GeneratedTokens`); either may be gzipped.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import random
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from baton.errors import ConfigError

Prompt = str | list[int] | list[dict[str, object]]
"""Text, token ids, or chat messages."""


class Arrival(msgspec.Struct, frozen=True):
    """One request of the plan: at_s from the start of the run, lengths in tokens.

    `prompt` is set when it comes from a data set; else one is made up to measure. `hash_ids` name
    shared prefix blocks. output_tokens None leaves the length to the model.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int | None
    prompt: Prompt | None = None
    hash_ids: tuple[int, ...] = ()


class Range(msgspec.Struct, frozen=True):
    """A length in tokens: `128`, or uniformly from `64-512`."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str, flag: str) -> Range:
        """Raises: ConfigError naming `flag`."""
        low, dash, high = text.partition("-")
        try:
            parsed = cls(int(low), int(high if dash else low))
        except ValueError:
            parsed = cls(0, 0)
        if not 1 <= parsed.low <= parsed.high:
            raise ConfigError(f"{flag} {text!r}: write a number of tokens, or a range LOW-HIGH")
        return parsed

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


def poisson(rate: float, rng: random.Random) -> Iterator[float]:
    """Endless arrival times in seconds, the first at 0, exponential gaps of mean 1/rate.

    An infinite rate puts every arrival at 0.
    """
    now = 0.0
    while True:
        yield now
        now += rng.expovariate(rate)


def limit(
    arrivals: Iterator[Arrival], num_requests: int | None, duration_s: float | None
) -> list[Arrival]:
    """The first `num_requests` that arrive within `duration_s`; None is no limit."""
    cut = itertools.islice(arrivals, num_requests)
    if duration_s is None:
        return list(cut)
    return list(itertools.takewhile(lambda a: a.at_s <= duration_s, cut))


def synthetic(
    rate: float, prompt_tokens: Range, output_tokens: Range, rng: random.Random
) -> Iterator[Arrival]:
    """Poisson arrivals of made-up prompts."""
    for at_s in poisson(rate, rng):
        yield Arrival(at_s, prompt_tokens.draw(rng), output_tokens.draw(rng))


def from_dataset(
    file: Path, rate: float, output_tokens: Range | None, rng: random.Random
) -> Iterator[Arrival]:
    """Poisson arrivals of a data set's prompts, in random order, again and again.

    Each line is an object with `prompt` (text or token ids) or `messages`, and optionally
    `output_tokens`; else `output_tokens` is drawn, or left to the model.

    Raises:
        ConfigError: it names the line.
    """
    rows: list[tuple[Prompt, int | None]] = []
    for number, line in enumerate(_lines(file), 1):
        try:
            row = msgspec.json.decode(line, type=_DatasetRow)
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{file}, line {number}: {error}") from None
        prompt = row.prompt if row.prompt is not None else row.messages
        if not prompt:
            raise ConfigError(f"{file}, line {number}: neither prompt nor messages")
        rows.append((prompt, row.output_tokens))
    if not rows:
        raise ConfigError(f"{file} is empty")
    times = poisson(rate, rng)
    while True:
        rng.shuffle(rows)
        for prompt, length in rows:
            if length is None and output_tokens is not None:
                length = output_tokens.draw(rng)
            yield Arrival(next(times), 0, length, prompt)


class _DatasetRow(msgspec.Struct):
    prompt: str | list[int] | None = None
    messages: list[dict[str, object]] | None = None
    output_tokens: int | None = None


class _TraceRow(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int] = []


def from_trace(file: Path, *, speed: float = 1.0, scale: float = 1.0) -> list[Arrival]:
    """A trace's arrivals from 0 on, `speed` times as fast, its lengths times `scale` (at least 1).

    Raises:
        ConfigError: the file is neither form; it names the line.
    """
    is_csv = ".csv" in file.suffixes[-2:]
    rows = sorted(_csv_rows(file) if is_csv else _jsonl_rows(file), key=lambda row: row.timestamp)
    if not rows:
        raise ConfigError(f"{file} is empty")
    return [
        Arrival(
            (row.timestamp - rows[0].timestamp) / speed,
            max(1, round(row.input_length * scale)),
            max(1, round(row.output_length * scale)),
            hash_ids=tuple(row.hash_ids),
        )
        for row in rows
    ]


def _jsonl_rows(file: Path) -> Iterator[_TraceRow]:
    for number, line in enumerate(_lines(file), 1):
        try:
            row = msgspec.json.decode(line, type=_TraceRow)
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{file}, line {number}: {error}") from None
        row.timestamp /= 1000
        yield row


def _csv_rows(file: Path) -> Iterator[_TraceRow]:
    for number, row in enumerate(csv.DictReader(_lines(file)), 2):
        try:
            stamp = row["TIMESTAMP"]
            try:
                seconds = float(stamp)
            except ValueError:  # 2023-11-16 18:15:46.6805900: seven digits, and no zone
                when = datetime.fromisoformat(stamp.partition(".")[0]).replace(tzinfo=UTC)
                seconds = when.timestamp() + float("0." + (stamp.partition(".")[2] or "0"))
            yield _TraceRow(seconds, int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{file}, line {number}: needs TIMESTAMP, ContextTokens, GeneratedTokens ({error})"
            ) from None


def _lines(file: Path) -> Iterator[str]:
    try:
        with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as handle:
            yield from (line for line in handle if line.strip())
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from None
