"""From a checkpoint to the weights of the torch body, on any device."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from baton.model.checkpoint import Checkpoint, Progress
from baton.model.weights import Weights, allocate
from baton.model_spec import ModelSpec


@torch.inference_mode()
def load_weights(
    path: Path, spec: ModelSpec, dtype: str, device: str, progress: Progress | None = None
) -> Weights:
    """Load the checkpoint in directory `path` as `dtype` (as torch names it) onto `device`.

    Raises:
        ModelError: as `Checkpoint`.
    """
    checkpoint = Checkpoint(path, spec)
    weights, targets = allocate(spec, getattr(torch, dtype), device)

    def put(name: str, start: int, rows: Tensor) -> None:
        targets[name][start : start + rows.shape[0]].copy_(rows)

    weights.fingerprint = checkpoint.read(put, progress)
    return weights
