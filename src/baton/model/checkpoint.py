"""The tensors of a checkpoint: checked against the model's config, and read once.

Each file is read front to back through one small buffer: its bytes are hashed for the fingerprint
and handed on, some rows at a time, to whoever lays out the weights. So the peak is the weights plus
one piece. Serving from a mapping of the files would save nothing: Q, K and V must be fused anyway,
a mapped page counts as resident like any other, may be evicted under the running model, and is
changed by whoever overwrites the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from baton.errors import ModelError
from baton.model.fingerprint import HashedFile, fingerprint, weight_files
from baton.model.weights import entries
from baton.model_spec import ModelSpec

_PIECE_BYTES = 8 << 20  # stays in a cache until it is hashed and laid out
_PIECE_ROWS = 32  # pieces end where panels of packed rows do, if they can
_EMBEDDING, _LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) as the weights arrive."""

Put = Callable[[str, int, Tensor], None]
"""Takes rows of a tensor: (its name, the first row, rows). Their memory is used again after."""


@dataclass(slots=True, frozen=True)
class _Stored:
    """Where a tensor lies in its file, from the file's header."""

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def row_bytes(self) -> int:
        return _DTYPES[self.dtype].itemsize * math.prod(self.shape[1:])

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * self.row_bytes

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Runs of rows of about `_PIECE_BYTES`: (first row, rows)."""
        most = max(1, _PIECE_BYTES // self.row_bytes)
        most = most // _PIECE_ROWS * _PIECE_ROWS or most
        for first in range(0, self.shape[0], most):
            yield first, min(most, self.shape[0] - first)


class Checkpoint:
    """The tensors of a model directory; `tensors` are their shapes as the files have them.

    Names, shapes and types are checked against `spec` before any tensor is read.

    Raises:
        ModelError: a file cannot be read, or a tensor is missing, unexpected, of another shape
            than `spec` says, or quantised.
    """

    def __init__(self, path: Path, spec: ModelSpec) -> None:
        self._path = path
        self._files = weight_files(path)
        stored = {name: found for file in self._files for name, found in _stored(file).items()}
        expected = {
            name: entry.part_shape(rows)
            for entry in entries(spec)
            for name, rows in entry.parts.items()
        }
        _check(spec, expected, stored)
        self._tensors = {name: stored[name] for name in stored if name in expected}

    def read(self, put: Put, progress: Progress | None = None) -> bytes:
        """Give every tensor to `put`, in the order of the files; returns the fingerprint.

        Raises:
            ModelError: a file cannot be read, or became shorter.
        """
        done, total = 0, sum(tensor.num_bytes for tensor in self._tensors.values())
        digests = []
        for file in self._files:
            mine = [(name, t) for name, t in self._tensors.items() if t.file == file]
            with HashedFile(file) as stream:
                for name, tensor in sorted(mine, key=lambda pair: pair[1].start):
                    stream.skip_to(tensor.start)
                    for first, rows in tensor.pieces():
                        data = stream.read(rows * tensor.row_bytes)
                        piece = torch.frombuffer(data, dtype=_DTYPES[tensor.dtype])
                        put(name, first, piece.view(rows, *tensor.shape[1:]))
                        done += len(data)
                        if progress is not None:
                            progress(done, total)
                digests.append(stream.digest())
        return fingerprint(self._path, self._files, digests)


def _stored(file: Path) -> dict[str, _Stored]:
    try:
        with safe_open(file, framework="pt"):  # checks the header against itself and the size
            pass
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(header_bytes))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file.name} is not a readable safetensors file: {error}") from error
    header.pop("__metadata__", None)
    start = 8 + header_bytes
    return {
        name: _Stored(file, start + at["data_offsets"][0], tuple(at["shape"]), at["dtype"])
        for name, at in header.items()
    }


def _check(
    spec: ModelSpec, expected: dict[str, tuple[int, ...]], stored: dict[str, _Stored]
) -> None:
    missing = [name for name in expected if name not in stored]
    if missing:
        raise ModelError(f"tensor {missing[0]} is missing ({len(missing)} of {len(expected)} are)")
    # Some exports carry the output matrix although it is tied.
    shapes = {_LM_HEAD: expected[_EMBEDDING], **expected}
    for name, tensor in stored.items():
        # Old exports carry the rotary frequencies, which follow from the config.
        if name.endswith(".rotary_emb.inv_freq"):
            continue
        if name not in shapes:
            raise ModelError(f"tensor {name} in {tensor.file.name} is not expected")
        if tensor.shape != shapes[name]:
            raise ModelError(
                f"tensor {name} has shape {list(tensor.shape)}, not {list(shapes[name])}"
            )
        if tensor.dtype not in _DTYPES:
            raise ModelError(f"tensor {name} has type {tensor.dtype}, which is not supported")
    head = stored.get(_LM_HEAD)
    if spec.tie_word_embeddings and head is not None:
        _check_tie(head, stored[_EMBEDDING])


def _check_tie(head: _Stored, embedding: _Stored) -> None:
    with safe_open(head.file, framework="pt") as one, safe_open(embedding.file, "pt") as other:
        x, y = one.get_slice(_LM_HEAD), other.get_slice(_EMBEDDING)
        for start, rows in head.pieces():
            end = start + rows
            if not torch.equal(x[start:end].float(), y[start:end].float()):
                raise ModelError(
                    f"tensor {_LM_HEAD} differs from {_EMBEDDING}, though "
                    "tie_word_embeddings is true"
                )
