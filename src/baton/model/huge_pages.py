"""Memory that a forward pass works in, in huge pages.

A row of a matrix is often a small page or more, and work goes down the rows: each one it meets is
then on another page, and in a virtual machine looking a page up takes longer than the line that is
wanted there. Storing a product for 512 rows took longer than computing it.
"""

from __future__ import annotations

import ctypes
import math
import threading
import time
import weakref
from functools import cache
from typing import Final

import torch
from torch import Tensor

from baton.model.region import HUGE_BYTES

_MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 14, 23  # the second since Linux 5.14
_LEAST_BYTES: Final = 32 << 20
_MOST_BYTES: Final = 1 << 30
_WAIT_S: Final = 3.0
"""Before `take_early` begins: the start of a worker should not wait for it."""
_REST: Final = 3.0
"""For how many times as long as it has just worked `take_early` rests."""
_MEMORY_SHARE: Final = 1 / 4
"""Of the machine's memory, that has to be available for `take_early` to go on."""


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


def take_early(
    memory: Tensor, wait_s: float = _WAIT_S, rest: float = _REST
) -> threading.Thread | None:
    """Have the system give the first GiB of `memory`, which `empty` made, before it is wanted.

    A huge page is cleared when it is first written. Where a virtual machine's host has to find it
    first, that takes milliseconds, and a step that begins 32 blocks waited for as long as it
    computed. So a thread of its own takes them, one at a time and resting in between; what is
    written meanwhile stays. It ends early when memory is short, or when `memory` is gone.
    """
    if memory.nbytes < _LEAST_BYTES:
        return None
    args = weakref.ref(memory), memory.data_ptr(), min(memory.nbytes, _MOST_BYTES), wait_s, rest
    thread = threading.Thread(target=_take, args=args, name="take-early", daemon=True)
    thread.start()
    return thread


def _take(
    owner: weakref.ref[Tensor], start: int, num_bytes: int, wait_s: float, rest: float
) -> None:
    time.sleep(wait_s)
    for at in range(start, start + num_bytes, HUGE_BYTES):
        memory = owner()  # held while its pages are taken
        if memory is None or _is_short():
            return
        began = time.monotonic()
        size = min(HUGE_BYTES, start + num_bytes - at)
        refused = _madvise()(at, size, _MADV_POPULATE_WRITE) != 0
        del memory
        if refused:
            return
        time.sleep(rest * (time.monotonic() - began))


def _is_short() -> bool:
    """Whether little memory is left on this machine, or nobody knows how much."""
    kib = {}
    try:
        with open("/proc/meminfo") as meminfo:
            for line in meminfo:
                name, _, rest = line.partition(":")
                kib[name] = int(rest.split()[0])
        return kib["MemAvailable"] < _MEMORY_SHARE * kib["MemTotal"]
    except (OSError, KeyError):
        return True


@cache
def _madvise() -> ctypes._NamedFuncPointer:
    found = ctypes.CDLL(None).madvise
    found.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return found
