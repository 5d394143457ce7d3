"""Fixtures for suites that compare answers with those of one undisturbed worker.

A suite gets them by `pytest_plugins = ["faults.expected"]`. Both live as long as its module.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.served import SMALL, Victim, make_long_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `make_long_model`."""
    return make_long_model(tmp_path_factory.mktemp("long-model") / "org-tiny")


@pytest.fixture(scope="module")
def expected(model: Path) -> Iterator[Victim]:
    """One worker that keeps nothing and reads nothing: what the exact answers are."""
    flags = (*SMALL, "--engine.prefix-cache", "false", "--store.keep-blocks", "false")
    with Victim.start(model, "1U", *flags) as served:
        assert isinstance(served, Victim)
        yield served
