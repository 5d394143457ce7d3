"""Wire codecs: a block of KV in fewer bytes, for links that are slower than the arithmetic.

    raw    the pool's own bytes                                               exact
    fp8    e4m3, one scale for each head of the block                         lossy
    int8   keys: a scale for each channel; values: for each head of a token   lossy
    int4   sixteen steps over the same groups' own range                      lossy

`csrc/codec/codec.h` defines every byte; `docs/codecs.md` says it in words. The work is done by the
library that `codec_native` loads or, without one, by `codec_numpy`: the same bytes, many times
slower. Nothing is kept between calls, and any thread may call; the library releases the GIL.

A block that was ever lossy belongs to another numerics class and never answers an exact look-up.
That is for whoever asks for a codec to see to: nothing in the decoded bytes tells.
"""

from __future__ import annotations

import functools
import logging
from typing import Final, Protocol

import numpy as np

from baton.fabric import codec_native
from baton.fabric.codec_layout import Body, Name, flat, layout_of
from baton.fabric.codec_numpy import NumpyBody
from baton.fabric.transport import Bytes, ReadableBlock, WritableBlock
from baton.types import KvFormat

logger = logging.getLogger(__name__)

_ITEM_BYTES: Final = {"bfloat16": 2, "float16": 2, "float32": 4}


class Codec(Protocol):
    """One way to write blocks of a format.

    A block is [num_layers, 2 (K, V), block_size, num_kv_heads, head_dim] of the format's dtype,
    contiguous. Every method raises ValueError where the codec cannot take the format.
    """

    @property
    def name(self) -> str: ...

    def encoded_bytes(self, fmt: KvFormat) -> int:
        """Length of every encoded block of this format, full or not."""
        ...

    def encode(
        self,
        fmt: KvFormat,
        source: ReadableBlock,
        destination: Bytes,
        num_tokens: int | None = None,
    ) -> int:
        """Write the block `source` to the front of `destination`; returns the bytes written.

        num_tokens: how many slots are filled (all by default); what the others hold does not
        matter, and they come out finite. The two buffers must not overlap.

        Raises:
            ValueError: the source is not one block, the destination is too short or read-only, or
                num_tokens is not within the block.
        """
        ...

    def decode(self, fmt: KvFormat, source: Bytes, destination: WritableBlock) -> None:
        """Write the encoded block `source` to `destination`. The two must not overlap.

        Raises:
            ValueError: the source is not `encoded_bytes` long, or the destination is not one block
                or read-only.
        """
        ...


class Raw:
    """The pool's own bytes, those of unused slots included."""

    name: Final = "raw"

    def encoded_bytes(self, fmt: KvFormat) -> int:
        return raw_bytes(fmt)

    def encode(
        self,
        fmt: KvFormat,
        source: ReadableBlock,
        destination: Bytes,
        num_tokens: int | None = None,
    ) -> int:
        _check(fmt, source, destination, raw_bytes(fmt), num_tokens)
        block = flat(source)
        np.copyto(destination[: block.size], block)
        return block.size

    def decode(self, fmt: KvFormat, source: Bytes, destination: WritableBlock) -> None:
        _check_encoded(fmt, source, destination, raw_bytes(fmt), self.name)
        np.copyto(flat(destination), source)


class Lossy:
    """A codec of `csrc/codec/codec.h`, by the body that this machine has."""

    def __init__(self, name: Name) -> None:
        self.name: Final = name

    def encoded_bytes(self, fmt: KvFormat) -> int:
        return layout_of(fmt, self.name).num_bytes

    def encode(
        self,
        fmt: KvFormat,
        source: ReadableBlock,
        destination: Bytes,
        num_tokens: int | None = None,
    ) -> int:
        layout = layout_of(fmt, self.name)
        used = _check(fmt, source, destination, layout.num_bytes, num_tokens)
        body().encode(self.name, layout, used, source, destination)
        return layout.num_bytes

    def decode(self, fmt: KvFormat, source: Bytes, destination: WritableBlock) -> None:
        layout = layout_of(fmt, self.name)
        _check_encoded(fmt, source, destination, layout.num_bytes, self.name)
        body().decode(self.name, layout, source, destination)


CODECS: Final[dict[str, Codec]] = {
    "raw": Raw(),
    "fp8": Lossy("fp8"),
    "int8": Lossy("int8"),
    "int4": Lossy("int4"),
}


def codecs_for(fmt: KvFormat) -> dict[str, Codec]:
    """The codecs that can take blocks of `fmt`; raw always can."""
    found = {}
    for name, codec in CODECS.items():
        try:
            codec.encoded_bytes(fmt)
        except ValueError as error:
            logger.info("codec %s is not for this model: %s", name, error)
            continue
        found[name] = codec
    return found


@functools.lru_cache(maxsize=64)
def raw_bytes(fmt: KvFormat) -> int:
    """Bytes of one block as the pool holds it.

    Raises:
        ValueError: a type that no block has.
    """
    if fmt.dtype not in _ITEM_BYTES:
        raise ValueError(f"no block is of {fmt.dtype}")
    elements = 2 * fmt.num_layers * fmt.block_size * fmt.num_kv_heads * fmt.head_dim
    return elements * _ITEM_BYTES[fmt.dtype]


@functools.cache
def body() -> Body:
    """What does the work here: the best body of the library, or numpy."""
    try:
        found = codec_native.best()
    except OSError as error:
        logger.warning("codecs run in Python, slowly: the library cannot be loaded: %s", error)
        return NumpyBody()
    if found is None:
        logger.warning("codecs run in Python, slowly: the library is not built (make kernels)")
        return NumpyBody()
    logger.info("codec body=%s", found.name)
    return found


def _flat(buffer: ReadableBlock) -> Bytes:
    return np.frombuffer(buffer, dtype=np.uint8)


def _check(
    fmt: KvFormat, block: ReadableBlock, encoded: Bytes, needed: int, num_tokens: int | None
) -> int:
    """The number of used slots."""
    size, room = _contiguous(block), _contiguous(encoded, to_write=True)
    if size.nbytes != raw_bytes(fmt):
        raise ValueError(f"a block has {raw_bytes(fmt)} bytes, not {size.nbytes}")
    if room.nbytes < needed:
        raise ValueError(f"room for {room.nbytes} bytes, and an encoded block has {needed}")
    used = fmt.block_size if num_tokens is None else num_tokens
    if not 0 <= used <= fmt.block_size:
        raise ValueError(f"a block has {fmt.block_size} slots, not {used}")
    return used


def _check_encoded(
    fmt: KvFormat, encoded: Bytes, block: WritableBlock, needed: int, name: str
) -> None:
    size, room = _contiguous(encoded), _contiguous(block, to_write=True)
    if size.nbytes != needed:
        raise ValueError(f"a block in {name} has {needed} bytes, not {size.nbytes}")
    if room.nbytes != raw_bytes(fmt):
        raise ValueError(f"a block has {raw_bytes(fmt)} bytes, not {room.nbytes}")


def _contiguous(buffer: ReadableBlock, to_write: bool = False) -> memoryview:
    view = memoryview(buffer)  # type: ignore[arg-type]  # an array is a buffer, too
    if not view.contiguous:
        raise ValueError("a buffer that is not contiguous")
    if to_write and view.readonly:  # the library would write to it all the same
        raise ValueError("the destination is read-only")
    return view
