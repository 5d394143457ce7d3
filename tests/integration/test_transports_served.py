"""Whole deployments over each transport, and `baton fabric check` on them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from faults.served import LONG, SMALL, Victim, make_long_model, prompt_of

PROMPTS = [prompt_of(length, seed) for seed, length in enumerate((1, 15, 16, 17, 200, 700))]
NUM_TOKENS = 24
TCP = ("--fabric.transport", "tcp")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_long_model(tmp_path_factory.mktemp("transports") / "org-tiny")


@pytest.fixture(scope="module")
def expected(model: Path) -> Iterator[list[list[int]]]:
    with Victim.start(model, "1U", *SMALL) as served:
        yield [served.ask(prompt, NUM_TOKENS) for prompt in PROMPTS]


@pytest.mark.parametrize("layout", ["1P1D", "2P2D"])
def test_answers_over_tcp_are_those_of_one_worker(
    model: Path, expected: list[list[int]], layout: str
) -> None:
    with Victim.start(model, layout, *SMALL, *LONG, *TCP) as served:
        assert [served.ask(prompt, NUM_TOKENS) for prompt in PROMPTS] == expected
        counters = served.counters()
        output = served.output
    decodes = [totals for worker, totals in counters.items() if worker.startswith("decode")]
    assert sum(totals["prompt_tokens_computed"] for totals in decodes) == 0
    assert sum(totals["early_blocks"] for totals in decodes) > 0
    assert "name=tcp reason=fabric.transport says so" in output
    assert "name=shm" not in output


@pytest.mark.parametrize(("flags", "ways"), [((), {"shm"}), (TCP, {"shm", "tcp"})])
def test_fabric_check_measures_every_way(
    model: Path, flags: tuple[str, ...], ways: set[str]
) -> None:
    with Victim.start(model, "1P1D", *SMALL, *flags) as served:
        command = [sys.executable, "-m", "baton", "fabric", "check", "--url", served.url]
        command += ["--admin-url", served.admin_url]
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        served.until(served.is_idle)
        report = httpx.post(f"{served.admin_url}/fabric/check", timeout=60, trust_env=False).json()
        served.until(served.is_idle)
    assert "1,000 prompt tokens" in said.stdout, said.stdout
    links = report["links"]
    assert {link["transport"] for link in links} == ways
    assert {(link["source"], link["reader"]) for link in links} >= {("prefill-0", "decode-0")}
    for link in links:
        assert link["problem"] == ""
        assert link["bytes_per_s"] > 1e6 and link["latency_s"] > 0, json.dumps(link)
