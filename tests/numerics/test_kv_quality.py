"""What codecs do to next tokens: measured on tiny models, and by the command on the demo model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numerics.checkpoints import make_served_checkpoint
from numerics.tiny_models import make_checkpoint, reference_logits, reference_model

from baton.cli.main import main
from baton.config import load_config
from baton.core.codec_choice import Link, choose_codec
from baton.engine import kv_quality
from baton.engine.build import LoadedModel, load_model
from baton.engine.kv_quality import calibrate, kl_by_codec, kv_format
from baton.fabric.calibration import codec_figures, load_calibration, save_calibration
from baton.fabric.codec import CODECS, Raw, codecs_for, raw_bytes
from baton.types import KvFormat

DEMO = Path(__file__).parents[2] / "models" / "baton-demo"
NUM_PROMPT, LENGTH = 90, 120
SLOW = Link(1e6)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "model", "llama")


def load(path: Path, **options: object) -> LoadedModel:
    return load_model(load_config(None, {"model.path": str(path), **options}), path)


def windows(loaded: LoadedModel, count: int = 4) -> list[list[int]]:
    rng = np.random.default_rng(3)
    return rng.integers(loaded.spec.vocab_size, size=(count, LENGTH)).tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_losses_are_in_order(tiny: Path, dtype: str, kernels: str) -> None:
    loaded = load(tiny, **{"model.dtype": dtype, "engine.kernels": kernels})
    nats = kl_by_codec(loaded, kv_format(loaded, 16), windows(loaded), NUM_PROMPT)
    assert list(nats) == list(CODECS)
    assert all(each.shape == (4 * (LENGTH - NUM_PROMPT),) for each in nats.values())
    assert not nats["raw"].any()
    means = {name: each.mean() for name, each in nats.items()}
    assert 0 < means["int8"] < means["fp8"] < means["int4"] < 1


def test_the_distributions_are_the_models(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the right positions: those that transformers computes over the whole window."""
    seen = []

    def kl(p: torch.Tensor, q: torch.Tensor) -> np.ndarray[Any, Any]:
        seen.append(p)
        return np.zeros(len(p))

    monkeypatch.setattr(kv_quality, "_kl", kl)
    loaded = load(tiny)
    [window] = windows(loaded, 1)
    kl_by_codec(loaded, kv_format(loaded, 16), [window], NUM_PROMPT)
    expected = reference_logits(reference_model(tiny), window)[NUM_PROMPT:].log_softmax(-1)
    assert torch.allclose(seen[0], expected.double(), atol=1e-4)


class _Forgetful(Raw):
    """A codec that loses everything."""

    def decode(self, fmt: KvFormat, source: Any, destination: Any) -> None:
        np.frombuffer(destination, np.uint8)[:] = 0


class _Unbounded(Raw):
    """A codec that makes NaN of everything."""

    def decode(self, fmt: KvFormat, source: Any, destination: Any) -> None:
        np.frombuffer(destination, np.uint8)[:] = 0xFF


def test_a_codec_that_breaks_the_blocks_shows(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CODECS, "zero", _Forgetful())
    monkeypatch.setitem(CODECS, "nan", _Unbounded())
    found = calibrate(load_config(None, {"model.path": str(tiny)}), tiny)
    assert found.codecs["zero"].kl_mean > 10 * found.codecs["int4"].kl_mean
    assert found.kl("nan") is None


def test_a_model_without_a_tokenizer_gets_random_tokens(tiny: Path) -> None:
    found = calibrate(load_config(None, {"model.path": str(tiny)}), tiny)
    assert found.text == "random"
    assert found.num_positions == kv_quality.NUM_WINDOWS * kv_quality.ANSWER_TOKENS
    assert main(["fabric", "calibrate", "--model", str(tiny), "--text", "x"]) == 2


def test_a_short_context_is_enough(tmp_path: Path) -> None:
    path = make_served_checkpoint(tmp_path / "m", "llama", max_position_embeddings=48)
    told = []
    config = load_config(None, {"model.path": str(path)})
    found = calibrate(config, path, told=lambda *step: told.append(step))
    assert found.text == "built-in"
    assert found.num_positions == 8 * 12
    assert told == [(i, 8) for i in range(8)]


def test_half_precision_is_left_raw(tmp_path: Path) -> None:
    path = make_served_checkpoint(tmp_path / "m", "llama")
    config = load_config(
        None, {"model.path": str(path), "model.dtype": "float16", "engine.kernels": "torch"}
    )
    assert list(calibrate(config, path).codecs) == ["raw"]


