"""Which body computes the forward pass: from what is asked for, the device and what is installed.

    native   the CPU kernels of csrc              CPU, bf16 and fp32            exact
    triton   Triton kernels and CUDA graphs       CUDA                          inexact, or exact
    torch    plain torch                          anything                      inexact

Nothing of Triton is imported here: a machine without a GPU does without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from baton.errors import ConfigError
from baton.model.attention_triton import MAX_GROUP, MAX_HEAD_DIM
from baton.model.native import Kernels, choose_kernels
from baton.model_spec import ModelSpec

VERSION = 1
"""Of the Triton kernels' bits."""
OLDEST_TRITON = (3, 6)


@dataclass(frozen=True, slots=True)
class TritonKernels:
    """The Triton body. exact: a token's bits depend on its own context alone; slower.

    `numerics` names what results may be mixed: in exact mode the device and the compiler belong
    to it, since another one may order sums differently.
    """

    exact: bool
    triton: str
    device: str

    @property
    def numerics(self) -> str:
        if not self.exact:
            return "triton"
        return f"exact-triton-v{VERSION}-{self.triton}-{self.device}"


Body = Kernels | TritonKernels | None
"""None is the torch body."""


def choose_body(choice: str, spec: ModelSpec, dtype: str, device: str) -> Body:
    """The body to run `spec` with.

    Args:
        choice: as `engine.kernels`: "native", "triton", "triton-exact", "torch", or "auto": the
            fastest body that has been run on such a device. That is not Triton yet.
        device: "cpu" or "cuda".

    Raises:
        ConfigError: what was asked for cannot be had.
    """
    if choice == "torch" or (choice == "auto" and device != "cpu"):
        return None
    if choice in ("triton", "triton-exact"):
        reason = _no_triton(spec, dtype, device)
        if reason is not None:
            raise ConfigError(f"engine.kernels is {choice}, but {reason}: use auto or torch")
        return _triton(exact=choice == "triton-exact")
    return choose_kernels(choice, spec, dtype, device)


def _no_triton(spec: ModelSpec, dtype: str, device: str) -> str | None:
    """Why the Triton body cannot serve; None if it can."""
    if device != "cuda":
        return f"these kernels run on a GPU and engine.device is {device}"
    if spec.head_dim > MAX_HEAD_DIM or spec.head_dim % 8:
        return f"the kernels want head sizes up to {MAX_HEAD_DIM} that 8 divides"
    if spec.num_heads // spec.num_kv_heads > MAX_GROUP:
        return f"the kernels want at most {MAX_GROUP} heads that share a KV head"
    found = triton_version()
    if found is None:
        return "Triton is not installed (pip install 'baton-serve[cuda]')"
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton {found} is installed and the oldest that serves is 3.6"
    return None


def triton_version() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def _triton(exact: bool) -> TritonKernels:
    major, minor = torch.cuda.get_device_capability()
    return TritonKernels(exact, triton_version() or "", f"sm{major}{minor}")
