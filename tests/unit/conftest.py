"""Unit tests take seconds, so they do without torch. Whoever imports it is found here."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A file that imports torch is an error of its collection."""
    was_there = "torch" in sys.modules
    report = yield
    if not was_there and "torch" in sys.modules:
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} imports torch: what needs it is no unit test"
    return report


@pytest.fixture(scope="module", autouse=True)
def without_torch() -> Iterator[None]:
    """Nor does a test import it while it runs."""
    was_there = "torch" in sys.modules
    yield
    assert was_there or "torch" not in sys.modules, "a test of this file has imported torch"
