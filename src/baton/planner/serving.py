"""Coefficients from measured serving points: TTFT and TPOT at a constant number of requests.

Published measurements of whole engines are rows of (model, device, engine, parallelism, lengths,
concurrency) with two times. `steady` predicts these times from coefficients, so the coefficients
can be fitted to them, pooled over devices, engines and models (`pooled`). What is fitted are shares
of the datasheet's peaks, so a device without measurements has a prediction too.
"""

from __future__ import annotations

import csv
import gzip
import math
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from baton.core.cost import Coefficients, ModelShape, Parallel, StepCost
from baton.errors import ConfigError
from baton.planner.calibrate import Array
from baton.planner.hardware import Device, find_device
from baton.planner.models import find_model
from baton.planner.pooled import Point, Pooled, fit_pooled
from baton.planner.steady import Load, Steady, decode_shape, steady

ANSWERS = ("silicon_ttft_ms", "silicon_tpot_ms")
NOT_CONFIGURATION = (*ANSWERS, "id", "measured", "isl", "osl", "batch_size", "silicon_concurrency")
"""All other columns say which configuration a row is of. Its date and label do not: the same
configuration measured twice must not be on both sides of a split."""

QUANTISED = {"": 2.0, "fp8": 1.0, "fp8_block": 1.0, "nvfp4": 0.5625, "int4_wo": 0.53}
"""Bytes of a weight, its scales included."""
STANDS_FOR = {"b300_sxm": "b200_sxm", "gb300": "gb200"}
"""Devices whose datasheet is not here: the one before them, corrected by the device's factor."""

START = {
    "flops": 0.75,
    "weight_bytes": 0.8,
    "kv_bytes": 0.75,
    "attention_flops": 0.4,
    "step_s": 5e-4,
    "layer_s": 2.5e-5,
    "sequence_s": 5e-6,
    "allreduce_s": 8e-6,
    "allreduce_bytes": 0.5,
    "interference": 0.8,
    "expert_factor": 1.3,
}
"""What is fitted, and where the search begins: rates as shares of the datasheet's."""
PRIORS: dict[Hashable, float] = {"device": 0.15, "engine": 0.3, "family": 0.25}
_Predict = Callable[[Array], float]

TTFT_START = {"start_s": 0.03, "queue": 0.5, "prompt": 1.0}


class ServingPoint(msgspec.Struct, frozen=True):
    """One measured row. tpot_s, ttft_s: the answers; ttft_s is 0 where it was not measured.

    num_prefill, num_decode: workers of each kind, 0 and 1 where one kind does both. date: of the
    measurement, ISO 8601.
    """

    configuration: tuple[tuple[str, str], ...]
    engine: str
    device: str
    model: ModelShape
    parallel: Parallel
    load: Load
    tpot_s: float
    ttft_s: float
    split: bool = False
    num_prefill: int = 0
    num_decode: int = 1
    prefill_parallel: Parallel = Parallel()
    date: str = ""

    @property
    def num_devices(self) -> int:
        prefill = self.num_prefill * self.prefill_parallel.num_devices
        return prefill + self.num_decode * self.parallel.num_devices

    @property
    def levels(self) -> tuple[tuple[Hashable, ...], ...]:
        family = ("family", self.engine, self.device, self.model.name, self.model.weight_bytes)
        return ("device", self.device), ("engine", self.engine), family

    def tokens_per_device_s(self, ttft_s: float, tpot_s: float) -> float:
        """Output tokens a second and device that such times come to."""
        life_s = ttft_s + (self.load.num_output_tokens - 1) * tpot_s
        return self.load.concurrency * self.load.num_output_tokens / life_s / self.num_devices


def read_points(file: Path) -> list[ServingPoint]:
    """All rows that say how many workers there were, and how busy.

    Raises:
        ConfigError: the file is missing, or a row cannot be read.
    """
    try:
        with gzip.open(file, "rt", newline="") as lines:
            rows = list(csv.DictReader(lines))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
    try:
        points = [_point(row) for row in rows]
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{file} has a row that is not of this form: {error!r}") from None
    return [point for point in points if point is not None]


def coefficients(values: Array, device: Device, model: ModelShape) -> Coefficients:
    """Shares of the datasheet to rates. values: in the order of `START`."""
    named = dict(zip(START, map(float, values), strict=True))
    return Coefficients(
        flops_per_s=named["flops"] * device.peak(model.weight_bytes),
        weight_bytes_per_s=named["weight_bytes"] * device.memory_bytes_per_s,
        attention_flops_per_s=named["attention_flops"] * device.bf16_flops_per_s,
        kv_bytes_per_s=named["kv_bytes"] * device.memory_bytes_per_s,
        step_s=named["step_s"],
        layer_s=named["layer_s"],
        sequence_s=named["sequence_s"],
        allreduce_s=named["allreduce_s"],
        allreduce_bytes_per_s=named["allreduce_bytes"] * device.link_bytes_per_s,
        expert_factor=named["expert_factor"],
    )


