"""The codecs in numpy: what `csrc/codec/codec.h` defines, byte for byte, without the library.

It is also what the library is tested against. Everything is float32, one operation at a time; all
elements of a part are worked on at once, so a few times its size is allocated.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from baton.fabric.codec_layout import Layout, Name, flat
from baton.fabric.transport import Bytes, ReadableBlock, WritableBlock

_Floats = npt.NDArray[np.float32]
_Words = npt.NDArray[np.uint32]
_Mask = npt.NDArray[np.bool_]

_ZERO, _ONE = np.float32(0), np.float32(1)
_ROUND = np.float32(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer, in the low bits
_LEAST, _LEAST_BASE, _LIMIT = np.float32(2.0**-90), np.float32(2.0**-100), np.float32(2.0**120)
_NONE, _LOW, _HIGH = np.uint32(0), np.uint32(0xFFFF), np.uint32(0xFFFF0000)
_LEAST_NORMAL = np.float32(2.0**-6)  # of e4m3
_DENORMAL = np.float32(2.0**14)  # its unit in the last place is 2^-9, that of e4m3
_BIAS = 120 << 3  # of binary32 less that of e4m3, above 3 bits of mantissa


class NumpyBody:
    """The definition, written down; a `codec_layout.Body`."""

    name: Final = "numpy"

    def encode(
        self, codec: Name, layout: Layout, used: int, block: ReadableBlock, encoded: Bytes
    ) -> None:
        encoded = encoded[: layout.num_bytes]
        parameters, codes = _views(layout, encoded)
        encoded[:] = 0
        if not used:
            return
        with np.errstate(all="ignore"):
            x, counts = _elements(layout, flat(block))
            for part in (0, 1):
                part_x, part_counts = x[:, part, :used], counts[:, part, :used]
                found, part_codes = _ENCODERS[codec](part_x, part_counts, part)
                codes[:, part, :used] = part_codes
                for place, one in zip(layout.places[part], found, strict=True):
                    own = one.reshape(len(one), -1) >> 16
                    parameters[:, place][:, : own.shape[1]] = own

    def decode(self, codec: Name, layout: Layout, encoded: Bytes, block: WritableBlock) -> None:
        parameters, codes = _views(layout, encoded)
        shape = layout.shape
        x = np.empty((shape.layers, 2, *shape[1:4]), np.float32)
        with np.errstate(all="ignore"):
            for part in (0, 1):
                own = [
                    _widen(parameters[:, place]).reshape(layout.groups[part])
                    for place in layout.places[part]
                ]
                x[:, part] = _DECODERS[codec](codes[:, part], own, shape.dim)
        if shape.dtype == "bfloat16":
            bits = x.view(np.uint32).reshape(-1)
            flat(block).view("<u2")[:] = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
        else:
            flat(block).view("<f4")[:] = x.reshape(-1)


def _views(layout: Layout, encoded: Bytes) -> tuple[npt.NDArray[Any], Bytes]:
    """Views of an encoded block: parameters uint16, codes uint8."""
    at = layout.parameter_bytes
    parameters = encoded[:at].view("<u2").reshape(layout.parameters)
    return parameters, encoded[at:].reshape(layout.codes)


def _elements(layout: Layout, block: Bytes) -> tuple[_Floats, _Mask]:
    """Elements [layers, 2, tokens, heads, dim], 0 where they do not count; and which do."""
    shape = layout.shape
    x = _widen(block.view("<u2")) if shape.dtype == "bfloat16" else block.view("<f4")
    counts = np.abs(x) < _LIMIT
    dims = (shape.layers, 2, *shape[1:4])
    return np.where(counts, x, _ZERO).reshape(dims), counts.reshape(dims)


def _widen(parameters: npt.NDArray[Any]) -> _Floats:
    wide: _Floats = (parameters.astype(np.uint32) << 16).view(np.float32)
    return wide


def _scales(most: _Floats, steps: int) -> tuple[_Words, _Floats]:
    """Scales, bf16 in the upper half of words, and their inverses; both 0 where most is tiny."""
    is_some = most >= _LEAST
    up = (most * (_ONE / np.float32(steps))).view(np.uint32) + _LOW & _HIGH
    scale = np.where(is_some, up, _NONE)
    divisor = np.where(is_some, scale.view(np.float32), _ONE)
    return scale, np.where(is_some, _ONE / divisor, _ZERO)


# Encoders take one part's elements [layers, tokens, heads, dim], which of them count, and 0 for K
# or 1 for V. They return the parameters of its groups in the upper half of words, and the codes.


def _encode_int8(x: _Floats, _: _Mask, part: int) -> tuple[list[_Words], npt.NDArray[Any]]:
    most = np.abs(x).max(axis=3 if part else 1, keepdims=True)
    scale, inverse = _scales(most, 127)
    return [scale], (x * inverse + _ROUND).view(np.uint32) & 0xFF


def _encode_int4(x: _Floats, counts: _Mask, part: int) -> tuple[list[_Words], npt.NDArray[Any]]:
    axis = 3 if part else 1
    lowest = np.where(counts, x, np.float32(np.inf)).min(axis=axis, keepdims=True)
    highest = np.where(counts, x, np.float32(-np.inf)).max(axis=axis, keepdims=True)
    is_empty = lowest > highest
    lowest, highest = np.where(is_empty, _ZERO, lowest), np.where(is_empty, _ZERO, highest)
    bits = lowest.view(np.uint32)
    bits = bits + np.where(bits >> 31, _LOW, _NONE) & _HIGH
    bits = np.where(np.abs(bits.view(np.float32)) < _LEAST_BASE, _NONE, bits)
    base = bits.view(np.float32)
    scale, inverse = _scales(highest - base, 15)
    code = ((x - base) * inverse + _ROUND).view(np.uint32) & 15
    code = np.where(counts, code, _NONE)
    dim = code.shape[-1]
    half = -(-dim // 2)
    packed = code[..., :half].copy()
    packed[..., : dim - half] |= code[..., half:] << 4
    return [bits, scale], packed


def _encode_fp8(x: _Floats, _: _Mask, part: int) -> tuple[list[_Words], npt.NDArray[Any]]:
    most = np.abs(x).max(axis=(1, 3), keepdims=True)
    exponent = most.view(np.uint32) + np.uint32(0x1FFFFF) >> 23
    scale = np.where(most >= _LEAST, exponent - np.uint32(8) << 23, _NONE)
    inverse = np.where(scale > 0, np.uint32(254 << 23) - scale, _NONE).view(np.float32)
    bits = (x * inverse).view(np.uint32)
    size = bits & 0x7FFFFFFF
    wide = size.view(np.float32)
    small = (wide + _DENORMAL).view(np.uint32) - _DENORMAL.view(np.uint32)
    normal = (size + 0x7FFFF + (size >> 20 & 1) >> 20) - _BIAS
    return [scale], bits >> 31 << 7 | np.where(wide < _LEAST_NORMAL, small, normal)


# Decoders take one part's codes, its parameters shaped to go with them, and the size of a head.


def _decode_int8(codes: Bytes, parameters: list[_Floats], _: int) -> _Floats:
    return codes.astype(np.int8).astype(np.float32) * parameters[0]


def _decode_int4(codes: Bytes, parameters: list[_Floats], dim: int) -> _Floats:
    base, scale = parameters
    high = codes[..., : dim - codes.shape[-1]] >> 4
    code = np.concatenate([codes & 15, high], axis=-1).astype(np.float32)
    return base + code * scale


def _decode_fp8(codes: Bytes, parameters: list[_Floats], _: int) -> _Floats:
    size = codes.astype(np.uint32) & 0x7F
    small = (size | _DENORMAL.view(np.uint32)).view(np.float32) - _DENORMAL
    bits = np.where(size < 8, small.view(np.uint32), size + _BIAS << 20)
    values: _Floats = (bits | (codes >> 7).astype(np.uint32) << 31).view(np.float32)
    return values * parameters[0]


_ENCODERS: Final = {"int8": _encode_int8, "fp8": _encode_fp8, "int4": _encode_int4}
_DECODERS: Final = {"int8": _decode_int8, "fp8": _decode_fp8, "int4": _decode_int4}
