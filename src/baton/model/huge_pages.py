"""Memory that a forward pass works in, in huge pages.

A row of a matrix is often a small page or more, and work goes down the rows: each one it meets is
then on another page, and in a virtual machine looking a page up takes longer than the line that is
wanted there. Storing a product for 512 rows took longer than computing it.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache

import torch
from torch import Tensor

from baton.model.region import HUGE_BYTES

_MADV_HUGEPAGE = 14


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised host tensor; in small pages where it is small, or the system has no others.

    Memory is taken from the system, 2 MiB at a time, as it is first written.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < HUGE_BYTES:
        return torch.empty(shape, dtype=dtype)
    memory = torch.empty(num_bytes + HUGE_BYTES, dtype=torch.uint8)
    first = -memory.data_ptr() % HUGE_BYTES
    # It is advice: what becomes of it changes no result.
    _madvise()(memory.data_ptr() + first, num_bytes // HUGE_BYTES * HUGE_BYTES, _MADV_HUGEPAGE)
    return memory[first : first + num_bytes].view(dtype).view(shape)


@cache
def _madvise() -> ctypes._NamedFuncPointer:
    found = ctypes.CDLL(None).madvise
    found.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return found
