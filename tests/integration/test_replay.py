"""`baton replay` of the decision logs of real runs: every decision again, without a difference."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from integration.runs import Run

from baton.core import decision_log

WORKERS = {
    "1U": {"unified-0"},
    "1P1D": {"prefill-0", "decode-0"},
    "2P2D": {"prefill-0", "prefill-1", "decode-0", "decode-1"},
}


def replay(logs: list[Path], *options: str) -> tuple[int, dict[str, tuple[int, int]]]:
    """The exit code, and (decisions, differences) by process."""
    done = subprocess.run(
        [sys.executable, "-m", "baton", "replay", *map(str, logs), *options],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stderr == ""
    header, *lines = done.stdout.splitlines()
    assert header.split() == ["process", "inputs", "decisions", "differences", "first"]
    found = {}
    for line in lines[: len(logs)]:
        process, _, decisions, differences, _ = line.replace(",", "").split()
        found[process] = (int(decisions), int(differences))
    return done.returncode, found


def check(run: Run, workers: set[str]) -> None:
    code, found = replay(run.decision_logs)
    assert set(found) == workers | {"gateway"}
    assert {process: different for process, (_, different) in found.items()} == dict.fromkeys(
        found, 0
    )
    assert code == 0
    assert found["gateway"][0] == len(run.answers)
    assert all(decisions > 0 for decisions, _ in found.values())

    code, found = replay(run.decision_logs, "--set", "scheduler.max_num_batched_tokens=64")
    assert code == 1
    first_legs = [process for process in found if process.startswith(("prefill", "unified"))]
    assert first_legs and all(found[process][1] > 0 for process in first_legs)
    assert found["gateway"][1] == 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", WORKERS)
def test_runs_of_mixed_prompts_replay(layout: str, mixed_run: Callable[[str], Run]) -> None:
    check(mixed_run(layout), WORKERS[layout])


@pytest.mark.timeout(300)
def test_the_run_of_200_streams_replays(stream_run: Run) -> None:
    check(stream_run, WORKERS["1P1D"])


@pytest.mark.timeout(300)
def test_logs_hold_hashes_of_decisions_and_not_the_decisions(
    mixed_run: Callable[[str], Run],
) -> None:
    for log in mixed_run("1P1D").decision_logs:
        _, records = decision_log.read(log.read_bytes())
        decided = [
            record
            for record in records
            if isinstance(record, decision_log.Scheduled | decision_log.Placed)
        ]
        assert decided and all(len(record.decision) == 8 for record in decided)
