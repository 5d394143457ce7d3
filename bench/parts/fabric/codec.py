"""Wire codecs: their speed beside a plain copy of the same blocks, and what they cost in quality.

    python -m parts.fabric.codec            this part alone, from bench/

The blocks of a case are 64 MiB together, so that they come from memory and not from a cache, as
blocks of a pool do; one block over and over ("in cache") is measured beside them. Times are of
whole calls from Python, one block each. Sending is not measured here but worked out from the rate
of the link: bytes / rate.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from baton.config import load_config
from baton.core.codec_choice import Link, choose_codec
from baton.engine.kv_quality import calibrate
from baton.fabric.calibration import Calibration, codec_figures
from baton.fabric.codec import CODECS, body
from baton.types import KvFormat
from parts.big_model import write_model
from parts.fabric import Missing, Row, interleaved, middle

TOTAL_BYTES = 64 << 20
FORMATS = {
    "512 KiB": KvFormat(16, "bfloat16", 16, 8, 64, 512 << 10),
    "32 KiB": KvFormat(16, "bfloat16", 4, 4, 32, 32 << 10),
}
"""Of a model of 0.5 B parameters, and of one as small as the demo's."""
DEMO = Path(__file__).parents[3] / "models" / "baton-demo"
LOSSY = ("fp8", "int8", "int4")
GBIT_PER_S = (1, 5, 10)
COPY_TARGET = {("int8", "512 KiB"): "≥ 0.3", ("int8", "32 KiB"): "≥ 0.3"}
IN_CACHE_CALLS = 64


def measure(rounds: int) -> list[Row]:
    rows = [Row(f"codecs run on: {body().name}", 1)]
    for size, fmt in FORMATS.items():
        rows += _speed(size, fmt, rounds)
    rows += _quality("demo model", DEMO)
    with tempfile.TemporaryDirectory(prefix="baton-codec-") as name:
        write_model(Path(name) / "model")
        rows += _quality("random 0.5 B", Path(name) / "model")
    return rows


class Blocks:
    """Raw blocks of random numbers, room for them encoded, and room for them decoded."""

    def __init__(self, fmt: KvFormat, count: int) -> None:
        self.fmt = fmt
        self.count = count
        x = np.random.default_rng(0).standard_normal(count * fmt.block_bytes // 2, np.float32)
        self.raw = (x.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(count, -1)
        self.decoded = np.ones_like(self.raw)
        self.encoded = {
            name: np.ones((count, CODECS[name].encoded_bytes(fmt)), np.uint8) for name in LOSSY
        }

    def copy(self) -> None:
        for source, target in zip(self.raw, self.decoded, strict=True):
            np.copyto(target, source)

    def encode(self, name: str) -> None:
        codec = CODECS[name]
        for source, target in zip(self.raw, self.encoded[name], strict=True):
            codec.encode(self.fmt, source, target)

    def decode(self, name: str) -> None:
        codec = CODECS[name]
        for source, target in zip(self.encoded[name], self.decoded, strict=True):
            codec.decode(self.fmt, source, target)

    def cases(self, repeats: int = 1) -> dict[str, Callable[[], object]]:
        """Each does everything `repeats` times."""
        calls: dict[str, Callable[[], None]] = {"copy": self.copy}
        for name in LOSSY:
            calls[f"encode {name}"] = functools.partial(self.encode, name)
            calls[f"decode {name}"] = functools.partial(self.decode, name)
        return {name: functools.partial(_repeat, call, repeats) for name, call in calls.items()}


def _repeat(call: Callable[[], None], repeats: int) -> None:
    for _ in range(repeats):
        call()


def _speed(size: str, fmt: KvFormat, rounds: int) -> list[Row]:
    count = TOTAL_BYTES // fmt.block_bytes
    seconds = {
        name: taken / count
        for name, taken in interleaved(Blocks(fmt, count).cases(), rounds).items()
    }
    cached = interleaved(Blocks(fmt, 1).cases(IN_CACHE_CALLS), rounds)
    rate, spread = middle(fmt.block_bytes / seconds["copy"] / 1e9)
    rows = [Row(f"{size}: numpy copy", rate, "GB/s", note=spread)]
    for name in LOSSY:
        encode, decode = seconds[f"encode {name}"], seconds[f"decode {name}"]
        own, spread = middle(seconds["copy"] / (encode + decode))
        target = COPY_TARGET.get((name, size), "")
        rows.append(Row(f"{size}: copy ÷ ({name} encode + decode)", own, "", target, spread))
        both = cached[f"encode {name}"] + cached[f"decode {name}"]
        own, spread = middle(cached["copy"] / both)
        rows.append(Row(f"{size}: the same, one block in cache", own, "", "", spread))
        rate, spread = middle(fmt.block_bytes * 8e-9 / encode)
        rows.append(Row(f"{size}: {name} encode, of raw bytes", rate, "Gbit/s", "", spread))
        encoded = CODECS[name].encoded_bytes(fmt)
        for gbit in GBIT_PER_S:
            raw_s, send_s = fmt.block_bytes * 8e-9 / gbit, encoded * 8e-9 / gbit
            gain, spread = middle(raw_s / (encode + send_s))
            with_decode, _ = middle(raw_s / (encode + send_s + decode))
            rows.append(
                Row(
                    f"{size}: raw send ÷ ({name} encode + send), {gbit} Gbit/s",
                    gain,
                    "",
                    "≥ 1",
                    f"{spread}; with decode {with_decode:.2f}; one after the other, no overlap",
                )
            )
    return rows


def _quality(model: str, path: Path) -> list[Row]:
    if not (path / "config.json").exists():
        raise Missing(f"there is no model in {path}")
    config = load_config(None, {"model.path": str(path)})
    found = calibrate(config, path)
    note = f"{found.num_positions} positions, {found.text} text, {torch.get_num_threads()} threads"
    rows = []
    for name in LOSSY:
        loss = found.codecs[name]
        share = loss.bytes_per_token / found.codecs["raw"].bytes_per_token
        rows.append(Row(f"{model}: {name}, share of raw bytes", share))
        for statistic in ("mean", "p99", "max"):
            value = float(getattr(loss, f"kl_{statistic}"))
            rows.append(Row(f"{model}: {name}, KL {statistic}", value, "nats", "", note))
    return rows + [_budget(model, found, limit) for limit in (0.01, 1e-6)]


def _budget(model: str, found: Calibration, limit: float) -> Row:
    """What a slow link would choose: its loss must be within the budget."""
    fmt = FORMATS["512 KiB"]
    figures = codec_figures(fmt, found)
    chosen = choose_codec(fmt.block_bytes, figures, Link(1e9 / 8), limit).codec
    kl = found.kl(chosen)
    assert kl is not None
    return Row(
        f"{model}: KL max of what is chosen at {limit:g}", kl, "nats", f"≤ {limit:g}", chosen
    )


if __name__ == "__main__":
    for row in measure(9):
        print(f"{row.name:62} {row.value:10.4g} {row.unit:7} {row.target:8} {row.note}")
