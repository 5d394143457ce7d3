"""Fixtures that several files of these tests ask for.

Without a GPU, Triton's kernels run in its interpreter, which must be known before its import.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch computes on one thread: for tiny shapes, waking others takes longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
