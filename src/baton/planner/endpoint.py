"""Prefill and decode of a running server, told apart from outside by its answers' timing.

    TTFT         = base + per_token · n + per_token² · n²           n: prompt tokens computed
    gap in a batch = step + per_sequence · b + per_kv_token · b · context

Both are least squares of *relative* errors without negative coefficients, and each fit's error is
that of observations which it did not see (each left out in turn). `base` holds the network, the
queue and the tokenizer too: from outside they cannot be told apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import msgspec
import numpy as np

from baton.errors import BatonError

MIN_POINTS = 4
Array = np.ndarray[tuple[int], np.dtype[np.float64]]
Matrix = np.ndarray[tuple[int, int], np.dtype[np.float64]]


class Answer(msgspec.Struct, frozen=True):
    """One answered request. Times are seconds of one clock.

    num_prompt_tokens: those that were computed, without cached ones. event_s: when its tokens came.
    is_alone: nothing else ran from its sending to its first token.
    """

    sent_s: float
    event_s: tuple[float, ...]
    num_prompt_tokens: int
    num_output_tokens: int
    is_alone: bool

    @property
    def ttft_s(self) -> float:
        return self.event_s[0] - self.sent_s


class Fit(msgspec.Struct, frozen=True):
    """Coefficients by name; error: median of |predicted / measured - 1| where left out."""

    coefficients: dict[str, float]
    num_points: int
    error: float


class EndpointFit(msgspec.Struct, frozen=True):
    """A measured server as a kind of worker (see `Serving`); what is not measured is unknown.

    ttft_points: (prompt tokens, seconds) of the answers that came alone; gap_points: (sequences at
    a time, median gap in seconds) of each answer.
    """

    label: str
    ttft: Fit
    gap: Fit
    max_batch: int
    ttft_points: tuple[tuple[float, float], ...] = ()
    gap_points: tuple[tuple[float, float], ...] = ()
    usd_per_hour: float | None = None
    kv_tokens: int | None = None
    flops_per_s: float | None = None

    @property
    def basis(self) -> str:
        return (
            f"measured from outside: TTFT off by {self.ttft.error:.0%} (n={self.ttft.num_points}), "
            f"gaps by {self.gap.error:.0%} (n={self.gap.num_points}), batches up to {self.max_batch}"
        )

    def prefill(self, num_tokens: int) -> tuple[float, float | None]:
        """Seconds of a prompt, without `base`: a step's own constant part cannot be told from it."""
        c = self.ttft.coefficients
        return c["per_token"] * num_tokens + c["per_token_squared"] * num_tokens**2, None

    def ttft_s(self, num_tokens: int) -> float:
        return self.ttft.coefficients["base"] + self.prefill(num_tokens)[0]

    def decode(self, batch: int, context: int) -> tuple[float, float | None]:
        c = self.gap.coefficients
        seconds = c["step"] + c["per_sequence"] * batch + c["per_kv_token"] * batch * context
        return seconds, None


def fit_endpoint(
    label: str, answers: Sequence[Answer], usd_per_hour: float | None = None
) -> EndpointFit:
    """Fit both laws.

    Raises:
        BatonError: too few answers, or none of different lengths.
    """
    alone = [answer for answer in answers if answer.is_alone and answer.event_s]
    if len({answer.num_prompt_tokens for answer in alone}) < MIN_POINTS:
        raise BatonError(
            f"{len(alone)} answers came alone, of fewer than {MIN_POINTS} prompt lengths: "
            "measure more of them"
        )
    ttft = _fit(
        ("base", "per_token", "per_token_squared"),
        [(1.0, a.num_prompt_tokens, a.num_prompt_tokens**2) for a in alone],
        [a.ttft_s for a in alone],
    )
    rows, gaps, largest = _gap_points(answers)
    if len(rows) < MIN_POINTS:
        raise BatonError("too few answers of several tokens: let answers be 16 tokens or longer")
    gap = _fit(("step", "per_sequence", "per_kv_token"), rows, gaps)
    return EndpointFit(
        label,
        ttft,
        gap,
        largest,
        ttft_points=tuple((float(a.num_prompt_tokens), a.ttft_s) for a in alone),
        gap_points=tuple((row[1], gap_s) for row, gap_s in zip(rows, gaps, strict=True)),
        usd_per_hour=usd_per_hour,
    )


def _gap_points(
    answers: Sequence[Answer],
) -> tuple[list[tuple[float, float, float]], list[float], int]:
    """For each answer: (1, sequences, KV tokens) of its mean step, and its median token gap.

    The median: a gap in which another prompt was computed is longer, and tells of that prompt.
    """
    rows, gaps, largest = [], [], 1
    for answer in answers:
        if answer.num_output_tokens < MIN_POINTS or len(answer.event_s) < MIN_POINTS:
            continue
        start, end = answer.event_s[0], answer.event_s[-1]
        batch = tokens = 0.0
        for other in answers:
            if not other.event_s or end <= start:
                continue
            shared = min(end, other.event_s[-1]) - max(start, other.event_s[0])
            part = max(0.0, shared) / (end - start)
            batch += part
            tokens += part * (other.num_prompt_tokens + other.num_output_tokens / 2)
        per_event = (answer.num_output_tokens - 1) / (len(answer.event_s) - 1)
        gap = float(np.median(np.diff(answer.event_s))) / per_event
        if batch > 0 and gap > 0:
            rows.append((1.0, batch, tokens))
            gaps.append(gap)
            largest = max(largest, round(batch))
    return rows, gaps, largest


def _fit(
    names: tuple[str, ...], rows: Sequence[tuple[float, ...]], values: Sequence[float]
) -> Fit:
    x, y = np.asarray(rows, dtype=np.float64), np.asarray(values, dtype=np.float64)
    errors = []
    for i in range(len(y)):
        kept = np.arange(len(y)) != i
        predicted = float(x[i] @ non_negative(x[kept], y[kept]))
        errors.append(abs(predicted / y[i] - 1))
    found = non_negative(x, y)
    return Fit(
        dict(zip(names, map(float, found), strict=True)), len(y), float(np.median(errors))
    )


def non_negative(x: Matrix, y: Array) -> Array:
    """Coefficients of at least 0 with the least sum of squared relative errors.

    With three columns all subsets can be tried: the best of those whose solution is nowhere
    negative is the optimum.
    """
    weighted = x / y[:, None]
    scale = np.abs(weighted).max(axis=0)
    scale[scale == 0] = 1.0
    weighted = weighted / scale
    best, least = np.zeros(x.shape[1]), np.inf
    for size in range(1, x.shape[1] + 1):
        for columns in combinations(range(x.shape[1]), size):
            part = weighted[:, columns]
            found, *_ = np.linalg.lstsq(part, np.ones(len(y)), rcond=None)
            if (found < 0).any():
                continue
            left = float(((part @ found - 1) ** 2).sum())
            if left < least - 1e-12:
                least = left
                best = np.zeros(x.shape[1])
                best[list(columns)] = found
    return best / scale
