"""Where calibrations are kept: the round trip, and that a doubtful file counts as none."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import msgspec
import pytest

from baton.core.codec_choice import Link, choose_codec
from baton.errors import ConfigError
from baton.fabric import codec_native
from baton.fabric.calibration import (
    VERSION,
    Calibration,
    CodecLoss,
    calibration_dir,
    calibration_file,
    codec_figures,
    load_calibration,
    save_calibration,
)
from baton.fabric.codec import CODECS
from baton.types import KvFormat

FINGERPRINT = bytes(range(32))
FORMAT = KvFormat(16, "bfloat16", 2, 2, 32, 8192)
GOOD = Calibration(
    version=VERSION,
    codec_version=codec_native.VERSION,
    fingerprint=FINGERPRINT.hex(),
    numerics="cpu-exact",
    dtype="bfloat16",
    block_size=16,
    date="2026-11-21T00:00:00+00:00",
    text="built-in",
    text_sha256="0" * 64,
    num_positions=512,
    codecs={
        "raw": CodecLoss(512.0, 0.0, 0.0, 0.0),
        "fp8": CodecLoss(256.0, 1e-3, 1e-2, 2e-2),
        "int8": CodecLoss(280.0, 3e-4, 2e-3, 2.5e-3),
    },
)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    assert load_calibration(FINGERPRINT, FORMAT, tmp_path / "new") is None
    file = save_calibration(GOOD, tmp_path / "new")
    assert file == tmp_path / "new" / f"{FINGERPRINT.hex()}.json"
    assert load_calibration(FINGERPRINT, FORMAT, tmp_path / "new") == GOOD
    assert load_calibration(bytes(32), FORMAT, tmp_path / "new") is None
    later = msgspec.structs.replace(GOOD, num_positions=1)
    save_calibration(later, tmp_path / "new")
    assert load_calibration(FINGERPRINT, FORMAT, tmp_path / "new") == later
    assert list(file.parent.iterdir()) == [file]


def test_the_statistic_is_the_maximum() -> None:
    assert GOOD.kl("int8") == 2.5e-3
    assert GOOD.kl("int4") is None


def good_json() -> bytes:
    return msgspec.json.encode(GOOD)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        good_json()[:-5],
        good_json().replace(b'"kl_max":0.0025', b'"kl_max":-1'),
        good_json().replace(b'"kl_max":0.0025', b'"kl_max":"low"'),
        good_json().replace(b'"kl_max":0.0025', b'"kl_max":null'),
        good_json().replace(b'"kl_max":0.0025', b'"kl_max":1e999'),
        good_json().replace(b'"text"', b'"context"'),
        good_json().replace(b'"num_positions":512', b'"num_positions":0'),
        b"[" * 100_000,
        *(
            msgspec.json.encode(msgspec.structs.replace(GOOD, **{field: value}))
            for field, value in {
                "version": VERSION + 1,
                "codec_version": codec_native.VERSION + 1,
                "fingerprint": "00",
                "dtype": "float32",
                "block_size": 32,
            }.items()
        ),
    ],
)
def test_a_doubtful_file_is_a_warning_and_none(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calibration_file(FINGERPRINT, tmp_path).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert load_calibration(FINGERPRINT, FORMAT, tmp_path) is None
    assert "run baton fabric calibrate again" in caplog.text


def test_a_directory_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="set XDG_CACHE_HOME"):
        save_calibration(GOOD, tmp_path / "file" / "below")


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_calibration(GOOD, tmp_path)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ConfigError, match="No space left"):
        save_calibration(msgspec.structs.replace(GOOD, num_positions=1), tmp_path)
    assert load_calibration(FINGERPRINT, FORMAT, tmp_path) == GOOD
    assert len(list(tmp_path.iterdir())) == 1


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert calibration_dir() == tmp_path / "baton" / "calibration"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for relative in ("", "cache"):  # which the convention says to ignore
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert calibration_dir() == tmp_path / "home" / ".cache" / "baton" / "calibration"


def test_figures_join_times_lengths_and_losses() -> None:
    ticks = iter(range(1000))
    figures = {f.name: f for f in codec_figures(FORMAT, GOOD, lambda: float(next(ticks)))}
    assert list(figures) == ["fp8", "int8", "int4"]
    for name, figure in figures.items():
        assert figure.encoded_bytes == CODECS[name].encoded_bytes(FORMAT)
        assert (figure.encode_s, figure.decode_s) == (1.0, 1.0)
    assert [figure.kl for figure in figures.values()] == [2e-2, 2.5e-3, None]
    assert all(figure.kl is None for figure in codec_figures(FORMAT, None))
    half = msgspec.structs.replace(FORMAT, dtype="float16")
    assert codec_figures(half, GOOD) == []


def test_the_budget_is_held() -> None:
    link = Link(1e6)  # so slow that any codec would win
    figures = codec_figures(FORMAT, GOOD)
    assert choose_codec(8192, figures, link, 0.01).codec == "int8"
    assert choose_codec(8192, figures, link, 0.1).codec == "fp8"
    assert choose_codec(8192, figures, link, 1e-6).codec == "raw"
    assert choose_codec(8192, codec_figures(FORMAT, None), link, 0.1).codec == "raw"
