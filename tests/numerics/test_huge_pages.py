"""Memory of forward passes: whole, apart from others, and advised to be in huge pages."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import pytest
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


def resident_bytes(tensor: torch.Tensor) -> int:
    """Of the mapping that `tensor` is in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first:
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= tensor.data_ptr() < end
        elif inside and first == "Rss:":
            return int(rest.split()[0]) << 10
    raise AssertionError("not mapped")


def test_memory_is_taken_before_it_is_written_and_what_is_written_stays() -> None:
    tensor = huge_pages.empty((24, 1 << 20), torch.float32)
    tensor[3].fill_(5)
    assert resident_bytes(tensor) < tensor.nbytes / 2
    thread = huge_pages.take_early(tensor, wait_s=0, rest=0)
    assert thread is not None
    tensor[20, :100].fill_(6)
    thread.join(30)
    assert resident_bytes(tensor) >= tensor.nbytes
    assert bool((tensor[3] == 5).all()) and bool((tensor[20, :100] == 6).all())


def test_nothing_is_taken_early_of_small_tensors_or_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert huge_pages.take_early(torch.empty(1000)) is None
    monkeypatch.setattr(huge_pages, "_MEMORY_SHARE", 2)
    tensor = huge_pages.empty((24, 1 << 20), torch.float32)
    thread = huge_pages.take_early(tensor, wait_s=0, rest=0)
    assert thread is not None
    thread.join(30)
    assert resident_bytes(tensor) < tensor.nbytes / 2


def test_taking_ends_when_the_tensor_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting, looked = threading.Event(), threading.Event()

    def is_short() -> bool:
        looked.set()
        assert waiting.wait(30)
        return False

    monkeypatch.setattr(huge_pages, "_is_short", is_short)
    tensor = huge_pages.empty((24, 1 << 20), torch.float32)
    thread = huge_pages.take_early(tensor, wait_s=0, rest=0)
    assert thread is not None and looked.wait(30)
    del tensor
    gc.collect()
    looked.clear()
    waiting.set()
    thread.join(30)
    assert not thread.is_alive() and not looked.is_set()
