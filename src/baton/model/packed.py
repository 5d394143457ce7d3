"""A model's weights as the CPU kernels want them: one run of sealed memory, which a host's workers
share.

    0        magic, length of the header (u64)
    16       header (MessagePack): kernels, instruction set, type, checkpoint, and every tensor's
             place. Whoever maps the memory compares it with what it would have written.
    aligned  the tensors: matrices packed, norms, biases and an untied embedding as they are

    empty ── lock ──▶ being packed ── seal ──▶ sealed: read by all, changed by nobody
                           └── the packer died: the lock is free, the next one starts again
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Final

import msgspec
import torch
from torch import Tensor

from baton.errors import BatonError, ConfigError
from baton.model.checkpoint import Checkpoint, Progress
from baton.model.fingerprint import checkpoint_stamp, weights_fingerprint
from baton.model.native import VERSION, Kernels, Packed, packed_elements
from baton.model.packer import Packer
from baton.model.region import HUGE_BYTES, Region, create_memfd, is_sealed, locked, seal
from baton.model.weights import entries
from baton.model_spec import ModelSpec

logger = logging.getLogger(__name__)

MAGIC: Final = b"BATONWT\0"
_PREFIX_BYTES: Final = 16
_ALIGN: Final = 4096
_MATRICES: Final = ("qkv", "o", "gate_up", "down", "lm_head")


class PackRefused(BatonError):
    """Memory that does not hold these weights for these kernels; the message says why."""


class Slot(msgspec.Struct, frozen=True, array_like=True):
    """Where a tensor lies: `offset` in bytes from the first one. A vector's `width` is 0."""

    name: str
    offset: int
    rows: int
    width: int
    is_packed: bool

    def num_elements(self, dtype: torch.dtype) -> int:
        if self.is_packed:
            return packed_elements(self.rows, self.width, dtype)
        return self.rows * (self.width or 1)


