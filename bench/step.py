"""Where the time of a decode step goes: the engine loop on the CPU kernels, taken apart.

    python bench/step.py [--model 0.5B] [--batches 1,8,32] [--steps 24] [--rounds 3] [--threads 2]
                         [--peers .peers]

Steps of `--batches` sequences whose contexts are 128 tokens long at first run in turns as they are
and taken apart: then each kernel of a layer is called by itself, from Python, and timed. `rest` is
what the engine does besides: scheduling, inputs, the Python between kernels, clocks included. GB/s
are those of weights, or of the K and V that attention reads. In each round the memory's bandwidth
is measured too, as a sum over an array. Medians.
"""

from __future__ import annotations

import argparse
import secrets
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from parts.peers.models import prepare
from parts.peers.run_baton import Measurement
from parts.table import Row, render

from baton.engine import runner
from baton.model.native import Kernels, LayerArgs, LinearArgs, StepArgs
from baton.model_spec import ModelSpec

CONTEXT = 128
BUFFER_BYTES = 512 << 20
PIECES = (
    *("embed", "angles", "norms", "qkv", "rope_write", "attend", "o", "gate_up", "silu_mul"),
    *("down", "lm_head", "sample"),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="0.5B", help="a shape or a model directory [0.5B]")
    parser.add_argument("--batches", default="1,8,32", help="[1,8,32]")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", type=Path, default=Path(".peers"), help="for models [.peers]")
    args = parser.parse_args()
    batches = [int(batch) for batch in args.batches.split(",")]
    directory, _, spec = prepare(args.model, args.peers.resolve())
    room = max(4096, max(batches) * (CONTEXT + args.steps + 96))
    measurement = Measurement(str(directory), args.threads, room, 2048)
    print(f"{measurement.about}, {args.steps} steps, {args.rounds} rounds, medians\n")
    watch = _Watch(measurement)
    buffer = torch.ones(BUFFER_BYTES // 4)
    bandwidths, whole = [], defaultdict[int, list[float]](list)
    apart = {batch: defaultdict[str, list[float]](list) for batch in batches}
    for number in range(args.rounds + 1):
        rate = BUFFER_BYTES / min(_seconds(buffer.sum) for _ in range(4))
        for batch in batches:
            cell = {"kind": "decode", "batch": batch, "context": CONTEXT, "steps": args.steps}
            cell["seed"] = secrets.token_hex(4)
            seconds = measurement.measure(cell)
            with watch.looking():
                total = measurement.measure(cell | {"seed": secrets.token_hex(4)})
            if number > 0:  # the first one warms up
                whole[batch].append(seconds)
                for name, spent in watch.spent(args.steps, total).items():
                    apart[batch][name].append(spent)
        if number > 0:
            bandwidths.append(rate)
    bandwidth = statistics.median(bandwidths)
    rows = []
    for batch in batches:
        rows += _rows(batch, whole[batch], apart[batch], spec, args.steps, bandwidth)
    print(render(rows))
    print(f"memory: {bandwidth / 1e9:.1f} GB/s ({min(bandwidths) / 1e9:.1f} at least)")
    return 0


class _Watch:
    """Takes the steps of a measurement's engine apart while `looking`, and sums their pieces."""

    def __init__(self, measurement: Measurement) -> None:
        self._measurement = measurement
        self._layers = cast(Any, measurement)._engine._runner._model._layers
        self._kernels: Kernels = self._layers._kernels
        self._seconds: defaultdict[str, list[float]] = defaultdict(list)

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Steps under way are taken apart; the prompts that come before them as well."""
        self._seconds.clear()
        kernels, sample = self._kernels, runner.sample
        seen = SimpleNamespace(
            embed=self._timed("embed", kernels.embed),
            angles=self._timed("angles", kernels.angles),
            rms_norm=self._timed("norms", kernels.rms_norm),
            linear=self._timed("lm_head", kernels.linear),
            table=SimpleNamespace(layer=self._layer),
        )
        self._layers._kernels = seen
        cast(Any, runner).sample = self._timed("sample", sample)
        try:
            yield
        finally:
            self._layers._kernels = kernels
            cast(Any, runner).sample = sample

    def spent(self, steps: int, total: float) -> dict[str, float]:
        """Seconds of each piece in one of the last `steps` steps, which took `total` each."""
        found = {}
        for name in PIECES:
            calls = self._seconds[name]
            each = self._calls_a_step(name)
            found[name] = sum(calls[len(calls) - steps * each :]) / steps if calls else 0.0
        return found | {"rest": total - sum(found.values())}

    def _calls_a_step(self, name: str) -> int:
        layers = len(self._layers._layers)
        if name in ("embed", "angles", "lm_head", "sample"):
            return 1
        return 2 * layers + 1 if name == "norms" else layers

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        seconds = self._seconds[name]

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = call(*args, **kwargs)
            seconds.append(time.perf_counter() - started)
            return result

        return timed

    def _layer(self, layer: LayerArgs, step: StepArgs, index: int) -> None:
        """What `layer` of the kernels does, piece by piece."""
        table, m, eps = self._kernels.table, step.tokens, step.eps
        hidden, inner, dtype, threads = layer.qkv.k, layer.down.k, step.dtype, step.threads

        def product(name: str, w: LinearArgs, x: int, residual: int, y: int) -> None:
            self._timed(name, table.linear)(w, x, residual, y, m, 0, dtype, threads)

        def norm(weight: int) -> None:
            args = (step.x, weight, step.normed, m, hidden, eps, dtype, threads)
            self._timed("norms", table.rms_norm)(*args)

        norm(layer.input_norm)
        product("qkv", layer.qkv, step.normed, 0, step.qkv)
        self._timed("rope_write", table.rope_write)(layer, step, index)
        self._timed("attend", table.attend)(layer, step, index)
        product("o", layer.o, step.attended, step.x, step.x)
        norm(layer.post_norm)
        product("gate_up", layer.gate_up, step.normed, 0, step.gate_up)
        args = (step.gate_up, step.inner, m, inner, dtype, threads)
        self._timed("silu_mul", table.silu_mul)(*args)
        product("down", layer.down, step.inner, step.x, step.x)


def _rows(
    batch: int,
    whole: list[float],
    apart: dict[str, list[float]],
    spec: ModelSpec,
    steps: int,
    bandwidth: float,
) -> list[Row]:
    part = f"a step of {batch}"
    num_bytes = _bytes(spec, batch, steps)
    pieces = {name: statistics.median(seconds) for name, seconds in apart.items()}
    total, step = sum(pieces.values()), statistics.median(whole)

    def row(name: str, seconds: float, size: float) -> Row:
        rate, floor = size / seconds if seconds > 0 else 0.0, size / bandwidth
        return Row(part, name, {
            "ms": 1e3 * seconds, "%": 100 * seconds / total, "GB/s": rate / 1e9,
            "ms above the memory's": 1e3 * (seconds - floor),
        })  # fmt: skip

    rows = [row(name, seconds, num_bytes.get(name, 0.0)) for name, seconds in pieces.items()]
    rows += [row("taken apart", total, sum(num_bytes.values()))]
    return [*rows, row("as it is", step, sum(num_bytes.values()))]


def _bytes(spec: ModelSpec, batch: int, steps: int) -> dict[str, float]:
    """What a step reads, by piece."""
    width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    each = 2 * spec.num_layers * spec.hidden_size
    return {
        "qkv": each * width,
        "o": each * spec.num_heads * spec.head_dim,
        "gate_up": each * 2 * spec.intermediate_size,
        "down": each * spec.intermediate_size,
        "lm_head": 2 * spec.vocab_size * spec.hidden_size,
        "attend": batch * (CONTEXT + steps / 2) * spec.kv_bytes_per_token(),
    }


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
