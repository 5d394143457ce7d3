"""Rotary position embedding and its scaling variants.

The frequencies are fixed when the model is loaded: keys are cached already rotated, so they must
never depend on how long a sequence has become. `dynamic` is therefore served up to the model's
`max_position` only, where it equals the unscaled embedding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from baton.model_spec import RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """Angular frequencies in radians a position, fp32 [head_dim / 2], on the CPU.

    fp32 throughout, like transformers: at position 10^5 the last bit of a frequency is visible.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    wavelengths = rope.theta**exponents  # over 2 pi
    match rope.type:
        case "default" | "dynamic":
            return 1.0 / wavelengths
        case "linear":
            return 1.0 / wavelengths / rope.factor
        case "llama3":
            return _llama3(rope, 1.0 / wavelengths)
        case "yarn":
            return _yarn(rope, wavelengths)


def _llama3(rope: RopeSpec, frequencies: Tensor) -> Tensor:
    """Keep short waves, stretch long ones by the factor, blend those between."""
    turns = rope.original_max_position * frequencies / (2 * math.pi)  # over the trained length
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / rope.factor + blend * frequencies


def _yarn(rope: RopeSpec, wavelengths: Tensor) -> Tensor:
    """The same idea, with a ramp over the dimension's index rather than over the frequency."""
    half = wavelengths.numel()

    def index_of(turns: float) -> float:
        """The index whose wave turns so often over the trained length."""
        length = rope.original_max_position / (2 * math.pi * turns)
        return half * math.log(length) / math.log(rope.theta)

    low, high = index_of(rope.beta_fast), index_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    width = high - low or 0.001
    stretched = ((torch.arange(half, dtype=torch.float32) - low) / width).clamp(0, 1)
    return stretched / (rope.factor * wavelengths) + (1 - stretched) / wavelengths


def cos_sin(
    frequencies: Tensor, positions: Tensor, attention_factor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle for positions [T]: two tensors [T, 1, head_dim / 2] of `dtype`."""
    angles = positions[:, None, None].float() * frequencies
    return (angles.cos() * attention_factor).to(dtype), (angles.sin() * attention_factor).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [T, heads, head_dim]; dimension i turns together with i + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
