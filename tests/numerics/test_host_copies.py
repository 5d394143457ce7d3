"""Copies between a GPU's pool and the host: in which order they wait for steps and for each other.

Without a GPU a stand-in for `torch.cuda` notes what each stream is told, and the bytes are the
CPU's; with one, the last tests see real steps go on meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from baton.model.host_copies import MAX_PASSES, HostCopies


class FakeCuda(TorchFunctionMode):
    """Notes ("wait", "copy", "record", "synchronize") with the stream's and the event's number."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, int, int]] = []
        self.num_streams = self.num_events = 0
        self.current = 0  # the compute stream

    def Stream(self) -> Any:
        self.num_streams += 1
        return FakeStream(self, self.num_streams)

    def Event(self) -> Any:
        self.num_events += 1
        return FakeEvent(self, self.num_events)

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream.number
        yield
        self.current = before

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_:
            self.log.append(("copy", self.current, 0))
        return func(*args, **(kwargs or {}))


class FakeStream:
    def __init__(self, cuda: FakeCuda, number: int) -> None:
        self.cuda, self.number = cuda, number

    def wait_event(self, event: FakeEvent) -> None:
        self.cuda.log.append(("wait", self.number, event.number))


class FakeEvent:
    def __init__(self, cuda: FakeCuda, number: int) -> None:
        self.cuda, self.number = cuda, number

    def record(self, stream: FakeStream | None = None) -> None:
        at = self.cuda.current if stream is None else stream.number
        self.cuda.log.append(("record", at, self.number))

    def synchronize(self) -> None:
        self.cuda.log.append(("synchronize", 0, self.number))


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with FakeCuda() as fake:
        yield fake


@pytest.fixture
def copies(cuda: FakeCuda) -> HostCopies:
    return HostCopies(torch.arange(40, dtype=torch.uint8).view(5, 8), cuda)


READS, WRITES = 1, 2  # numbers of the streams


def test_a_read_waits_for_the_pass_that_wrote_and_for_no_later_one(
    cuda: FakeCuda, copies: HostCopies
) -> None:
    for _ in range(3):
        copies.mark()
    wrote = copies.newest(1)
    cuda.log.clear()
    assert copies.read(2, wrote).tolist() == list(range(16, 24))
    assert cuda.log == [
        ("wait", READS, 2), ("copy", READS, 0), ("record", READS, 4), ("synchronize", 0, 4)
    ]  # fmt: skip


def test_a_write_waits_for_every_pass_that_was_submitted(
    cuda: FakeCuda, copies: HostCopies
) -> None:
    copies.mark()
    copies.mark()
    cuda.log.clear()
    copies.write(3, np.full(8, 99, np.uint8))
    assert cuda.log == [
        ("wait", WRITES, 2), ("copy", WRITES, 0), ("record", WRITES, 3), ("synchronize", 0, 3)
    ]  # fmt: skip
    assert copies.read(3, None).tolist() == [99] * 8
    assert copies.read(4, None).tolist() == list(range(32, 40)), "and nothing else"


def test_marks_are_recorded_on_the_compute_stream(cuda: FakeCuda, copies: HostCopies) -> None:
    copies.mark()
    assert cuda.log == [("record", 0, 1)]


def test_marks_that_are_gone_are_replaced_by_later_ones(copies: HostCopies) -> None:
    assert copies.newest() is None
    assert copies.newest(1) is None
    copies.mark()
    only = copies.newest()
    assert copies.newest(1) is only, "there is none before it"
    for _ in range(MAX_PASSES):
        copies.mark()
    assert copies.newest(50).number == 2
    assert copies.newest(1).number == MAX_PASSES


def test_threads_do_not_share_what_they_read_into(copies: HostCopies) -> None:
    mine = copies.read(0, None)
    other: list[list[int]] = []
    thread = threading.Thread(target=lambda: other.append(copies.read(1, None).tolist()))
    thread.start()
    thread.join()
    assert other == [list(range(8, 16))]
    assert mine.tolist() == list(range(8))
    assert np.shares_memory(copies.read(2, None), mine), "but one thread has one buffer"


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LONG = 400_000_000  # cycles: about 0.2 s


@needs_cuda
def test_a_read_does_not_wait_for_a_later_step() -> None:
    blocks = torch.zeros(4, 1 << 20, dtype=torch.uint8, device="cuda")
    copies = HostCopies(blocks)
    copies.read(0, None)  # pinned memory is there
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG // 10)
    blocks[1] = 7
    copies.mark()
    torch.cuda._sleep(LONG)
    copies.mark()
    found = copies.read(1, copies.newest(1))
    assert not torch.cuda.current_stream().query(), "the later step must be under way still"
    assert (found == 7).all()
    torch.cuda.synchronize()


@needs_cuda
def test_a_write_comes_after_the_steps_under_way() -> None:
    blocks = torch.zeros(4, 1 << 20, dtype=torch.uint8, device="cuda")
    copies = HostCopies(blocks)
    torch.cuda._sleep(LONG)
    blocks[1] = 7  # a sequence that has ended since still writes
    copies.mark()
    started = time.monotonic()
    copies.write(1, np.full(1 << 20, 9, np.uint8))
    assert time.monotonic() - started > 0.01
    assert (blocks[1] == 9).all()
