"""How long encoded blocks are and where things lie in them; what a body that writes them offers.

`csrc/codec/codec.h` has the definition. Here are only shapes, so that lengths can be checked before
any memory is touched.
"""

from __future__ import annotations

import functools
import math
from typing import Final, Literal, NamedTuple, Protocol

import numpy as np

from baton.fabric.transport import Bytes, ReadableBlock, WritableBlock
from baton.types import KvFormat

Name = Literal["int8", "fp8", "int4"]

DTYPES: Final = {"bfloat16": 0, "float32": 1}
"""The types that blocks may have, by their numbers in codec.h."""
MAX_HEAD_DIM: Final = 512
_PARAMETER_BYTES: Final = 2  # each is a bf16


class Shape(NamedTuple):
    """Of a block: [layers, 2 (K, V), tokens, heads, dim] of `dtype`, as torch names it."""

    layers: int
    tokens: int
    heads: int
    dim: int
    dtype: str


class Layout(NamedTuple):
    """An encoded block: `parameter_bytes` of parameters, then codes, `num_bytes` in all.

    parameters: bf16 [layers, width]; places: of one layer's, for K and for V, where each kind
    lies (scale; int4: base, scale), and how it is shaped to go with codes of that part.
    codes: bytes [layers, 2, tokens, heads, dim, or half of it].
    """

    shape: Shape
    parameters: tuple[int, int]
    places: tuple[tuple[slice, ...], tuple[slice, ...]]
    groups: tuple[tuple[int, int, int, int], tuple[int, int, int, int]]
    codes: tuple[int, int, int, int, int]
    parameter_bytes: int
    num_bytes: int


class Body(Protocol):
    """Encodes and decodes one block. Buffers have been checked: contiguous, at least as long as
    the layout says, and what is written to can be."""

    @property
    def name(self) -> str: ...

    def encode(
        self, codec: Name, layout: Layout, used: int, block: ReadableBlock, encoded: Bytes
    ) -> None: ...

    def decode(self, codec: Name, layout: Layout, encoded: Bytes, block: WritableBlock) -> None: ...


def flat(buffer: ReadableBlock) -> Bytes:
    """Its bytes, without a copy."""
    return np.frombuffer(buffer, dtype=np.uint8)


@functools.lru_cache(maxsize=64)
def layout_of(fmt: KvFormat, codec: Name) -> Layout:
    """The layout of blocks of `fmt` in `codec`.

    Raises:
        ValueError: the codec does not take such blocks.
    """
    if fmt.dtype not in DTYPES:
        raise ValueError(f"{codec} takes blocks of bfloat16 and float32, not of {fmt.dtype}")
    shape = Shape(fmt.num_layers, fmt.block_size, fmt.num_kv_heads, fmt.head_dim, fmt.dtype)
    layers, tokens, heads, dim, _ = shape
    if min(layers, tokens, heads, dim) < 1 or dim > MAX_HEAD_DIM:
        raise ValueError(f"{codec} takes heads of 1 to {MAX_HEAD_DIM} elements, not {shape}")
    if codec == "fp8":
        k_group = v_group = (layers, 1, heads, 1)
    else:
        k_group, v_group = (layers, 1, heads, dim), (layers, tokens, heads, 1)
    kinds = 2 if codec == "int4" else 1
    k, v = math.prod(k_group[1:]), math.prod(v_group[1:])
    middle = kinds * k
    places = (
        tuple(slice(i * k, (i + 1) * k) for i in range(kinds)),
        tuple(slice(middle + i * v, middle + (i + 1) * v) for i in range(kinds)),
    )
    codes = (layers, 2, tokens, heads, -(-dim // 2) if codec == "int4" else dim)
    parameters = (layers, kinds * (k + v))
    first = _PARAMETER_BYTES * math.prod(parameters)
    groups = (k_group, v_group)
    return Layout(shape, parameters, places, groups, codes, first, first + math.prod(codes))
