"""`baton plan` as a user runs it: what it prints, writes and refuses, and that serve reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from baton.cli.main import main
from baton.config import load_config

SLO = "ttft=2s,tpot=50ms"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    file = tmp_path / "trace.csv"
    rows = [f"{i * 0.25},400,40" for i in range(60)]
    file.write_text("\n".join(["arrival,prompt,output", *rows]) + "\n")
    return file


def _plan(trace: Path, *more: str) -> int:
    mapping = "arrival=arrival:s,prompt=prompt,output=output"
    return main([
        "plan", "--trace", str(trace), "--columns", mapping, "--model", "Llama-3.1-8B",
        "--slo", SLO, "--hardware", "H100", "--budgets", "2048", "--draws", "2",
        "--num-requests", "40", "--write", str(trace.parent / "plan.yaml"), *more,
    ])  # fmt: skip


def test_a_plan(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot, report = trace.parent / "frontier.svg", trace.parent / "plan.json"
    code = _plan(
        trace, "--plot", str(plot), "--json", str(report), "--today", "2U", "--attainment", "0.9"
    )
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert printed.startswith("Verdict: stay unified: 1U H100")
    assert "Today's 2U H100" in printed
    assert "with probability" in printed
    assert plot.read_text().startswith("<svg")
    found = json.loads(report.read_text())
    assert found["verdict"] == "unified"
    assert found["num_candidates"] >= 10
    assert found["chosen"]["usd_per_hour"] == pytest.approx(55.04 / 8)
    config = load_config(trace.parent / "plan.yaml")
    assert config.launch.layout == "1U"
    assert config.launch.needs is None
    assert config.model.path == "Llama-3.1-8B"


def test_serve_refuses_what_baton_cannot_run(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = trace.parent / "plan.yaml"
    file.write_text("model: {path: x}\nlaunch: {layout: 1U, needs: tensor parallelism}\n")
    assert main(["serve", "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert "needs what Baton cannot run yet: tensor parallelism" in error


def test_serve_reads_what_a_plan_assumed(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _plan(trace) == 0
    plan = load_config(trace.parent / "plan.yaml").plan
    assert plan.slo == SLO
    assert plan.rate == pytest.approx(4.0)
    assert plan.max_rate is not None
    assert plan.max_rate >= plan.rate
    assert plan.prompt_tokens == " ".join(["400"] * 9)
    assert plan.profile_file == str(trace.parent / "plan.profile.json")
    Path(plan.profile_file).unlink()
    assert main(["serve", "--config", str(trace.parent / "plan.yaml")]) == 2
    assert f"cannot read the profile {plan.profile_file}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--hardware", "H1000"], "hardware 'H1000' is not known"),
        (["--slo", ""], "a plan needs a promise to keep: give --slo"),
        (["--slo", "ttft=1us"], "no layout here can keep --slo ttft=1us"),
        (["--rate", "0"], "the arrival rate is 0"),
        (["--model", "Llama-3.1-70B", "--hardware", "T4"], "Llama-3.1-70B fits nowhere"),
        (["--model", "Llama-9-8B"], "is not known"),
        (["--price", "H100"], "write DEVICE=USD"),
        (["--price", "H100=-1"], "--price '-1': give a number above 0"),
        (["--link", "0"], "--link '0': give a number above 0"),
        (["--codecs", "gzip"], "--codecs 'gzip': there are raw"),
        (["--today", "4X"], "'4X' is not a layout"),
        (["--today", "1U:L4"], "not in --hardware"),
        (["--write", "/nowhere/at/all.yaml"], "there is no such directory"),
    ],
)
def test_bad_input_gets_a_sentence(
    trace: Path, capsys: pytest.CaptureFixture[str], more: list[str], says: str
) -> None:
    assert _plan(trace, *more) == 2
    assert says in capsys.readouterr().err


def test_an_empty_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "empty.csv"
    file.write_text("arrival,prompt,output\n")
    assert _plan(file) == 2
    assert "request" in capsys.readouterr().err
