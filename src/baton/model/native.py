"""The CPU kernels of `csrc` (its header explains them), loaded with ctypes.

The library is optional: without a compiler at install time there is none, and the torch body
serves. It must be loaded after torch, whose OpenMP runtime it shares.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    c_char_p,
    c_double,
    c_float,
    c_int32,
    c_int64,
    c_uint64,
    c_void_p,
)
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from baton.errors import ConfigError
from baton.model_spec import ModelSpec

INTERFACE = 3
"""Of the binary interface; equal to kInterface in kernels.h."""
VERSION = 2
"""Of the results' bits; equal to kVersion in kernels.h."""
ISAS = ("avx512amx", "avx512bf16", "avx512", "avx2", "neon", "portable")
"""Instruction sets, best first."""
DTYPES = {torch.bfloat16: 0, torch.float32: 1}
PANEL = 32
"""Rows of a weight matrix that are packed together."""
MAX_HEAD_DIM = 256

_LIBRARY = Path(__file__).with_name("_kernels.so")


class LinearArgs(Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("n", c_int64), ("k", c_int64)]


class LayerArgs(Structure):
    _fields_ = [
        ("input_norm", c_void_p),
        ("qkv", LinearArgs),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("o", LinearArgs),
        ("post_norm", c_void_p),
        ("gate_up", LinearArgs),
        ("down", LinearArgs),
        ("window", c_int64),
    ]


