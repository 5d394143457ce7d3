"""What prefill and decode take of a trace's compute, device time, money and energy.

Prompts are counted as if each were computed alone, answers as steps of a full batch: the largest
that the memory, the latency and the traffic allow. What waiting and interference add is not in it;
that is what a simulation is for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from baton.core.cost import ModelShape
from baton.planner.analyze.serving import Serving
from baton.twin.workload import TraceRequest

MAX_BATCH = 256
GRID = 48
Array = np.ndarray[tuple[int], np.dtype[np.float64]]


class Phase(msgspec.Struct, frozen=True):
    """Totals over the trace; None where the model, the price or the power is unknown."""

    device_s: float
    flops: float | None
    usd: float | None
    joules: float | None
    compute_use: float | None  # of what the worker reaches in matrix products


class Split(msgspec.Struct, frozen=True):
    """Prefill against decode on one kind of worker.

    cached: `none`, or the prefix cache whose hits prefill was spared. batch: sequences a decode
    step, bounded by `batch_limit` (memory, latency, traffic, the engine, or given). busy_workers:
    workers that the traffic keeps busy in the mean, if nothing ever waits. peak_prefill: prefill
    time that arrives in the busiest minute, over the mean.
    """

    label: str
    basis: str
    cached: str
    batch: int
    batch_limit: str
    step_s: float
    prefill: Phase
    decode: Phase
    busy_workers: float | None
    peak_prefill: float | None
    usd_per_million_tokens: float | None
    joules_per_token: float | None

    def share(self, what: str) -> float | None:
        """Prefill's share of `flops`, `device_s`, `usd` or `joules`."""
        a, b = getattr(self.prefill, what), getattr(self.decode, what)
        return None if a is None or b is None or a + b <= 0 else a / (a + b)


def split(
    requests: Sequence[TraceRequest],
    serving: Serving,
    model: ModelShape | None = None,
    *,
    duration_s: float = 0.0,
    tpot_s: float = 0.05,
    batch: int | None = None,
    cached: Sequence[int] | None = None,
    cached_by: str = "none",
) -> Split:
    """Split one trace on one kind of worker.

    duration_s: of the trace, 0 if it has no times. tpot_s: the longest decode step wanted.
    cached: for each request, prompt tokens that need no prefill, taken from `cached_by`.
    """
    prompts = _array(r.num_prompt_tokens for r in requests)
    outputs = _array(r.num_output_tokens for r in requests)
    spared = _array(cached) if cached is not None else np.zeros_like(prompts)
    spared = np.minimum(spared, prompts - 1)  # the last token is always computed
    prefill_s, prefill_j = _prefill(serving, prompts, spared)
    # The first token is prefill's own.
    steps = np.maximum(outputs - 1, 0)
    contexts = prompts + outputs / 2
    mean = int(np.average(contexts, weights=steps)) if steps.sum() else int(contexts.mean())
    rate = float(steps.sum()) / duration_s if duration_s > 0 else None
    size, limit = (batch, "given") if batch else decode_batch(serving, mean, tpot_s, rate)
    seconds, joules = _curves(lambda context: serving.decode(size, context), contexts)
    decode_s = steps * seconds / size
    decode_j = None if joules is None else float((steps * joules).sum()) / size
    flops = _flops(model, prompts, spared, steps) if model else (None, None)
    tokens = float(prompts.sum() + outputs.sum())
    prefill = _phase(serving, float(prefill_s.sum()), flops[0], _total(prefill_j))
    decode = _phase(serving, float(decode_s.sum()), flops[1], decode_j)
    total_s = prefill.device_s + decode.device_s
    usd = _add(prefill.usd, decode.usd)
    energy = _add(prefill.joules, decode.joules)
    return Split(
        label=serving.label,
        basis=serving.basis,
        cached=cached_by,
        batch=size,
        batch_limit=limit,
        step_s=serving.decode(size, mean)[0],
        prefill=prefill,
        decode=decode,
        busy_workers=total_s / duration_s if duration_s > 0 else None,
        peak_prefill=_peak(requests, prefill_s, duration_s),
        usd_per_million_tokens=None if usd is None else 1e6 * usd / tokens,
        joules_per_token=None if energy is None else energy / tokens,
    )


