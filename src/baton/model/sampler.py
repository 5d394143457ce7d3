"""From logits to tokens.

Every row is computed from its own logits, parameters and history alone, so a neighbour can never
change it; rows that are plainly greedy share one argmax. A draw is a pure function of the row and
of (seed, choice, position): preemption, recomputing and failover draw the same token again.

The order of operations, each on the result of the one before:

    log-probabilities (if asked for) from the raw logits
    repetition penalty (prompt and output), then presence and frequency penalties (output)
    logit_bias; stop tokens out while fewer than min_tokens are there
    temperature 0: the largest, the lowest token id among equals
    temperature, top_k, top_p, min_p, one uniform number, inverse cumulative distribution

Ties at the edge of top_k and top_p all stay in, so that no filter depends on a sorting order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from baton.errors import Internal
from baton.types import SampledLogprobs, SamplingParams, TokenLogprob

_Logits = npt.NDArray[np.float64]


@dataclass(slots=True, frozen=True)
class SampleRow:
    """What one draw depends on besides its logits.

    `position` is the index in the sequence of the token to draw; `prompt` and `output` are the
    token ids before it.
    """

    params: SamplingParams
    choice: int
    position: int
    prompt: Sequence[int]
    output: Sequence[int]


@dataclass(slots=True, frozen=True)
class Sampled:
    token_id: int
    logprobs: SampledLogprobs | None = None


def sample(logits: Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
    """Draw one token for each row of `logits` [S, vocab_size] fp32, which stays as it is.

    Raises:
        Internal: logits are NaN or infinite, so that no token would mean anything.
    """
    if not rows:
        return []
    plain = [_is_plain_greedy(row) for row in rows]
    best, largest = logits.argmax(-1), logits.amax(-1)
    _check_finite(largest.cpu().numpy())
    drawn = [Sampled(token) for token in best.tolist()]
    if all(plain):
        return drawn
    # One copy to the host for the others; they are few, or the batch is no faster for a GPU sort.
    others = [i for i, easy in enumerate(plain) if not easy]
    host = logits[others].cpu().numpy()
    for i, raw in zip(others, host, strict=True):
        drawn[i] = _sample_row(raw.astype(np.float64), rows[i])
    return drawn


def uniform(seed: int, choice: int, position: int) -> float:
    """A number strictly between 0 and 1 that depends on nothing but the arguments (64-bit each).

    Philox 4x64 is a counter-based generator, and numpy guarantees the stream of its bit
    generators: the key is (seed, choice), the counter is the position.
    """
    generator = np.random.Philox(
        key=np.array([seed, choice], dtype=np.uint64),
        counter=np.array([position, 0, 0, 0], dtype=np.uint64),
    )
    return ((int(generator.random_raw()) >> 11) + 0.5) * 2.0**-53


def _is_plain_greedy(row: SampleRow) -> bool:
    params = row.params
    return (
        params.temperature == 0
        and params.logprobs is None
        and params.repetition_penalty == 1
        and params.presence_penalty == 0
        and params.frequency_penalty == 0
        and not params.logit_bias
        and len(row.output) >= params.min_tokens
    )


def _check_finite(largest: npt.NDArray[np.float32]) -> None:
    if not np.isfinite(largest).all():
        raise Internal("the model computed logits that are not finite", stage="decode")


def _sample_row(raw: _Logits, row: SampleRow) -> Sampled:
    logits = _adjust(raw, row)
    if row.params.temperature == 0:
        token = int(logits.argmax())
    else:
        number = uniform(row.params.seed, row.choice, row.position)
        token = _draw(_filter(logits, row.params), number)
    return Sampled(token, _logprobs(raw, token, row.params.logprobs))


def _adjust(raw: _Logits, row: SampleRow) -> _Logits:
    """Penalties, bias and minimum length, on a copy."""
    params = row.params
    logits = raw.copy()
    if params.repetition_penalty != 1:
        seen = np.unique(np.array([*row.prompt, *row.output], dtype=np.int64))
        old = logits[seen]
        penalty = params.repetition_penalty
        logits[seen] = np.where(old > 0, old / penalty, old * penalty)
    if row.output and (params.presence_penalty or params.frequency_penalty):
        used, counts = np.unique(np.array(row.output, dtype=np.int64), return_counts=True)
        logits[used] -= params.presence_penalty + params.frequency_penalty * counts
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    if len(row.output) < params.min_tokens:
        stops = sorted(set(params.stop_token_ids))
        # A vocabulary of nothing but stop tokens has to be allowed one.
        if len(stops) < logits.size:
            logits[stops] = -np.inf
    return logits


def _filter(logits: _Logits, params: SamplingParams) -> _Logits:
    """Weights of the tokens that may be drawn, 0 for all others; not normalised.

    fp64: a sum over the vocabulary is good to about 1e-13, and the largest weight is exactly 1,
    so any temperature above 0, however small, is safe.
    """
    # A vanishing temperature sends all but the largest to -inf, which is what it means.
    with np.errstate(over="ignore", under="ignore"):
        weights: _Logits = np.exp((logits - logits.max()) / params.temperature)
    if 0 < params.top_k < weights.size:
        kth = weights.size - params.top_k
        weights[weights < np.partition(weights, kth)[kth]] = 0
    if params.top_p < 1:
        descending = np.sort(weights)[::-1]
        cumulative = descending.cumsum()
        last = int(np.searchsorted(cumulative, params.top_p * cumulative[-1]))
        weights[weights < descending[min(last, weights.size - 1)]] = 0
    if params.min_p > 0:
        weights[weights < params.min_p] = 0
    return weights


def _draw(weights: _Logits, number: float) -> int:
    """Inverse cumulative distribution in order of token id.

    That order, not order of weight: where numerics are inexact, two nearly equal tokens that
    change places would exchange their whole intervals, while here borders move by a hair.
    """
    cumulative = weights.cumsum()
    token = int(np.searchsorted(cumulative, number * cumulative[-1], side="right"))
    if token < weights.size:
        return token
    return int(weights.nonzero()[0][-1])  # number * total rounded up to the total


def _logprobs(raw: _Logits, token: int, count: int | None) -> SampledLogprobs | None:
    """The chosen token's log-probability under the raw logits, and the `count` best."""
    if count is None:
        return None
    shifted = raw - raw.max()
    values = shifted - np.log(np.exp(shifted).sum())
    count = min(count, values.size)
    top: list[int] = []
    if count:
        kth = values.size - count
        least = np.partition(values, kth)[kth]
        candidates = np.nonzero(values >= least)[0]
        top = candidates[np.argsort(-values[candidates], kind="stable")][:count].tolist()
    return SampledLogprobs(
        TokenLogprob(token, float(values[token])),
        tuple(TokenLogprob(i, float(values[i])) for i in top),
    )