class ServingFit:
    """Fitted to points; predicts others."""

    def __init__(self, points: Sequence[ServingPoint]) -> None:
        """Raises ConfigError if there is nothing to fit."""
        tpots = [Point(p.tpot_s, p.levels, _tpot_of(p)) for p in points]
        self._pooled: Pooled = fit_pooled(tpots, list(START.values()), PRIORS)
        ttfts = [
            Point(p.ttft_s, p.levels, self._ttft_of(p)) for p in points if p.ttft_s and not p.split
        ]
        self._ttft = fit_pooled(ttfts, list(TTFT_START.values()), PRIORS) if ttfts else None

    def common(self) -> Array:
        """The values of `START` that all points share."""
        return self._pooled.common

    def parameters(self, point: ServingPoint) -> dict[str, float]:
        """By the names of `START`."""
        found = self._pooled.parameters(point.levels)
        return dict(zip(START, map(float, found), strict=True))

    def cost(self, point: ServingPoint) -> StepCost:
        return _cost(point, self._pooled.parameters(point.levels))

    def predict(self, point: ServingPoint) -> tuple[float, float]:
        """(ttft_s, tpot_s); neither of the point's answers is read."""
        values = self._pooled.parameters(point.levels)
        tpot_s = _tpot_of(point)(values)
        if self._ttft is None or point.split:
            return 0.0, tpot_s
        return self._ttft_of(point)(self._ttft.parameters(point.levels)), tpot_s

    def _ttft_of(self, point: ServingPoint) -> _Predict:
        values = self._pooled.parameters(point.levels)
        alone = _steady(point, values, 0.0)
        # Linear in the share of others that are waited for, so two values tell all.
        waiting_s = _steady(point, values, 1.0).ttft_s - alone.ttft_s

        def predict(values: Array) -> float:
            start_s, queue, prompt = map(float, values)
            return start_s + prompt * (alone.ttft_s + queue * waiting_s)

        return predict


def _tpot_of(point: ServingPoint) -> _Predict:
    if not point.split:
        return lambda values: _steady(point, values, 0.0).tpot_s
    each = msgspec.structs.replace(
        point.load, concurrency=max(1.0, point.load.concurrency / point.num_decode)
    )
    step = decode_shape(each)
    return lambda values: _cost(point, values).stage_s(step)


def _steady(point: ServingPoint, values: Array, queue: float) -> Steady:
    interference = float(values[list(START).index("interference")])
    return steady(_cost(point, values), point.load, interference, queue)


def _cost(point: ServingPoint, values: Array) -> StepCost:
    device = find_device(STANDS_FOR.get(point.device, point.device))
    return StepCost(point.model, coefficients(values, device, point.model), point.parallel)


def _point(row: dict[str, str]) -> ServingPoint | None:
    split = row["mode"] == "disagg"
    prefix = "decode_" if split else ""
    concurrency = _number(row["silicon_concurrency"])
    if split:
        workers = _number(row["decode_num_workers"])
        concurrency = concurrency or _number(row["decode_batch_size"]) * workers
        if not workers:
            return None
    else:
        concurrency = concurrency or _number(row["batch_size"])
    if not concurrency:
        return None
    model = find_model(row["model_path"])
    if not split and not model.is_moe:
        # Where they differ, several workers share the concurrency; the batch is one worker's.
        concurrency = _number(row["batch_size"]) or concurrency
    weight_bytes = QUANTISED[row["gemm_quant_mode"]]
    model = msgspec.structs.replace(model, weight_bytes=weight_bytes, kv_bytes=_kv_bytes(row))
    return ServingPoint(
        tuple(sorted((k, v) for k, v in row.items() if k not in NOT_CONFIGURATION)),
        row["backend"],
        row["system"],
        model,
        _parallel(row, prefix),
        Load(int(row["isl"]), int(row["osl"]), concurrency),
        _number(row["silicon_tpot_ms"]) / 1e3,
        _number(row["silicon_ttft_ms"]) / 1e3,
        split,
        int(_number(row["prefill_num_workers"])) if split else 0,
        int(_number(row["decode_num_workers"])) if split else 1,
        _parallel(row, "prefill_") if split else Parallel(),
        row["measured"],
    )


def _parallel(row: dict[str, str], prefix: str) -> Parallel:
    """Some rows multiply the degrees of experts into those of attention; n ranks are meant then."""
    tensor = int(_number(row[prefix + "tp_size"]) or 1)
    data = int(_number(row[prefix + "attention_dp_size"]) or 1)
    pipeline = int(_number(row[prefix + "pp_size"]) or 1)
    moe_tp = int(_number(row[prefix + "moe_tp_size"]) or 1)
    moe_ep = int(_number(row[prefix + "moe_ep_size"]) or 1)
    if moe_tp == moe_ep > 1 and tensor * data == moe_tp * moe_ep:
        ranks = math.isqrt(moe_tp * moe_ep)
        tensor, data = (1, ranks) if data > 1 else (ranks, 1)
    elif tensor == data > 1:
        tensor = 1
    return Parallel(tensor, pipeline, data)


def _kv_bytes(row: dict[str, str]) -> float:
    """Not in the data: taken as 8 bits beside weights of 8 or fewer, 16 otherwise."""
    return 2.0 if row["gemm_quant_mode"] in ("", "int4_wo") else 1.0


def _number(text: str) -> float:
    value = float(text or 0)
    return value if np.isfinite(value) else 0.0