class StepArgs(Structure):
    _fields_ = [
        ("tokens", c_int64),
        ("sequences", c_int64),
        ("slots", c_void_p),
        ("query_starts", c_void_p),
        ("context_lens", c_void_p),
        ("tables", c_void_p),
        ("max_blocks", c_int64),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("kv", c_void_p),
        ("block_stride", c_int64),
        ("block_size", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("scale", c_float),
        ("eps", c_float),
        ("x", c_void_p),
        ("normed", c_void_p),
        ("qkv", c_void_p),
        ("attended", c_void_p),
        ("gate_up", c_void_p),
        ("inner", c_void_p),
        ("dtype", c_int32),
        ("threads", c_int32),
    ]


class DrawArgs(Structure):
    _fields_ = [
        ("row", c_int64),
        ("largest", c_double),
        ("temperature", c_double),
        ("top_p", c_double),
        ("min_p", c_double),
        ("top_k", c_int64),
        ("seed", c_uint64),
        ("choice", c_uint64),
        ("position", c_int64),
    ]


Draw = tuple[int, float, float, float, float, int, int, int, int]
"""The fields of `DrawArgs`, in that order: a tuple takes a third of a structure's time to make."""

_P, _I, _F, _N = c_void_p, c_int64, c_float, c_int32
_OVER_LAYER = CFUNCTYPE(None, POINTER(LayerArgs), POINTER(StepArgs), _I)


class _Table(Structure):
    _fields_ = [
        ("interface", c_int64),
        ("version", c_int64),
        ("isa", c_char_p),
        ("pack", CFUNCTYPE(None, _P, _P, _I, _I, _N, _N)),
        ("embed", CFUNCTYPE(None, _P, _P, _P, _I, _I, _N)),
        ("linear", CFUNCTYPE(None, POINTER(LinearArgs), _P, _P, _P, _I, _N, _N, _N)),
        ("rms_norm", CFUNCTYPE(None, _P, _P, _P, _I, _I, _F, _N, _N)),
        ("silu_mul", CFUNCTYPE(None, _P, _P, _I, _I, _N, _N)),
        ("angles", CFUNCTYPE(None, _P, _P, _F, _P, _P, _I, _I, _N)),
        ("rope_write", _OVER_LAYER),
        ("attend", _OVER_LAYER),
        ("layer", _OVER_LAYER),
        ("draw", CFUNCTYPE(None, _P, _I, _I, POINTER(DrawArgs), _P, _I, _N)),
    ]


class Packed:
    """A weight matrix [n, k] as the kernels want it, with its bias; `args` points into it."""

    def __init__(self, kernels: Kernels, weight: Tensor, bias: Tensor | None = None) -> None:
        """Pack `weight`, whose memory is taken over: in place where its shape allows that."""
        assert weight.is_contiguous()
        n, k = weight.shape
        dtype = DTYPES[weight.dtype]
        num_elements = packed_elements(n, k, weight.dtype)
        target = weight if num_elements == n * k else weight.new_empty(num_elements)
        threads = torch.get_num_threads()
        kernels.table.pack(weight.data_ptr(), target.data_ptr(), n, k, dtype, threads)
        self._set(target, n, k, bias)

    @classmethod
    def of_packed(cls, memory: Tensor, n: int, k: int, bias: Tensor | None) -> Packed:
        """What lies packed in flat `memory` already."""
        packed = cls.__new__(cls)
        packed._set(memory, n, k, bias)
        return packed

    def _set(self, memory: Tensor, n: int, k: int, bias: Tensor | None) -> None:
        self.memory = memory
        self.bias = bias
        self.dtype = memory.dtype
        self.args = LinearArgs(memory.data_ptr(), bias.data_ptr() if bias is not None else 0, n, k)


def packed_elements(n: int, k: int, dtype: torch.dtype) -> int:
    """Elements that a matrix [n, k] takes when it is packed."""
    unit = PANEL * (2 if dtype == torch.bfloat16 else 1)
    return -(-n // PANEL) * -(-k * PANEL // unit) * unit


class Kernels:
    """The functions for one instruction set, on tensors; all are contiguous and on the CPU.

    Every row of a result is computed by itself, in one order of summation: it has the same bits
    whatever other rows there are, and whatever the number of threads.
    """

    def __init__(self, table: _Table) -> None:
        self.table = table
        self.isa = str(table.isa, "ascii")
        self.numerics = f"exact-v{VERSION}-{self.isa}"

    def embed(self, weight: Packed, ids: Tensor, out: Tensor | None = None) -> Tensor:
        """Rows `ids` [M] int64 of a packed [N, K]: [M, K], in `out` if it is given."""
        assert not ids.numel() or 0 <= int(ids.min()) <= int(ids.max()) < weight.args.n
        if out is None:
            out = torch.empty((ids.numel(), weight.args.k), dtype=weight.dtype)
        assert out.is_contiguous() and out.shape == (ids.numel(), weight.args.k)
        self.table.embed(
            weight.memory.data_ptr(),
            ids.data_ptr(),
            out.data_ptr(),
            *out.shape,
            DTYPES[weight.dtype],
        )
        return out

    def linear(
        self, x: Tensor, weight: Packed, residual: Tensor | None = None, wide: bool = False
    ) -> Tensor:
        """x [M, K] times weight [N, K] transposed, plus bias and `residual`: [M, N].

        Sums are fp32, and so is the result if `wide`; else it is rounded once, to the type of x.
        """
        assert x.is_contiguous() and x.dtype == weight.dtype and x.shape[1] == weight.args.k
        dtype = torch.float32 if wide else x.dtype
        out = torch.empty((x.shape[0], weight.args.n), dtype=dtype)
        self.table.linear(
            weight.args,
            x.data_ptr(),
            residual.data_ptr() if residual is not None else 0,
            out.data_ptr(),
            x.shape[0],
            wide,
            DTYPES[x.dtype],
            torch.get_num_threads(),
        )
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm of each row of x [M, N]; rounded once, at the end."""
        out = torch.empty_like(x)
        self.table.rms_norm(
            x.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            *x.shape,
            eps,
            DTYPES[x.dtype],
            torch.get_num_threads(),
        )
        return out

    def silu_mul(self, x: Tensor) -> Tensor:
        """x [M, 2 N], gate then up, to silu(gate) * up [M, N]."""
        out = torch.empty((x.shape[0], x.shape[1] // 2), dtype=x.dtype)
        threads = torch.get_num_threads()
        self.table.silu_mul(x.data_ptr(), out.data_ptr(), *out.shape, DTYPES[x.dtype], threads)
        return out

    def angles(
        self, frequencies: Tensor, positions: Tensor, factor: float
    ) -> tuple[Tensor, Tensor]:
        """cos and sin, fp32 [M, half], of positions [M] int64 times fp32 frequencies [half]."""
        shape = (positions.numel(), frequencies.numel())
        cos, sin = torch.empty(shape), torch.empty(shape)
        self.table.angles(
            frequencies.data_ptr(),
            positions.data_ptr(),
            factor,
            cos.data_ptr(),
            sin.data_ptr(),
            *shape,
            torch.get_num_threads(),
        )
        return cos, sin

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> list[int]:
        """A token for each of `draws` from fp32 logits [S, vocab_size]; rows may be used twice.

        -1 where rounding could decide between two tokens: ask the sampler's definition then.
        `largest` has to be its row's, and finite.
        """
        assert logits.dtype == torch.float32 and logits.stride(1) == 1
        count = len(draws)
        tokens = np.empty(count, np.int64)
        self.table.draw(
            logits.data_ptr(),
            logits.stride(0),
            logits.shape[1],
            (DrawArgs * count)(*draws),  # type: ignore[misc]  # converts tuples
            tokens.ctypes.data,
            count,
            torch.get_num_threads(),
        )
        found: list[int] = tokens.tolist()
        return found


@cache
def find_kernels(isa: str) -> Kernels | None:
    """The kernels for `isa`, or None if this processor or the installed library has none.

    Raises:
        OSError: the library is there, but cannot be loaded, or is of another version.
    """
    if not _LIBRARY.exists():
        return None
    # All symbols now: a missing OpenMP runtime must show here and not in the first step.
    library = ctypes.CDLL(str(_LIBRARY), mode=os.RTLD_NOW)
    library.baton_kernels.restype = POINTER(_Table)
    library.baton_kernels.argtypes = [c_char_p]
    found = library.baton_kernels(isa.encode())
    if not found:
        return None
    table = found.contents
    if table.interface != INTERFACE:  # the rest of the table may lie elsewhere
        raise OSError(f"{_LIBRARY.name} has interface {table.interface}, not {INTERFACE}")
    if table.version != VERSION:
        raise OSError(f"{_LIBRARY.name} has version {table.version}, not {VERSION}")
    return Kernels(table)


def choose_kernels(choice: str, spec: ModelSpec, dtype: str, device: str) -> Kernels | None:
    """The kernels to run `spec` with; None is the torch body.

    Args:
        choice: "auto", "native" or "torch", as in `engine.kernels`.

    Raises:
        ConfigError: "native" was asked for and cannot be had.
    """
    if choice == "torch":
        return None
    found, reason = _best(spec, dtype, device)
    if found is None and choice == "native":
        raise ConfigError(f"engine.kernels is native, but {reason}: use auto or torch")
    return found


def _best(spec: ModelSpec, dtype: str, device: str) -> tuple[Kernels | None, str]:
    if device != "cpu":
        return None, f"the kernels run on the CPU and engine.device is {device}"
    if getattr(torch, dtype) not in DTYPES:
        return None, f"the kernels compute in bfloat16 and float32, and the type is {dtype}"
    if spec.head_dim > MAX_HEAD_DIM or spec.head_dim % 2:
        return None, f"the kernels want even head sizes up to {MAX_HEAD_DIM}"
    try:
        for isa in ISAS:
            if (found := find_kernels(isa)) is not None:
                return found, ""
    except OSError as error:
        return None, f"they cannot be loaded ({error})"
    return None, "they are not installed (build them with a C++ compiler: make kernels)"
