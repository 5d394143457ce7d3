"""The frame of the fabric's measurements: targets, missing parts, fair turns."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import fabric
import pytest
from parts.fabric import Missing, Row, interleaved


def nothing_here(rounds: int) -> list[Row]:
    raise Missing("no such network card")


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three parts: one that measures, one that cannot, one that was never written."""
    fakes = {
        "shm": lambda rounds: [
            Row("good", 0.9, "", "≥ 0.8", f"{rounds} rounds"),
            Row("bad", 4.5, "%", "≤ 3"),
            Row("plain", 12_345, "MB/s"),
        ],
        "nixl": nothing_here,
        "codec": fabric._part("never_written"),
    }
    monkeypatch.setattr(fabric, "PARTS", fakes)


def run(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fabric.py", *args])
    return fabric.main()


def test_what_is_missing_is_named_and_the_others_go_on(
    parts: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    assert run(monkeypatch, "--rounds", "11", "--json", str(tmp_path / "new" / "f.json")) == 0
    said = capsys.readouterr().out
    assert "| good | 0.9 |  | ≥ 0.8 | reached | 11 rounds |" in said
    assert "| bad | 4.5 | % | ≤ 3 | missed |  |" in said
    assert "| plain | 12,345 | MB/s |  |  |  |" in said
    assert "nixl: missing: no such network card" in said
    assert "codec: missing: No module named 'parts.fabric.never_written'" in said
    data = json.loads((tmp_path / "new" / "f.json").read_text())
    assert data["missing"].keys() == {"nixl", "codec"}
    assert [row["value"] for row in data["parts"]["shm"]] == [0.9, 4.5, 12_345]


@pytest.mark.parametrize(
    ("args", "message"),
    [(("--parts", "shm,smoke"), "no such part: smoke"), (("--rounds", "3"), "raise --rounds")],
)
def test_bad_arguments_are_named(
    parts: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: tuple[str, ...],
    message: str,
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, *args)
    assert message in capsys.readouterr().err


def test_cases_take_turns_and_the_first_round_is_not_counted() -> None:
    calls: list[str] = []
    cases = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    seconds = interleaved(cases, 4)
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc" + "bca"
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 4, "b": 4, "c": 4}
