"""The rotary part of config.json, in both of its spellings."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from baton.errors import ModelError
from baton.model_spec.fields import Count, Positive, convert
from baton.model_spec.spec import RopeSpec


class _Default(msgspec.Struct, forbid_unknown_fields=True):
    rope_theta: Positive | None = None


class _Factor(_Default, forbid_unknown_fields=True, kw_only=True):
    """linear, dynamic"""

    factor: Positive


class _Llama3(_Factor, forbid_unknown_fields=True, kw_only=True):
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_max_position_embeddings: Count | None = None


class _Yarn(_Default, forbid_unknown_fields=True, kw_only=True):
    factor: Positive | None = None
    original_max_position_embeddings: Count | None = None
    attention_factor: Positive | None = None
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


_SCALINGS: dict[str, type[_Default]] = {
    "default": _Default,
    "linear": _Factor,
    "dynamic": _Factor,
    "llama3": _Llama3,
    "yarn": _Yarn,
}


def read_rope(
    rope_scaling: dict[str, Any] | None,
    rope_parameters: dict[str, Any] | None,
    *,
    theta: float | None,
    max_position: int,
    original_max_position: int | None,
) -> tuple[RopeSpec, int]:
    """The rotary embedding and the longest sequence it is good for.

    Both spellings are read: `rope_theta` beside `rope_scaling`, and the newer `rope_parameters`.
    The keyword arguments are the config's own fields. A top-level `original_max_position` wins
    over the one inside, as it does in transformers.

    Raises:
        ModelError: the type or a field of it is unknown or malformed.
    """
    source = "rope_scaling" if rope_scaling else "rope_parameters"
    raw = {k: v for k, v in (rope_scaling or rope_parameters or {}).items() if v is not None}
    kind = raw.pop("rope_type", raw.get("type", "default"))
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise ModelError(
            f"{source}.rope_type {kind!r} is not supported; {', '.join(_SCALINGS)} are"
        )
    raw.pop("type", None)
    raw.pop("finetuned", None)  # a remark in some yarn checkpoints
    if raw.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(f"{source}.partial_rotary_factor is not supported")
    scaling = convert(raw, _SCALINGS[kind], f"config.json: {source} of type {kind!r}")
    theta = scaling.rope_theta or theta or 10_000.0
    if isinstance(scaling, _Llama3):
        if scaling.low_freq_factor >= scaling.high_freq_factor:
            raise ModelError(f"{source}.high_freq_factor must be greater than low_freq_factor")
        spec = RopeSpec(
            "llama3",
            theta,
            scaling.factor,
            original_max_position or scaling.original_max_position_embeddings or max_position,
            low_freq_factor=scaling.low_freq_factor,
            high_freq_factor=scaling.high_freq_factor,
        )
    elif isinstance(scaling, _Yarn):
        original = original_max_position or scaling.original_max_position_embeddings or max_position
        factor = scaling.factor or max_position / original
        spec = RopeSpec(
            "yarn",
            theta,
            factor,
            original,
            beta_fast=scaling.beta_fast,
            beta_slow=scaling.beta_slow,
            truncate=scaling.truncate,
            attention_factor=_yarn_attention_factor(scaling, factor),
        )
        # Some configs state the pretraining length in both places and leave the product to us.
        max_position = max(max_position, int(original * factor))
    elif isinstance(scaling, _Factor):
        spec = RopeSpec("linear" if kind == "linear" else "dynamic", theta, scaling.factor)
    else:
        spec = RopeSpec(theta=theta)
    return spec, max_position


def _yarn_attention_factor(scaling: _Yarn, factor: float) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    return mscale(1.0)
