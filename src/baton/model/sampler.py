"""From logits to tokens.

Every row is computed from its own logits, parameters and history alone, so a neighbour can never
change it; rows that need nothing special share calls, not arithmetic. A draw is a pure function of
the row and of (seed, choice, position): preemption, recomputing and failover draw the same token
again.

The order of operations, each on the result of the one before:

    log-probabilities (if asked for) from the raw logits
    repetition penalty (prompt and output), then presence and frequency penalties (output)
    logit_bias; stop tokens out while fewer than min_tokens are there
    temperature 0: the largest, the lowest token id among equals
    temperature, top_k, top_p, min_p, one uniform number, inverse cumulative distribution

Ties at the edge of top_k and top_p all stay in, so that no filter depends on a sorting order.

What is written here in numpy and torch is what a draw is. The CPU kernels (`csrc/sampling.h`) draw
the same tokens in a fraction of the time from logits that need no adjustment, and leave the rare
ones to it that they cannot be sure of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.errors import Internal
from baton.model.native import Draw, Kernels
from baton.types import SampledLogprobs, SamplingParams, TokenLogprob

_Logits = npt.NDArray[np.float64]

# Bounds the fp64 copies of a group of rows to what a cache holds, whatever the vocabulary.
_GROUP_NUMBERS = 1 << 18
_WORD = (1 << 64) - 1


class SampleRow(msgspec.Struct, frozen=True):
    """What one draw depends on besides its logits.

    `position` is the index in the sequence of the token to draw; `prompt` and `output` are the
    token ids before it. `output` may be empty unless `params.reads_output`.
    """

    params: SamplingParams
    choice: int
    position: int
    prompt: Sequence[int]
    output: Sequence[int]


class Sampled(msgspec.Struct, frozen=True):
    token_id: int
    logprobs: SampledLogprobs | None = None


def is_greedy(params: SamplingParams) -> bool:
    """Whether every draw is the largest of the raw logits, and nothing else is asked for."""
    return params.temperature == 0 and params.min_tokens == 0 and _is_plain(params)


def sample(
    logits: Tensor, rows: Sequence[SampleRow | None], kernels: Kernels | None = None
) -> list[Sampled]:
    """Draw one token for each row of `logits` [S, vocab_size] fp32, which stays as it is.

    None stands for a row whose parameters are greedy (`is_greedy`): it is cheaper. With `kernels`,
    logits must be in host memory.

    Raises:
        Internal: logits are NaN or infinite, so that no token would mean anything.
    """
    if not rows:
        return []
    best, largest = largest_logits(logits)
    check_finite(largest)
    drawn = [Sampled(token) for token in best.tolist()]
    free, others = [], []
    for i, row in enumerate(rows):
        if row is None:
            continue
        if not (_is_plain(row.params) and len(row.output) >= row.params.min_tokens):
            others.append((i, row))
        elif row.params.temperature > 0:
            free.append((i, row))
    if kernels is not None and free:
        tokens = kernels.draw(logits, _draws(free, largest.tolist()))
        for (i, _), token in zip(free, tokens, strict=True):
            drawn[i] = Sampled(token)
        free = [one for one, token in zip(free, tokens, strict=True) if token < 0]
    size = max(1, _GROUP_NUMBERS // logits.shape[1])
    host = _host(logits, [i for i, _ in free])
    for start in range(0, len(free), size):
        group = free[start : start + size]
        tokens = _sample_plain(host[start : start + size], [row for _, row in group])
        for (i, _), token in zip(group, tokens, strict=True):
            drawn[i] = Sampled(token)
    for (i, row), raw in zip(others, _host(logits, [i for i, _ in others]), strict=True):
        drawn[i] = _sample_row(raw.astype(np.float64), row)
    return drawn


def largest_logits(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The token id of each row's largest logit, the lowest among equals, and that logit: [S] each.

    On a host by numpy, whose search is an order of magnitude faster than torch's there. If a row
    holds NaN, so does what is returned for it.
    """
    if logits.device.type != "cpu":
        best = logits.argmax(-1)
        return best, logits.gather(-1, best[:, None])[:, 0]
    host = logits.numpy()
    found = host.argmax(-1)
    return torch.from_numpy(found), torch.from_numpy(host[np.arange(len(found)), found])


def check_finite(largest: Tensor) -> None:
    """Raises `Internal` unless every row's largest logit is a number."""
    if not all(map(math.isfinite, largest.tolist())):
        raise Internal("the model computed logits that are not finite", stage="decode")


