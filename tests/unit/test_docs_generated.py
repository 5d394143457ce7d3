"""The pages made from the code are what the code says now; every counter of a worker is there."""

from __future__ import annotations

import re
import runpy
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from baton.core.counters import REQUEST_COUNTERS
from baton.observe.metrics_docs import EVENTS, REQUEST_EVENTS

ROOT = Path(__file__).parent.parent.parent
PAGES: dict[str, str] = runpy.run_path(str(ROOT / "docs" / "generate.py"))["pages"]()


@pytest.mark.parametrize("name", PAGES)
def test_the_committed_page_is_the_generated_one(name: str) -> None:
    committed = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert committed == PAGES[name], "run `make docs`"


def test_every_counter_of_the_policy_code_is_documented() -> None:
    source = "".join(file.read_text() for file in (ROOT / "src/baton/core").glob("*.py"))
    counted = set(re.findall(r'counters\[f?"([a-z_]+)(?:\{\w+\})?"\]', source))
    assert {"preemptions", "fallback_import_"} <= counted
    assert REQUEST_EVENTS.keys() == set(REQUEST_COUNTERS) <= counted
    for name in counted - REQUEST_EVENTS.keys():
        known = any(fnmatchcase(name, event) or event.startswith(name) for event in EVENTS)
        assert known, f"{name} is not in EVENTS"
