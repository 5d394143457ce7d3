"""When which request arrives and how long it is: Poisson arrivals, or those of a trace."""

from __future__ import annotations

import gzip
import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import msgspec

from baton.errors import ConfigError
from baton.planner.traces import Trace

Prompt = str | list[int] | list[dict[str, object]]
"""Text, token ids, or chat messages."""


class Arrival(msgspec.Struct, frozen=True):
    """One request of the plan: at_s from the start of the run, lengths in tokens.

    `prompt` is set when it comes from a data set; else one is made up to measure. `blocks` name
    its first blocks of `block_tokens` tokens, equal where prompts are equal up to there.
    output_tokens None leaves the length to the model.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int | None
    prompt: Prompt | None = None
    blocks: tuple[int, ...] = ()
    block_tokens: int = 0


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


def from_trace(trace: Trace, *, speed: float = 1.0, scale: float = 1.0) -> list[Arrival]:
    """A trace's arrivals from 0 on, `speed` times as fast, its lengths times `scale` (at least 1).

    Raises:
        ConfigError: it is a set of lengths.
    """
    if not trace.has_arrivals:
        raise ConfigError(
            f"{trace.source} has lengths but no times: name their column by --columns arrival=…, "
            "or leave --trace out and give --rate, --prompt-tokens and --output-tokens"
        )
    return [
        Arrival(
            request.arrival_s / speed,
            max(1, round(request.num_prompt_tokens * scale)),
            max(1, round(request.num_output_tokens * scale)),
            blocks=request.blocks,
            block_tokens=max(1, round(request.block_size * scale)) if request.blocks else 0,
        )
        for request in trace.requests
    ]


def _lines(file: Path) -> Iterator[str]:
    try:
        with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as handle:
            yield from (line for line in handle if line.strip())
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from None
