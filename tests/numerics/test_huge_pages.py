"""Memory of forward passes: whole, apart from others, and advised to be in huge pages."""

from __future__ import annotations

from pathlib import Path

import torch

from baton.model import huge_pages
from baton.model.region import HUGE_BYTES


def flags_at(address: int) -> list[str]:
    """VmFlags of the mapping that `address` is in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first:
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            return rest.split()
    raise AssertionError("not mapped")


def test_large_tensors_are_aligned_and_advised() -> None:
    tensors = [huge_pages.empty((1025, 2048), torch.bfloat16) for _ in range(3)]
    for i, tensor in enumerate(tensors):
        assert tensor.shape == (1025, 2048) and tensor.is_contiguous()
        assert tensor.data_ptr() % HUGE_BYTES == 0
        assert "hg" in flags_at(tensor.data_ptr())
        tensor.fill_(i)
    for i, tensor in enumerate(tensors):
        assert torch.equal(tensor, torch.full_like(tensor, i))


def test_small_ones_are_as_torch_makes_them() -> None:
    tensor = huge_pages.empty((3, 5), torch.float32)
    assert tensor.shape == (3, 5) and tensor.dtype == torch.float32
    assert tensor.untyped_storage().nbytes() == 60