def uniform(seed: int, choice: int, position: int) -> float:
    """A number strictly between 0 and 1 that depends on nothing but the arguments (64-bit each).

    The first word of Philox 4x64-10, a counter-based generator, with the key (seed, choice) and
    the counter (position + 1, 0, 0, 0), as numpy has it; written out, since making a numpy
    generator for one number takes several times as long.
    """
    x0, x1, x2, x3 = (position + 1) & _WORD, 0, 0, 0
    for _ in range(10):
        low, high = 0xD2E7470EE14C6C93 * x0, 0xCA5A826395121157 * x2
        x0, x1, x2, x3 = (
            (high >> 64) ^ x1 ^ seed,
            high & _WORD,
            (low >> 64) ^ x3 ^ choice,
            low & _WORD,
        )
        seed = (seed + 0x9E3779B97F4A7C15) & _WORD
        choice = (choice + 0xBB67AE8584CAA73B) & _WORD
    return ((x0 >> 11) + 0.5) * 2.0**-53


def _is_plain(params: SamplingParams) -> bool:
    """Whether the raw logits are drawn from as they are, once `min_tokens` are there."""
    return (
        params.logprobs is None
        and params.repetition_penalty == 1
        and params.presence_penalty == 0
        and params.frequency_penalty == 0
        and not params.logit_bias
    )


def _draws(rows: list[tuple[int, SampleRow]], largest: list[float]) -> list[Draw]:
    """What the kernels have to know of each row; `largest` logits of all rows."""
    draws = []
    for i, row in rows:
        p = row.params
        where = (p.seed, row.choice, row.position)
        draws.append((i, largest[i], p.temperature, p.top_p, p.min_p, p.top_k, *where))
    return draws


def _host(logits: Tensor, rows: list[int]) -> npt.NDArray[np.float32]:
    """These rows in host memory, brought there in one copy; on a host all of them in none."""
    if not rows:
        return np.empty((0, logits.shape[1]), np.float32)
    chosen = logits if len(rows) == len(logits) else logits[rows]
    found: npt.NDArray[np.float32] = chosen.cpu().numpy()
    return found


def _sample_plain(logits: npt.NDArray[np.float32], rows: Sequence[SampleRow]) -> list[int]:
    """What `_sample_row` draws for rows without adjustments, [n, vocab_size]."""
    temperatures = np.array([[row.params.temperature] for row in rows])
    weights = _weights(logits.astype(np.float64), temperatures)
    for i, row in enumerate(rows):
        _filter(weights[i], row.params)
    cumulative = _cumulative(weights)
    return [
        _pick(weights[i], cumulative[i], uniform(row.params.seed, row.choice, row.position))
        for i, row in enumerate(rows)
    ]


def _sample_row(raw: _Logits, row: SampleRow) -> Sampled:
    logits = _adjust(raw, row)
    if row.params.temperature == 0:
        token = int(logits.argmax())
    else:
        number = uniform(row.params.seed, row.choice, row.position)
        weights = _filter(_weights(logits, row.params.temperature), row.params)
        token = _pick(weights, _cumulative(weights), number)
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


def _weights(logits: _Logits, temperature: float | _Logits) -> _Logits:
    """exp((logits - their maximum) / temperature) along the last axis: weights, not normalised.

    fp64: a sum over the vocabulary is good to about 1e-13, and the largest weight is exactly 1,
    so any temperature above 0, however small, is safe.
    """
    weights: _Logits = logits - logits.max(-1, keepdims=True)
    # A vanishing temperature sends all but the largest to -inf, which is what it means.
    with np.errstate(over="ignore", under="ignore"):
        weights /= temperature  # in place: new memory for each of these costs more than the sums
        np.exp(weights, out=weights)
    return weights


def _filter(weights: _Logits, params: SamplingParams) -> _Logits:
    """Put to 0, in place, the weights of the tokens that may not be drawn."""
    if 0 < params.top_k < weights.size:
        kth = weights.size - params.top_k
        weights[weights < np.partition(weights, kth)[kth]] = 0
    if params.top_p < 1:
        descending = np.sort(weights)[::-1].copy()
        cumulative = _cumulative(descending)
        last = int(np.searchsorted(cumulative, params.top_p * cumulative[-1]))
        weights[weights < descending[min(last, weights.size - 1)]] = 0
    if params.min_p > 0:
        weights[weights < params.min_p] = 0
    return weights


def _cumulative(weights: _Logits) -> _Logits:
    """Running sums along the last axis, one addition after the other, as numpy's are too.

    torch takes a fraction of numpy's time for it.
    """
    sums: _Logits = torch.from_numpy(weights).cumsum(-1).numpy()
    return sums


def _pick(weights: _Logits, cumulative: _Logits, number: float) -> int:
    """Inverse cumulative distribution in order of token id.

    That order, not order of weight: where numerics are inexact, two nearly equal tokens that
    change places would exchange their whole intervals, while here borders move by a hair.
    """
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
