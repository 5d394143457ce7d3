"""Coefficients of a device from published times of single kernels.

The tables are aiconfigurator's: GEMM (m, n, k), attention of whole prompts and of decode batches,
all-reduce among the GPUs of a node. Each gives some of the coefficients; what lies between kernels
(launches, the engine's own work) is not in them and is filled in from fits of whole engines.
Attention at fewer than 8 heads or 256 tokens of context is left out: there only latency shows.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from baton.core.cost import HeldOut
from baton.errors import ConfigError
from baton.planner.calibrate import Array, hash_fraction, held_out, minimise

MIN_SIZE, MIN_HEADS, MIN_CONTEXT, MAX_BATCH = 1024, 8, 256, 256
MAX_ROWS = 4000
"""Of a table, chosen by hash: a fit needs no more."""
MAX_SHARE_OF_PEAK = 1.05
"""A row that claims more arithmetic than the datasheet allows was not measured as it says."""
BYTES = {"bfloat16": 2.0, "float16": 2.0, "half": 2.0, "fp8": 1.0, "int8": 1.0}


class Fitted(msgspec.Struct, frozen=True):
    """Values by name, and the error on shapes that were held out."""

    values: dict[str, float]
    error: HeldOut
    num_impossible: int = 0


def fit_gemm(directory: Path, gpu: str, dtype: str) -> Fitted:
    """flops_per_s, weight_bytes_per_s, launch_s and sharpness of linear layers in `dtype`.

    Raises:
        ConfigError: the table is missing or has no such rows.
    """
    rows = [row for row in _table(directory, f"{gpu}.gemm_perf.*") if row["gemm_dtype"] == dtype]
    table = _columns(rows, "m", "n", "k", "latency")
    _, n, k, _ = table.T
    table = table[(n >= MIN_SIZE) & (k >= MIN_SIZE)]

    def predict(at: Array, values: Array) -> Array:
        m, n, k = at.T
        flops_per_s, bytes_per_s, launch_s, sharpness = values
        compute = 2 * m * n * k / flops_per_s
        memory = (n * k * BYTES[dtype] + 2 * m * n + BYTES[dtype] * m * k) / bytes_per_s
        low, high = np.minimum(compute, memory), np.maximum(compute, memory)
        return np.asarray(launch_s + high * (1 + (low / high) ** sharpness) ** (1 / sharpness))

    start = {"flops_per_s": 3e14, "weight_bytes_per_s": 2e12, "launch_s": 5e-6, "sharpness": 3.0}
    return _fit(table, (1, 2), predict, start, (None, None, None, 0.5), "gemm")


def fit_decode_attention(directory: Path, gpu: str) -> Fitted:
    """kv_bytes_per_s and launch_s of attention over 16-bit KV, one query a sequence.

    Raises:
        ConfigError: the table is missing or has no such rows.
    """
    rows = _table(directory, f"{gpu}.generation_attention_perf.*")
    rows = [row for row in rows if row["kv_cache_dtype"] == "bfloat16"]
    names = ("batch_size", "num_heads", "num_key_value_heads", "head_dim", "isl", "step", "latency")
    table = _columns(rows, *names)
    batch, heads, _, _, first, step, _ = table.T
    usual = (batch <= MAX_BATCH) & (heads >= MIN_HEADS) & (first + step >= MIN_CONTEXT)

    def predict(at: Array, values: Array) -> Array:
        batch, _, kv_heads, head_dim, first, step = at.T
        num_bytes = batch * (first + step) * 2 * kv_heads * head_dim * 2
        return np.asarray(values[1] + num_bytes / values[0])

    start = {"kv_bytes_per_s": 2e12, "launch_s": 1e-5}
    return _fit(table[usual], (0, 1, 2, 5), predict, start, (None, None), "decode attention")


def fit_prompt_attention(directory: Path, gpu: str, peak_flops_per_s: float) -> Fitted:
    """attention_flops_per_s, io_bytes_per_s and launch_s of whole prompts.

    Raises:
        ConfigError: the table is missing or has no such rows.
    """
    rows = _table(directory, f"{gpu}.context_attention_perf.*")
    rows = [row for row in rows if row["kv_cache_dtype"] == "bfloat16" and row["step"] == "0"]
    names = ("batch_size", "num_heads", "num_key_value_heads", "head_dim", "isl", "latency")
    table = _columns(rows, *names)
    batch, heads, _, head_dim, tokens, latency_s = table.T
    flops = batch * tokens**2 / 2 * 4 * heads * head_dim
    possible = flops / latency_s <= MAX_SHARE_OF_PEAK * peak_flops_per_s
    usual = possible & (heads >= MIN_HEADS) & (tokens >= MIN_CONTEXT)

    def predict(at: Array, values: Array) -> Array:
        batch, heads, kv_heads, head_dim, tokens = at.T
        flops = batch * tokens**2 / 2 * 4 * heads * head_dim
        num_bytes = batch * tokens * (heads + kv_heads) * 2 * head_dim * 2
        return np.asarray(values[2] + flops / values[0] + num_bytes / values[1])

    start = {"attention_flops_per_s": 2e14, "io_bytes_per_s": 2e12, "launch_s": 1e-5}
    fitted = _fit(table[usual], (0, 1, 2, 4), predict, start, (None,) * 3, "prompt attention")
    return msgspec.structs.replace(fitted, num_impossible=int(np.sum(~possible)))


def fit_allreduce(directory: Path, gpu: str) -> Fitted:
    """allreduce_s and allreduce_bytes_per_s of the engine's own all-reduce within CUDA graphs.

    Raises:
        ConfigError: the table is missing or has no such rows.
    """
    rows = _table(directory, f"{gpu}.custom_allreduce_perf.*")
    rows = [row for row in rows if row["backend"] == "vllm_graph"]
    table = _columns(rows, "num_gpus", "message_size", "latency")
    num_elements = table[:, 1]

    def predict(at: Array, values: Array) -> Array:
        ranks, num_elements = at.T
        moved = 2 * (ranks - 1) / ranks * num_elements * 2
        return np.asarray(values[0] + moved / values[1])

    start = {"allreduce_s": 6e-6, "allreduce_bytes_per_s": 2e11}
    usual = num_elements <= 2**26  # 8,192 tokens of the widest model
    return _fit(table[usual], (0, 1), predict, start, (None, None), "allreduce")


def _fit(
    table: Array,
    key: tuple[int, ...],
    predict: Callable[[Array, Array], Array],
    start: dict[str, float],
    prior: tuple[float | None, ...],
    kind: str,
) -> Fitted:
    """Fit all rows; the error is that of a fit on half of the shapes, on the other half."""
    if len(table) < 8:
        raise ConfigError(f"too few rows to fit {kind}: {len(table)}")
    names = [tuple(float(value) for value in row[list(key)]) for row in table]
    if len(table) > MAX_ROWS:
        whole = np.array([hash_fraction(("row", *map(float, row[:-1]))) for row in table])
        keep = np.argsort(whole)[:MAX_ROWS]
        table, names = table[keep], [names[i] for i in keep]
    inputs, measured = table[:, :-1], table[:, -1]
    seen = np.array([hash_fraction(name) < 0.5 for name in names])

    def fitted(rows: Array) -> Array:
        at = inputs[rows]
        return minimise(lambda v: predict(at, v), measured[rows], list(start.values()), prior)

    ratios = measured[~seen] / predict(inputs[~seen], fitted(seen))
    values = fitted(np.ones(len(table), bool))
    found = {name: float(f"{value:.5g}") for name, value in zip(start, values, strict=True)}
    return Fitted(found, held_out(kind, list(ratios)))


def _table(directory: Path, pattern: str) -> list[dict[str, str]]:
    """The rows of the table of the latest version.

    Raises:
        ConfigError: there is none.
    """
    files = sorted(directory.glob(pattern + ".csv.gz"))
    if not files:
        raise ConfigError(f"no table {pattern}.csv.gz in {directory}")
    with gzip.open(files[-1], "rt", newline="") as lines:
        return list(csv.DictReader(lines))


def _columns(rows: list[dict[str, str]], *names: str) -> Array:
    """Shape (rows, names); `latency`, the last one, in seconds."""
    table = np.array([[float(row[name]) for name in names] for row in rows])
    if not len(table):
        raise ConfigError(f"no rows with {', '.join(names)} are left of the table")
    table[:, -1] *= 1e-3
    return table
