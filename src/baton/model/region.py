"""Memory for weights: a memfd, mapped so that huge pages can hold it.

Decoding is bound by reading the weights, and in small pages that is a tenth slower. A memfd gets
huge pages by `madvise(MADV_COLLAPSE)` (Linux 6.1 and later), which is allowed even where
`shmem_enabled` is at its default, never; what the kernel does not give stays in small pages.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_char, c_int, c_long, c_size_t, c_void_p
from functools import cache
from typing import Final

from baton.errors import ConfigError

HUGE_BYTES: Final = 2 << 20
# From <linux/fcntl.h> and <sys/mman.h>; spelled out, so that other systems can import this.
_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034
_SEALS: Final = 0x1 | 0x2 | 0x4 | 0x8  # against sealing, shrinking, growing, writing
_MAP_FIXED, _MADV_COLLAPSE = 0x10, 25
_COLLAPSE_BYTES: Final = 32 << 20
_SLOWEST_BYTES_PER_S: Final = 256 << 20
_FAILED: Final = c_void_p(-1).value


class Region:
    """The first `num_bytes` of memfd `fd`, which may be closed afterwards.

    `address` is a multiple of 2 MiB and holds until the last `buffer` is gone. Writing takes the
    memory from the system at once; the file must then be a multiple of 2 MiB long.

    Raises:
        OSError: the memory cannot be mapped.
    """

    def __init__(self, fd: int, num_bytes: int, *, writable: bool) -> None:
        room = -(-num_bytes // HUGE_BYTES) * HUGE_BYTES
        anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        reserved = _mmap(None, room + HUGE_BYTES, 0, anonymous, -1)
        self._unmap = weakref.finalize(self, _libc().munmap, reserved, room + HUGE_BYTES)
        self._unmap.atexit = False  # other threads may still compute with it
        self.address = -(-reserved // HUGE_BYTES) * HUGE_BYTES
        self.num_bytes = num_bytes
        self.is_huge = False
        if writable:
            access = mmap.PROT_READ | mmap.PROT_WRITE
            _mmap(self.address, room, access, mmap.MAP_SHARED | _MAP_FIXED, fd)
            self.is_huge = self._collapse(room)
        else:
            # Not MAP_SHARED: older kernels refuse that where writing is sealed.
            _mmap(self.address, room, mmap.PROT_READ, mmap.MAP_PRIVATE | _MAP_FIXED, fd)

    def buffer(self) -> ctypes.Array[c_char]:
        """The bytes; it keeps them mapped. Writing to a region that is not `writable` crashes."""
        found = (c_char * self.num_bytes).from_address(self.address)
        found.region = self  # type: ignore[attr-defined]
        return found

    def _collapse(self, room: int) -> bool:
        """Take the memory in huge pages; whether all of it came, and in tolerable time.

        Where memory is short or in pieces the kernel would rather tidy up for minutes than refuse.
        """
        deadline = time.monotonic() + room / _SLOWEST_BYTES_PER_S
        for start in range(0, room, _COLLAPSE_BYTES):
            size = min(_COLLAPSE_BYTES, room - start)
            for at in range(start, start + size, HUGE_BYTES):  # one without any page is refused
                c_char.from_address(self.address + at).value = b"\0"
            if _libc().madvise(self.address + start, size, _MADV_COLLAPSE) != 0:
                return False
            if time.monotonic() > deadline:
                return start + size == room
        return True

    def unmap(self) -> None:
        """Unmap now. Nothing may use a buffer any more."""
        self._unmap()


def create_memfd(name: str) -> int:
    """A descriptor of an empty memfd that can be sealed.

    Raises:
        ConfigError: not on Linux.
    """
    if not hasattr(os, "memfd_create"):
        raise ConfigError("the native kernels' weights need Linux (memfd_create): use torch")
    return os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def seal(fd: int) -> None:
    """Let nobody change memfd `fd` any more, this process included.

    Raises:
        OSError: somebody has it mapped for writing.
    """
    fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)


def is_sealed(fd: int) -> bool:
    """Whether `seal` was called on memfd `fd`.

    Raises:
        OSError: not a memfd.
    """
    return fcntl.fcntl(fd, _F_GET_SEALS) & _SEALS == _SEALS


def reserve(fd: int, num_bytes: int) -> None:
    """Take memory for weights of about so many bytes from the system, for whoever packs them.

    That can take as long as packing them. Does nothing if somebody has packed weights into memfd
    `fd`, or is packing them now.

    Raises:
        OSError: there is not so much memory.
    """
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    try:
        if os.fstat(fd).st_size == 0:
            os.ftruncate(fd, -(-num_bytes // HUGE_BYTES) * HUGE_BYTES)
            Region(fd, num_bytes, writable=True).unmap()
    finally:
        fcntl.lockf(fd, fcntl.LOCK_UN)


def release(fd: int) -> None:
    """Give back the memory of memfd `fd`, unless it holds weights: nobody is going to pack any."""
    with locked(fd):
        if not is_sealed(fd):
            os.ftruncate(fd, 0)


@contextmanager
def locked(fd: int) -> Iterator[None]:
    """Wait until no other process is in here with the same file; the dead do not count."""
    fcntl.lockf(fd, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.lockf(fd, fcntl.LOCK_UN)


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = c_void_p
    libc.mmap.argtypes = [c_void_p, c_size_t, c_int, c_int, c_int, c_long]
    libc.munmap.argtypes = [c_void_p, c_size_t]
    libc.madvise.argtypes = [c_void_p, c_size_t, c_int]
    return libc


def _mmap(address: int | None, num_bytes: int, access: int, flags: int, fd: int) -> int:
    found = _libc().mmap(address, num_bytes, access, flags, fd, 0)
    if found == _FAILED:
        error = ctypes.get_errno()
        raise OSError(error, f"cannot map {num_bytes} bytes: {os.strerror(error)}")
    return int(found)