class Header(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the memory holds. `stamp` is the files', `fingerprint` that of the bytes in them."""

    version: int
    isa: str
    dtype: str
    slots: tuple[Slot, ...]
    stamp: bytes
    fingerprint: bytes

    @property
    def num_bytes(self) -> int:
        """Of all tensors together."""
        last = self.slots[-1]
        dtype: torch.dtype = getattr(torch, self.dtype)
        return last.offset + last.num_elements(dtype) * dtype.itemsize


class PackedWeights:
    """Weights for `kernels`, by the names of `weights.entries`.

    A tied embedding is `lm_head`, since only that is packed.
    """

    def __init__(self, region: Region, header: Header, data_at: int, kernels: Kernels) -> None:
        self.kernels = kernels
        self.fingerprint = header.fingerprint
        self.dtype: torch.dtype = getattr(torch, header.dtype)
        self._bytes = torch.frombuffer(region.buffer(), dtype=torch.uint8)[data_at:]
        self._slots = {slot.name: slot for slot in header.slots}

    def tensor(self, name: str) -> Tensor | None:
        """A tensor as the checkpoint has it, or None. For what is not packed."""
        slot = self._slots.get(name)
        if slot is None:
            return None
        assert not slot.is_packed
        return self.elements(slot).view((slot.rows, slot.width) if slot.width else (slot.rows,))

    def address(self, name: str) -> int:
        """Of what `tensor` gives; 0 for None."""
        found = self.tensor(name)
        return 0 if found is None else found.data_ptr()

    def matrix(self, name: str) -> Packed:
        """A packed matrix with its bias."""
        slot = self._slots[name]
        bias = self.tensor(f"{name}_bias")
        return Packed.of_packed(self.elements(slot), slot.rows, slot.width, bias)

    def elements(self, slot: Slot) -> Tensor:
        """The memory of a slot, flat."""
        size = slot.num_elements(self.dtype) * self.dtype.itemsize
        return self._bytes[slot.offset : slot.offset + size].view(self.dtype)


@torch.inference_mode()
def load_packed(
    path: Path,
    spec: ModelSpec,
    dtype: str,
    kernels: Kernels,
    shared_fd: int | None = None,
    progress: Progress | None = None,
) -> PackedWeights:
    """The weights of the checkpoint in `path`: from memfd `shared_fd` if it is given and has them.

    The first process to come packs them there, and the others wait for it. Where the shared memory
    holds something else, and without `shared_fd`, they are packed into memory of our own.

    Raises:
        ModelError: as `Checkpoint`.
        ConfigError: `shared_fd` is not a memfd, or this is not Linux.
        OSError: no memory.
    """
    if shared_fd is not None:
        try:
            is_sealed(shared_fd)
        except OSError as error:
            raise ConfigError(f"descriptor {shared_fd} is not a memfd: {error.strerror}") from None
        with locked(shared_fd):
            if not is_sealed(shared_fd):
                _pack(path, spec, dtype, kernels, shared_fd, progress)
        try:
            return map_packed(path, spec, dtype, kernels, shared_fd)
        except PackRefused as refused:
            logger.warning("weights packed again, for this worker alone: %s", refused)
    fd = create_memfd("baton-weights")
    try:
        _pack(path, spec, dtype, kernels, fd, progress)
        return map_packed(path, spec, dtype, kernels, fd)
    finally:
        os.close(fd)


def map_packed(path: Path, spec: ModelSpec, dtype: str, kernels: Kernels, fd: int) -> PackedWeights:
    """Map what some process packed, if it is what this one would have packed.

    Raises:
        PackRefused: it is not.
        ModelError: the checkpoint's files cannot be read.
        OSError: not a memfd, or it cannot be mapped.
    """
    if not is_sealed(fd):
        raise PackRefused("the shared weights are not sealed")
    header, data_at = _read_header(fd)
    found = {name: getattr(header, name) for name in ("version", "isa", "dtype", "slots")}
    wanted = _header(spec, dtype, kernels, header.stamp, header.fingerprint)
    for name, value in found.items():
        if value != (expected := getattr(wanted, name)):
            shown = "" if name == "slots" else f": {value}, not {expected}"
            raise PackRefused(f"the shared weights have another {name}{shown}")
    if os.fstat(fd).st_size < data_at + header.num_bytes:
        raise PackRefused("the shared weights are cut short")
    # A new stamp may be no more than a copy or a new date.
    if header.stamp != checkpoint_stamp(path) and header.fingerprint != weights_fingerprint(path):
        raise PackRefused("the checkpoint has changed since the shared weights were packed")
    region = Region(fd, data_at + header.num_bytes, writable=False)
    return PackedWeights(region, header, data_at, kernels)


def _pack(
    path: Path, spec: ModelSpec, dtype: str, kernels: Kernels, fd: int, progress: Progress | None
) -> None:
    header = _header(spec, dtype, kernels, checkpoint_stamp(path), bytes(32))
    checkpoint = Checkpoint(path, spec)
    data_at = _data_at(msgspec.msgpack.encode(header))
    num_bytes = data_at + header.num_bytes
    # What is there is reserved memory, or left by a packer that died; every tensor is written.
    os.ftruncate(fd, _aligned(num_bytes, HUGE_BYTES))
    started = time.monotonic()
    region = Region(fd, num_bytes, writable=True)
    weights = PackedWeights(region, header, data_at, kernels)
    packer = Packer(kernels)
    for entry, slot in zip(entries(spec), header.slots, strict=True):
        packer.add(entry, weights.elements(slot), slot.is_packed)
    header = msgspec.structs.replace(header, fingerprint=checkpoint.read(packer.put, progress))
    packer.check()
    text = msgspec.msgpack.encode(header)
    os.pwrite(fd, MAGIC + len(text).to_bytes(8, "little") + text, 0)
    region.unmap()
    seal(fd)
    seconds = time.monotonic() - started
    huge = region.is_huge
    logger.info("weights packed num_bytes=%d huge_pages=%s in %.2f s", num_bytes, huge, seconds)


def _header(
    spec: ModelSpec, dtype: str, kernels: Kernels, stamp: bytes, fingerprint: bytes
) -> Header:
    type_: torch.dtype = getattr(torch, dtype)
    slots: list[Slot] = []
    end = 0
    for entry in entries(spec):
        field = entry.name.rpartition(".")[2]
        is_head = field == "embed" and spec.tie_word_embeddings
        name = "lm_head" if is_head else entry.name
        is_packed = is_head or field in _MATRICES
        slot = Slot(name, end, entry.shape[0], entry.width or 0, is_packed)
        slots.append(slot)
        end = _aligned(end + slot.num_elements(type_) * type_.itemsize, _ALIGN)
    return Header(VERSION, kernels.isa, dtype, tuple(slots), stamp, fingerprint)


def _read_header(fd: int) -> tuple[Header, int]:
    prefix = os.pread(fd, _PREFIX_BYTES, 0)
    if prefix[:8] != MAGIC:
        raise PackRefused("the shared memory does not hold weights")
    length = min(int.from_bytes(prefix[8:], "little"), os.fstat(fd).st_size)
    text = os.pread(fd, length, _PREFIX_BYTES)
    try:
        return msgspec.msgpack.decode(text, type=Header), _data_at(text)
    except msgspec.DecodeError as error:
        raise PackRefused(f"the header of the shared weights is of another kind: {error}") from None


def _data_at(header: bytes) -> int:
    return _aligned(_PREFIX_BYTES + len(header), _ALIGN)


def _aligned(num_bytes: int, to: int) -> int:
    return -(-num_bytes // to) * to
