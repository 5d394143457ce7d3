"""From a model directory to weights on a device.

Safetensors files are mapped, and copied piece by piece into memory of our own. Serving from the
mapping itself would save nothing: Q, K and V must be fused anyway, a mapped page counts as
resident like any other, comes without huge pages, may be evicted under the running model, and is
changed by whoever overwrites the file. So each piece's mapping is dropped as soon as it is copied,
and the peak is the weights plus one piece.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from baton.errors import ModelError
from baton.model.weights import Weights, allocate
from baton.model_spec import ModelSpec
from baton.model_spec.fields import read_json

_PIECE_BYTES = 64 << 20
_READ_BYTES = 8 << 20
_INDEX = "model.safetensors.index.json"
_EMBEDDING = "model.embed_tokens.weight"

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) as the weights arrive."""


@torch.inference_mode()
def load_weights(
    path: Path, spec: ModelSpec, dtype: str, device: str, progress: Progress | None = None
) -> Weights:
    """Load the checkpoint in directory `path` as `dtype` (as torch names it) onto `device`.

    Raises:
        ModelError: a file cannot be read, or a tensor is missing, unexpected, of another shape
            than `spec` says, or quantised. All names, shapes and types
            are checked before any tensor is copied.
    """
    stored = _stored(path)
    weights, targets = allocate(spec, getattr(torch, dtype), device)
    _check(spec, targets, stored)
    done, total = 0, sum(target.nbytes for target in targets.values())
    for name, tensor in stored.items():
        target = targets.get(name)
        if target is None:
            continue
        for start, piece in _pieces(tensor.file, name):
            target[start : start + piece.shape[0]].copy_(piece)
            done += piece.numel() * target.element_size()
            if progress is not None:
                progress(done, total)
    return weights


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model directory: what its index names, or the single file.

    Raises:
        ModelError: there is none, it is unclear which, or the index names one that is missing.
    """
    if (path / _INDEX).exists():
        named = read_json(path / _INDEX).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(n, str) for n in named.values()):
            raise ModelError(f"weight_map of {_INDEX} must map tensor names to file names")
        names = sorted(set(named.values()))
        if any(Path(name).name != name for name in names):
            raise ModelError(f"{_INDEX} names files outside the model directory")
        files = [path / name for name in names]
    elif (path / "model.safetensors").exists():
        files = [path / "model.safetensors"]
    else:
        files = sorted(path.glob("*.safetensors"))
        if len(files) > 1:
            raise ModelError(f"{path} has several safetensors files but no {_INDEX}")
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise ModelError(f"{path} lacks {missing[0] if missing else 'model.safetensors'}")
    return files


def weights_fingerprint(path: Path) -> bytes:
    """32 bytes that tell checkpoints apart: SHA-256 over config.json and each weight file's hash.

    The weights go through XXH3-128, which runs at the speed of the disk: the fingerprint guards
    against mix-ups, not against forgery.

    Raises:
        ModelError: a file is missing or cannot be read.
    """
    total = hashlib.sha256()
    buffer = memoryview(bytearray(_READ_BYTES))
    try:
        config = (path / "config.json").read_bytes()
        total.update(len(config).to_bytes(8, "little") + config)
        for file in weight_files(path):
            content = xxhash.xxh3_128()
            with file.open("rb", buffering=0) as stream:
                while count := stream.readinto(buffer):
                    content.update(buffer[:count])
            name = file.name.encode()
            total.update(len(name).to_bytes(8, "little") + name + content.digest())
    except OSError as error:
        raise ModelError(f"{error.filename} cannot be read: {error.strerror}") from error
    return total.digest()


@dataclass(slots=True, frozen=True)
class _Stored:
    """Where a tensor lies, from the header of its file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def _stored(path: Path) -> dict[str, _Stored]:
    found: dict[str, _Stored] = {}
    for file in weight_files(path):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                    tensor = tensors.get_slice(name)
                    found[name] = _Stored(file, tuple(tensor.get_shape()), tensor.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file.name} is not a readable safetensors file: {error}") from error
    return found


def _check(spec: ModelSpec, targets: dict[str, Tensor], stored: dict[str, _Stored]) -> None:
    missing = [name for name in targets if name not in stored]
    if missing:
        raise ModelError(f"tensor {missing[0]} is missing ({len(missing)} of {len(targets)} are)")
    expected = {name: tuple(target.shape) for name, target in targets.items()}
    # Some exports carry the output matrix although it is tied.
    if spec.tie_word_embeddings:
        expected["lm_head.weight"] = expected[_EMBEDDING]
    for name, tensor in stored.items():
        # Old exports carry the rotary frequencies, which follow from the config.
        if name.endswith(".rotary_emb.inv_freq"):
            continue
        if name not in expected:
            raise ModelError(f"tensor {name} in {tensor.file.name} is not expected")
        if tensor.shape != expected[name]:
            raise ModelError(
                f"tensor {name} has shape {list(tensor.shape)}, not {list(expected[name])}"
            )
        if tensor.dtype not in ("BF16", "F16", "F32"):
            raise ModelError(f"tensor {name} has type {tensor.dtype}, which is not supported")
    head = stored.get("lm_head.weight")
    if spec.tie_word_embeddings and head is not None:
        embedding = _pieces(stored[_EMBEDDING].file, _EMBEDDING)
        pairs = zip(_pieces(head.file, "lm_head.weight"), embedding, strict=True)
        if not all(torch.equal(x.float(), y.float()) for (_, x), (_, y) in pairs):
            raise ModelError(
                f"tensor lm_head.weight differs from {_EMBEDDING}, though "
                "tie_word_embeddings is true"
            )


def _pieces(file: Path, name: str) -> Iterator[tuple[int, Tensor]]:
    """A tensor in runs of rows of at most 64 MiB: (first row, mapped rows).

    The file is mapped anew for each, since only that gives the touched pages back.
    """
    start, rows = 0, 1
    while start < rows:
        with safe_open(file, framework="pt") as tensors:
            stored = tensors.get_slice(name)
            shape = stored.get_shape()
            rows = shape[0]
            row_bytes = 4 * math.prod(shape[1:])  # no supported type is wider
            count = max(1, _PIECE_BYTES // row_bytes)
            piece = stored[start : start + count]
        yield start, piece
        del piece
        start += count
