"""These tests need NIXL, and say so instead of being skipped."""

from __future__ import annotations

import importlib.util

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if importlib.util.find_spec("nixl_cu13") is None:
        raise pytest.UsageError(
            "the tests of the nixl transport need the package nixl-cu13: run them with "
            "`make nixl-test`, which installs it"
        )
