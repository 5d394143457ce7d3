"""The peak memory of real workers on a half-billion-parameter model, by `bench/memory.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent.parent / "bench" / "memory.py"
SPARE_BYTES = 600_000_000


@pytest.mark.timeout(600)
def test_a_workers_peak_is_what_it_was_given_and_little_more(tmp_path: Path) -> None:
    found = tmp_path / "peaks.json"
    run = subprocess.run(
        [sys.executable, BENCH, "--kv-mib", "128", "--store-mib", "64", "--json", found],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.exists(), run.stderr
    peaks = json.loads(found.read_text())
    assert {peak["worker"] for peak in peaks} == {"prefill-0", "decode-0"}
    for peak in peaks:
        given = peak["weight_bytes"] + peak["kv_bytes"] + peak["store_bytes"]
        assert peak["peak_bytes"] <= given + SPARE_BYTES, run.stdout
        # Otherwise pool and store were not filled, and the bound above would say little.
        assert peak["grown_bytes"] >= 0.95 * peak["kv_bytes"], run.stdout
        if peak["worker"] == "prefill-0":
            assert peak["shared_bytes"] >= 0.95 * peak["store_bytes"], run.stdout
