"""The codecs of `csrc/codec` (codec.h explains them), loaded with ctypes.

The library is optional, has no threads and needs neither torch nor OpenMP.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import CFUNCTYPE, POINTER, Structure, c_char, c_char_p, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np

from baton.fabric.codec_layout import DTYPES, Layout, Name, Shape, flat
from baton.fabric.transport import Bytes, ReadableBlock, WritableBlock

VERSION: Final = 1
"""Of the binary interface and of every encoded byte; equal to kCodecVersion in codec.h."""
ISAS: Final = ("avx512", "avx2", "portable")
"""Instruction sets, best first."""

_ALIGNMENT: Final = 4
"""Of a block's elements, as the library wants them; numpy's own memory has more."""
_LIBRARY = Path(__file__).with_name("_codec.so")


class _ShapeArgs(Structure):
    _fields_ = [
        ("layers", c_int64),
        ("tokens", c_int64),
        ("heads", c_int64),
        ("dim", c_int64),
        ("dtype", c_int32),
    ]


_ENCODE = CFUNCTYPE(None, c_void_p, c_int64, c_void_p, c_void_p)
_DECODE = CFUNCTYPE(None, c_void_p, c_void_p, c_void_p)


class _Table(Structure):
    _fields_ = [
        ("version", c_int64),
        ("isa", c_char_p),
        ("encode_int8", _ENCODE),
        ("encode_fp8", _ENCODE),
        ("encode_int4", _ENCODE),
        ("decode_int8", _DECODE),
        ("decode_fp8", _DECODE),
        ("decode_int4", _DECODE),
    ]


class NativeBody:
    """One instruction set's codecs; a `codec_layout.Body`."""

    def __init__(self, table: _Table) -> None:
        self.name = str(table.isa, "ascii")
        self._encode = {
            "int8": table.encode_int8,
            "fp8": table.encode_fp8,
            "int4": table.encode_int4,
        }
        self._decode = {
            "int8": table.decode_int8,
            "fp8": table.decode_fp8,
            "int4": table.decode_int4,
        }

    def encode(
        self, codec: Name, layout: Layout, used: int, block: ReadableBlock, encoded: Bytes
    ) -> None:
        source = _address(block)
        if source % _ALIGNMENT:
            return self.encode(codec, layout, used, flat(block).copy(), encoded)
        self._encode[codec](_args(layout.shape), used, source, _address(encoded))

    def decode(self, codec: Name, layout: Layout, encoded: Bytes, block: WritableBlock) -> None:
        target = _address(block)
        if target % _ALIGNMENT:
            aligned = np.empty_like(flat(block))
            self.decode(codec, layout, encoded, aligned)
            return np.copyto(flat(block), aligned)
        self._decode[codec](_args(layout.shape), _address(encoded), target)


def _address(buffer: ReadableBlock) -> int:
    try:
        return ctypes.addressof(c_char.from_buffer(buffer))  # type: ignore[arg-type]
    except TypeError:  # read-only, which ctypes does not take; numpy does, in thrice the time
        return int(flat(buffer).ctypes.data)


@cache
def find(isa: str) -> NativeBody | None:
    """The codecs for `isa`, or None if this processor or the installed library has none.

    Raises:
        OSError: the library is there, but cannot be loaded, or is of another version.
    """
    if not _LIBRARY.exists():
        return None
    library = ctypes.CDLL(str(_LIBRARY), mode=os.RTLD_NOW)
    library.baton_codecs.restype = POINTER(_Table)
    library.baton_codecs.argtypes = [c_char_p]
    found = library.baton_codecs(isa.encode())
    if not found:
        return None
    if found.contents.version != VERSION:
        raise OSError(f"{_LIBRARY.name} has version {found.contents.version}, not {VERSION}")
    return NativeBody(found.contents)


def best() -> NativeBody | None:
    """The best codecs here; None without the library.

    Raises:
        OSError: as `find`.
    """
    return next((found for isa in ISAS if (found := find(isa)) is not None), None)


_shapes: dict[Shape, _ShapeArgs] = {}


@cache
def _args(shape: Shape) -> int:
    """Where the shape is, as the library wants it. It stays there."""
    made = _shapes.setdefault(shape, _ShapeArgs(*shape[:4], DTYPES[shape.dtype]))
    return ctypes.addressof(made)
