"""Fixtures of the tests of `tcp`; for `pytest_plugins`."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

import pytest
from tcp_ends import Make, Store

from baton.fabric.tcp import TcpTransport


@pytest.fixture
def nothing_is_left() -> Iterator[None]:
    before = sorted(os.listdir("/proc/self/fd"))
    num_threads = threading.active_count()
    yield
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert threading.active_count() == num_threads


@pytest.fixture
def stack(nothing_is_left: None) -> Iterator[contextlib.ExitStack]:
    """Closes what a test opens even if it fails: a thread that stays would keep tests from ending.

    Whatever was opened on it, nothing is left of it.
    """
    with contextlib.ExitStack() as made:
        yield made


@pytest.fixture
def make(stack: contextlib.ExitStack) -> Make:
    return lambda **options: stack.enter_context(contextlib.closing(Store(**options)))


@pytest.fixture
def store(make: Make) -> Store:
    return make()


@pytest.fixture
def reader(store: Store, stack: contextlib.ExitStack) -> TcpTransport:
    return stack.enter_context(contextlib.closing(store.transport()))