def test_denormals_do_not_change_a_byte() -> None:
    """torch may have its threads take them for 0 (set_flush_denormal)."""
    fmt = KvFormat(16, "bfloat16", 2, 2, 32, 8192)
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 16, raw_bytes(fmt) // 2).astype(np.uint16)
    bits[::2] &= 0x957F  # of these, a fourth is denormal
    found: dict[tuple[str, bool], bytes] = {}
    try:
        for flush in (False, True):
            if not torch.set_flush_denormal(flush):
                pytest.skip("this processor does not do it")
            for name, each in codecs_for(fmt).items():
                encoded = np.zeros(each.encoded_bytes(fmt), np.uint8)
                decoded = np.zeros(fmt.block_bytes, np.uint8)
                each.encode(fmt, bits.view(np.uint8), encoded)
                each.decode(fmt, encoded, decoded)
                found[name, flush] = encoded.tobytes() + decoded.tobytes()
    finally:
        torch.set_flush_denormal(False)
    for name in codecs_for(fmt):
        assert found[name, False] == found[name, True]


def test_calibrate_on_the_demo_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["fabric", "calibrate", "--model", str(DEMO)]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    verdicts = {row[0]: row[-1] for row in table[1:5]}
    [file] = (tmp_path / "baton" / "calibration").iterdir()
    fmt = KvFormat(16, "bfloat16", 6, 4, 32, 49152)
    found = load_calibration(bytes.fromhex(file.stem), fmt)
    assert found is not None
    assert found.num_positions == 512
    assert {name: round(loss.bytes_per_token) for name, loss in found.codecs.items()} == {
        "raw": 3072,
        "fp8": 1542,
        "int8": 1680,
        "int4": 1056,
    }
    losses = [found.codecs[name] for name in ("raw", "int8", "fp8", "int4")]
    for field in ("kl_mean", "kl_p99", "kl_max"):
        values = [getattr(loss, field) for loss in losses]
        assert values == sorted(values) and values[0] == 0 < values[1]
    assert all(loss.kl_mean <= loss.kl_p99 <= loss.kl_max for loss in losses)
    assert verdicts["raw"] == "always"
    for name in ("int8", "fp8", "int4"):
        assert verdicts[name] == ("yes" if found.codecs[name].kl_max <= 0.01 else "no")
    assert verdicts["int8"] == "yes"
    figures = codec_figures(fmt, found)
    chosen = choose_codec(fmt.block_bytes, figures, SLOW, 0.01)
    assert chosen.codec != "raw" and found.codecs[chosen.codec].kl_max <= 0.01
    assert choose_codec(fmt.block_bytes, figures, SLOW, 1e-6).codec == "raw"
    assert choose_codec(fmt.block_bytes, figures, SLOW, 1.0).codec == "int4"


def test_texts_and_budgets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = make_served_checkpoint(tmp_path / "m", "llama")
    command = ["fabric", "calibrate", "--model", str(path), "--text"]
    text = tmp_path / "text"
    text.write_text("The same thing again. " * 40)
    assert main([*command, str(text), "--fabric.max-kl", "1e-6"]) == 0
    out = capsys.readouterr().out
    assert out.count(" no\n") == 3 and "within 1e-06 nats" in out and str(text) in out
    assert main([*command, str(text), "--fabric.max-kl", "0"]) == 0
    assert capsys.readouterr().out.count(" no\n") == 3
    text.write_text("Too short.")
    for wrong, message in (
        (str(text), "give a longer text with --text"),
        (str(tmp_path / "none"), "cannot read the text"),
        (str(path / "model.safetensors"), "cannot read the text"),
    ):
        assert main([*command, wrong]) == 2
        assert message in capsys.readouterr().err


def test_a_calibration_is_for_one_kind_of_block(tmp_path: Path) -> None:
    path = make_served_checkpoint(tmp_path / "m", "llama", max_position_embeddings=48)
    options = {"model.path": str(path), "engine.block_size": 8, "engine.threads": 1}
    found = calibrate(load_config(None, options), path)
    save_calibration(found, tmp_path)
    loaded = load(path)
    fmts = {size: kv_format(loaded, size) for size in (8, 16)}
    assert load_calibration(loaded.fingerprint, fmts[8], tmp_path) == found
    assert load_calibration(loaded.fingerprint, fmts[16], tmp_path) is None
