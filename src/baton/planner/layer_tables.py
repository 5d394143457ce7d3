"""Whole steps, put together from published times of single layers.

LLMServingSim's profiles hold, for one model on one GPU under vLLM, the time of each layer by tokens
(`dense`), of attention by prompt chunk and decode batch (`attention`), and of the head and the
sampler by sequences (`per_sequence`), in microseconds. A step is a layer's times, for all layers,
plus what comes once. The engine's own work between them is not in it.
"""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np

from baton.core.cost import ChunkShape, ModelShape, StepShape
from baton.errors import ConfigError
from baton.planner.calibrate import Observation, hash_fraction

EACH_LAYER = {
    "qkv_proj": 1, "o_proj": 1, "gate_up_proj": 1, "down_proj": 1, "act_fn": 1, "layernorm": 2,
    "rotary_emb": 1, "qk_norm": 1,
}  # fmt: skip
ONCE = {"embedding": 1, "final_layernorm": 1}

Curve = tuple[np.ndarray, np.ndarray]


def read_steps(
    directory: Path, stem: str, model: ModelShape, max_of_a_kind: int = 300
) -> list[Observation]:
    """Steps at points of the attention table, so many at most of each kind, chosen by hash.

    stem: the files' beginning, such as `RTX4090_Llama-3.1-8B_tp1`.

    Raises:
        ConfigError: a file is missing or not of this form.
    """
    try:
        dense = _curves(directory / f"{stem}_dense.csv.gz", "layer", "tokens")
        last = _curves(directory / f"{stem}_per_sequence.csv.gz", "layer", "sequences")
        rows = _rows(directory / f"{stem}_attention.csv.gz")
        steps = [_step(row, dense, last, model) for row in rows]
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(f"the layer tables {stem} cannot be read: {error!r}") from None
    chosen = []
    for kind in ("decode", "prefill", "mixed"):
        members = [step for step in steps if step.kind == kind]
        members.sort(key=lambda step: hash_fraction(("pick", step.group)))
        chosen += members[:max_of_a_kind]
    return chosen


def _step(
    row: dict[str, str], dense: dict[str, Curve], last: dict[str, Curve], model: ModelShape
) -> Observation:
    chunk, context = int(row["prefill_chunk"]), int(row["kv_prefill"])
    num_decode, kv_decode = int(row["n_decode"]), int(row["kv_decode"])
    chunks = [ChunkShape(1, max(kv_decode - 1, 0), True)] * num_decode
    if chunk:
        chunks.append(ChunkShape(chunk, context, True))
    shape = StepShape.of(chunks)
    layer_us = float(row["time_us"])
    layer_us += sum(
        count * _at(dense[name], shape.num_tokens)
        for name, count in EACH_LAYER.items()
        if name in dense
    )
    once_us = sum(count * _at(dense[name], shape.num_tokens) for name, count in ONCE.items())
    once_us += sum(_at(curve, shape.num_samples) for curve in last.values())
    kind = "decode" if not chunk else "mixed" if num_decode else "prefill"
    group = (chunk, context, num_decode, kv_decode)
    return Observation(shape, (model.num_layers * layer_us + once_us) * 1e-6, kind, group)


def _at(curve: Curve, x: int) -> float:
    return float(np.interp(x, *curve))


def _curves(file: Path, name: str, x: str) -> dict[str, Curve]:
    points: dict[str, list[tuple[float, float]]] = {}
    for row in _rows(file):
        points.setdefault(row[name], []).append((float(row[x]), float(row["time_us"])))
    curves = {}
    for layer, pairs in points.items():
        table = np.array(sorted(pairs))
        curves[layer] = (table[:, 0], table[:, 1])
    return curves


def _rows(file: Path) -> list[dict[str, str]]:
    with gzip.open(file, "rt", newline="") as lines:
        return list(csv.DictReader(lines))
