"""The arithmetic between attention and the weights: norms and the gated MLP. Device-free."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, [..., N] -> [..., N].

    Computed in fp32 and rounded to the type of `x` before the weight, as the checkpoints were
    trained.
    """
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * scaled.to(x.dtype)


def gated_mlp(
    x: Tensor, gate_up: Tensor, gate_up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None
) -> Tensor:
    """SwiGLU, [T, hidden] -> [T, hidden]; gate_up is [2 * intermediate, hidden]."""
    gate, up = F.linear(x, gate_up, gate_up_bias).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down, down_bias)
