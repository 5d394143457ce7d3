"""Where two workers' KV differs, and what can be done about it. Pure, without state.

    like        same kv_format, same numerics class      blocks travel as they are
    recut       another block size, nothing else         the same bits in blocks of another size
    converted   another type or device as well           other bits: a numerics class of its own
    refused     another shape, other weights, other      nothing travels, and the worker that came
                rules of arithmetic for the same device  later is told which field differs

A numerics class is `device-rules-type`. Rules may differ only as far as device or type do: two
ways to compute the same thing on the same device would make answers depend on placement.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from baton.core.limits import SchedulerConfig
from baton.types import Handoff, KvFormat, Recast

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""The types between which KV can be converted, with their sizes."""
MAX_BLOCK_SIZE = 1024
"""Tokens in a block of any worker: what its configuration allows."""

_SHAPE = ("num_layers", "num_kv_heads", "head_dim", "tensor_parallel", "codec")


class End(msgspec.Struct, frozen=True):
    """What a worker's blocks are: whose weights, how they were computed, in which form."""

    fingerprint: bytes
    numerics: str
    kv_format: KvFormat


class Misfit(NamedTuple):
    """A field that no conversion bridges, and its two values, to be read by people."""

    field: str
    theirs: str
    ours: str


def misfit(theirs: End, ours: End) -> Misfit | None:
    """The first field that keeps blocks of one end from being used at the other; None if none.

    It asks nothing of `theirs`, which may come from a peer.
    """
    if theirs == ours:
        return None
    if theirs.fingerprint != ours.fingerprint:
        return Misfit("fingerprint", theirs.fingerprint.hex()[:16], ours.fingerprint.hex()[:16])
    their, our = theirs.kv_format, ours.kv_format
    for name in _SHAPE:
        if getattr(their, name) != getattr(our, name):
            return _differs(f"kv_format.{name}", getattr(their, name), getattr(our, name))
    if their.dtype != our.dtype and not {their.dtype, our.dtype} <= set(ITEM_BYTES):
        return _differs("kv_format.dtype", their.dtype, our.dtype)
    if not 1 <= their.block_size <= MAX_BLOCK_SIZE:
        return _differs("kv_format.block_size", their.block_size, our.block_size)
    if their.block_bytes != _block_bytes(their, our):
        return _differs("kv_format.block_bytes", _weight(their), _weight(our))
    same_kind = _device(theirs.numerics) == _device(ours.numerics) and their.dtype == our.dtype
    if same_kind and theirs.numerics != ours.numerics:
        return _differs("numerics", theirs.numerics, ours.numerics)
    return None


def end_of(config: SchedulerConfig) -> End:
    """What a worker of this configuration has."""
    return End(config.fingerprint, config.numerics, config.kv_format)


def is_like(config: SchedulerConfig, handoff: Handoff | Recast) -> bool:
    """Whether the handoff's blocks are as ours: their keys are ours, their bytes are taken over."""
    return (handoff.kv_format, handoff.numerics) == (config.kv_format, config.numerics)


def can_take(config: SchedulerConfig, handoff: Handoff | Recast) -> bool:
    """Whether its blocks can be used here, as they are or converted.

    Nothing is said of the weights: the keys tell them.
    """
    theirs = End(config.fingerprint, handoff.numerics, handoff.kv_format)
    return misfit(theirs, end_of(config)) is None


def origin(config: SchedulerConfig, handoff: Handoff | Recast) -> str:
    """The name of the class of what is computed from these blocks here; "" if it is our own.

    Blocks that were only cut anew have the bits that we would have computed.
    """
    same_type = handoff.kv_format.dtype == config.kv_format.dtype
    if not can_take(config, handoff) or (same_type and handoff.numerics == config.numerics):
        return ""
    return f"from {handoff.numerics} {handoff.kv_format.dtype}"


def _block_bytes(their: KvFormat, our: KvFormat) -> int:
    """What a block of theirs must weigh, from what one of ours does."""
    of_ours = our.block_bytes // our.block_size
    if their.dtype != our.dtype:
        of_ours = of_ours // ITEM_BYTES[our.dtype] * ITEM_BYTES[their.dtype]
    return of_ours * their.block_size


def _weight(fmt: KvFormat) -> str:
    return f"{fmt.block_bytes} for {fmt.block_size} tokens of {fmt.dtype}"


def _device(numerics: str) -> str:
    return numerics.partition("-")[0]


def _differs(field: str, theirs: object, ours: object) -> Misfit:
    return Misfit(field, str(theirs), str(ours))