def decode_batch(
    serving: Serving, context: int, tpot_s: float, tokens_per_s: float | None = None
) -> tuple[int, str]:
    """The largest batch of decode steps, and what bounds it.

    tokens_per_s: what the traffic generates; so many sequences are never there that a step would
    yield more than that.
    """
    memory = MAX_BATCH if serving.kv_tokens is None else serving.kv_tokens // max(context, 1)
    best, limit = 1, "latency"
    low, high = 1, MAX_BATCH
    while low <= high:
        middle = (low + high) // 2
        step_s, _ = serving.decode(middle, context)
        idle = tokens_per_s is not None and middle > 1 and (middle - 1) / step_s > tokens_per_s
        if middle <= memory and step_s <= tpot_s and not idle:
            best, low = middle, middle + 1
        else:
            limit = "memory" if middle > memory else "latency" if step_s > tpot_s else "traffic"
            high = middle - 1
    return best, "the engine" if best == MAX_BATCH else limit


def _prefill(serving: Serving, prompts: Array, spared: Array) -> tuple[Array, Array | None]:
    """Seconds and joules of each prompt: of all of it, less those of what is spared."""
    whole_s, whole_j = _curves(serving.prefill, prompts)
    if not spared.any():
        return whole_s, whole_j
    part_s, part_j = _curves(serving.prefill, np.maximum(spared, 1))
    is_spared = spared > 0
    # A step costs something however little is left to compute.
    floor_s, floor_j = serving.prefill(1)
    seconds = np.maximum(whole_s - np.where(is_spared, part_s, 0), floor_s)
    if whole_j is None or part_j is None or floor_j is None:
        return seconds, None
    return seconds, np.maximum(whole_j - np.where(is_spared, part_j, 0), floor_j)


def _curves(
    cost: Callable[[int], tuple[float, float | None]], at: Array
) -> tuple[Array, Array | None]:
    """A smooth cost at many places, from a few: linear between points spaced in logarithm."""
    grid = np.unique(np.round(np.geomspace(max(at.min(), 1), max(at.max(), 1), GRID)))
    points = [cost(int(x)) for x in grid]
    seconds = np.interp(at, grid, [s for s, _ in points])
    joules = [j for _, j in points if j is not None]
    return seconds, np.interp(at, grid, joules) if len(joules) == len(points) else None


def _flops(
    model: ModelShape, prompts: Array, spared: Array, steps: Array
) -> tuple[float, float]:
    """Multiply-adds count two. Attention pairs of windowed layers stop at the window."""
    moe = model.num_moe_layers * model.experts_per_token * model.expert_weights
    weights = 2 * (model.dense_weights + moe)
    head = 2 * model.vocab_size * model.hidden_size
    pair = 4 * model.num_heads * model.head_dim
    full = model.num_layers - model.num_window_layers
    new = prompts - spared
    # Query at position i sees i + 1 keys.
    pairs = (prompts**2 - spared**2) / 2 * full
    seen = steps * (prompts + steps / 2) * full
    if model.num_window_layers:
        pairs = pairs + np.minimum((prompts**2 - spared**2) / 2, new * model.window) * (
            model.num_window_layers
        )
        seen = seen + steps * np.minimum(prompts + steps / 2, model.window) * (
            model.num_window_layers
        )
    prefill = float((new * weights + pairs * pair).sum()) + head * len(prompts)
    decode = float((steps * (weights + head) + seen * pair).sum())
    return prefill, decode


def _phase(
    serving: Serving, seconds: float, flops: float | None, joules: float | None
) -> Phase:
    price, reach = serving.usd_per_hour, serving.flops_per_s
    use = None
    if flops is not None and reach and seconds > 0:
        use = flops / (seconds * reach)
    return Phase(
        device_s=seconds,
        flops=flops,
        usd=None if price is None else seconds / 3600 * price,
        joules=joules,
        compute_use=use,
    )


def _peak(requests: Sequence[TraceRequest], prefill_s: Array, duration_s: float) -> float | None:
    """Prefill time of the busiest whole minute over the mean minute's."""
    if duration_s < 120:
        return None
    minutes = (_array(r.arrival_s for r in requests) // 60).astype(np.int64)
    work = np.bincount(minutes, weights=prefill_s)[: int(duration_s // 60)]
    return float(work.max() / work.mean()) if work.sum() > 0 else None


def _array(values: object) -> Array:
    return np.fromiter(values, dtype=np.float64)  # type: ignore[call-overload,no-any-return]


def _total(values: Array | None) -> float | None:
    return None if values is None else float(values.sum())


def _add(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b
