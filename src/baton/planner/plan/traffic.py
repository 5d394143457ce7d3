"""What the arithmetic knows of a trace: rates, and requests that stand for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import msgspec

from baton.errors import ConfigError
from baton.twin.workload import TraceRequest

NUM_SAMPLES = 48


class Traffic:
    """Requests of one window of a trace. Immutable.

    rate: requests a second in the window. mean_rate: of the whole trace, over which its cost is
    spread. samples: (prompt tokens, tokens that no earlier prompt has brought, output tokens) of
    requests that stand for all, evenly over the sorted ones.
    """

    def __init__(
        self,
        rate: float,
        mean_rate: float,
        samples: Sequence[tuple[int, int, int]],
        mean_output: float,
    ) -> None:
        self.rate, self.mean_rate = rate, mean_rate
        self.samples = tuple(samples)
        self.mean_output = mean_output

    @classmethod
    def of(cls, window: Sequence[TraceRequest], mean_rate: float) -> Traffic:
        """Of requests in the order of arrival.

        Raises:
            ConfigError: they all come at once, so there is no rate.
        """
        rate = rate_of(window)
        fresh = _fresh_tokens(window)
        rows = sorted(
            (each.num_prompt_tokens, new, each.num_output_tokens)
            for each, new in zip(window, fresh, strict=True)
        )
        step = max(1, len(rows) // NUM_SAMPLES)
        mean = sum(each.num_output_tokens for each in window) / len(window)
        return cls(rate, mean_rate, rows[step // 2 :: step], mean)

    def changed(self, *, rate: float = 1.0, prompt: float = 1.0) -> Traffic:
        """So many times the rate, prompts so many times as long."""
        samples = [
            (max(1, round(whole * prompt)), max(1, round(new * prompt)), out)
            for whole, new, out in self.samples
        ]
        return Traffic(self.rate * rate, self.mean_rate * rate, samples, self.mean_output)

    @cached_property
    def context(self) -> float:
        """Tokens of KV that a running answer has, on average over its steps."""
        steps = sum(out for _, _, out in self.samples)
        return sum(out * (whole + out / 2) for whole, _, out in self.samples) / steps

    @cached_property
    def mean_prompt(self) -> float:
        return sum(whole for whole, _, _ in self.samples) / len(self.samples)

    @property
    def tokens_per_hour(self) -> float:
        """Output tokens, at the mean rate of the whole trace."""
        return self.mean_rate * self.mean_output * 3600


def rate_of(requests: Sequence[TraceRequest]) -> float:
    """Requests a second.

    Raises:
        ConfigError: there are fewer than two, or they all come at once.
    """
    span = requests[-1].arrival_s - requests[0].arrival_s if requests else 0.0
    if span <= 0:
        raise ConfigError(
            "the trace has no rate: its requests all come at once, or there is only one; give a "
            "trace with times, at least 2 requests"
        )
    return (len(requests) - 1) / span


def busiest(requests: Sequence[TraceRequest], size: int) -> list[TraceRequest]:
    """The `size` successive requests that come fastest, from 0 s on; all if there are no more."""
    start = 0
    if len(requests) > size:
        start = min(
            range(len(requests) - size + 1),
            key=lambda i: requests[i + size - 1].arrival_s - requests[i].arrival_s,
        )
    chosen = requests[start : start + size]
    first = chosen[0].arrival_s if chosen else 0.0
    return [msgspec.structs.replace(each, arrival_s=each.arrival_s - first) for each in chosen]


def _fresh_tokens(window: Sequence[TraceRequest]) -> list[int]:
    """Prompt tokens that an endless prefix cache would not have; at least the last one."""
    seen: set[int] = set()
    fresh = []
    for each in window:
        hits = 0
        for block in each.blocks:
            if block not in seen:
                break
            hits += 1
        seen.update(each.blocks)
        fresh.append(max(1, each.num_prompt_tokens - hits * each.block_size))
    return fresh
