"""What each wire codec costs in quality, for one model: as it was measured, and where that is kept.

    ${XDG_CACHE_HOME:-~/.cache}/baton/calibration/<fingerprint of the weights, hex>.json

`baton fabric calibrate` writes the file (`engine.kv_quality` measures). A file that is damaged, or
was made with other blocks than those at hand, is a warning and counts as none: then nothing lossy
is chosen.

The statistic that is held against the budget is the **greatest** divergence of all positions that
were measured: the budget is a promise about every next token, and neither a mean nor a percentile
tells of the worst. Mean and 99th percentile are kept beside it, for people.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final

import msgspec
import numpy as np
from msgspec import Meta

from baton.core.codec_choice import RAW, CodecFigures
from baton.errors import ConfigError
from baton.fabric import codec_native
from baton.fabric.codec import codecs_for, raw_bytes
from baton.types import KvFormat

logger = logging.getLogger(__name__)

VERSION: Final = 1
NUM_TIMINGS: Final = 5

_Nats = Annotated[float, Meta(ge=0, le=1e6)]


class CodecLoss(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of one codec: KL(raw run, run on decoded blocks) of next-token distributions, in nats."""

    bytes_per_token: Annotated[float, Meta(gt=0)]
    kl_mean: _Nats
    kl_p99: _Nats
    kl_max: _Nats


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One measurement. `codecs` has no entry where a codec could not be measured.

    codec_version: of the encoded bytes. text: where it came from; text_sha256 is of its tokens.
    """

    version: int
    codec_version: int
    fingerprint: str
    numerics: str
    dtype: str
    block_size: Annotated[int, Meta(ge=1)]
    date: str
    text: str
    text_sha256: str
    num_positions: Annotated[int, Meta(ge=1)]
    codecs: dict[str, CodecLoss]

    def kl(self, codec: str) -> float | None:
        """What is held against the budget: the greatest divergence; None if not measured."""
        found = self.codecs.get(codec)
        return None if found is None else found.kl_max


def calibration_dir() -> Path:
    """Where calibrations are kept."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(cache) if cache.startswith("/") else Path.home() / ".cache"
    return home / "baton" / "calibration"


def calibration_file(fingerprint: bytes, directory: Path | None = None) -> Path:
    return (directory or calibration_dir()) / f"{fingerprint.hex()}.json"


def save_calibration(calibration: Calibration, directory: Path | None = None) -> Path:
    """Write it, whole or not at all, in place of an earlier one of the same model.

    Raises:
        ConfigError: it cannot be written.
    """
    file = calibration_file(bytes.fromhex(calibration.fingerprint), directory)
    text = msgspec.json.format(msgspec.json.encode(calibration), indent=2) + b"\n"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f"{file.name}.", dir=file.parent)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(text)
            os.replace(name, file)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise
    except OSError as error:
        raise ConfigError(
            f"cannot write {file}: {error.strerror}; set XDG_CACHE_HOME to a directory that can be "
            "written"
        ) from error
    return file


def load_calibration(
    fingerprint: bytes, fmt: KvFormat, directory: Path | None = None
) -> Calibration | None:
    """What was measured for these weights and blocks of this type and size; None if nothing."""
    file = calibration_file(fingerprint, directory)
    try:
        found = msgspec.json.decode(file.read_bytes(), type=Calibration)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        _warn(file, f"it cannot be read: {error}")
        return None
    wanted = {
        "version": VERSION,
        "codec_version": codec_native.VERSION,
        "fingerprint": fingerprint.hex(),
        "dtype": fmt.dtype,
        "block_size": fmt.block_size,
    }
    for name, value in wanted.items():
        if (other := getattr(found, name)) != value:
            _warn(file, f"its {name} is {other}, here it is {value}")
            return None
    return found


def codec_figures(
    fmt: KvFormat,
    calibration: Calibration | None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[CodecFigures]:
    """What `core.codec_choice` must know of the lossy codecs, timed here and now on one block.

    It takes some milliseconds for each codec; without the native library, a second and more.
    """
    block = np.resize(np.arange(251, dtype=np.uint8), raw_bytes(fmt))
    figures = []
    for name, codec in codecs_for(fmt).items():
        if name == RAW:
            continue
        encoded = np.empty(codec.encoded_bytes(fmt), np.uint8)
        decoded = np.empty_like(block)
        encodes, decodes = [], []
        for _ in range(NUM_TIMINGS):
            started = clock()
            codec.encode(fmt, block, encoded)
            between = clock()
            codec.decode(fmt, encoded, decoded)
            encodes.append(between - started)
            decodes.append(clock() - between)
        figures.append(
            CodecFigures(
                name,
                encoded.size,
                float(np.median(encodes)),
                float(np.median(decodes)),
                None if calibration is None else calibration.kl(name),
            )
        )
    return figures


def _warn(file: Path, reason: str) -> None:
    logger.warning(
        "calibration %s is not used (%s): run baton fabric calibrate again; until then KV blocks "
        "travel raw",
        file,
        reason,
    )
