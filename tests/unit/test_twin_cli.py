"""`baton simulate`, from the command line to its files."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from baton.cli.main import main
from baton.core.cost import Coefficients, ModelShape, Profile

MODEL = ModelShape("small", 2, 256, 4, 2, 64, 512, 1000)
RATES = Coefficients(1e12, 1e11, 1e12, 1e11, step_s=0.005, sequence_s=1e-4)


@pytest.fixture
def profile(tmp_path: Path) -> str:
    path = tmp_path / "profile.json"
    made = Profile("baton", "test", MODEL, RATES, (), "by hand", "2026-01-01", False)
    path.write_bytes(made.to_json())
    return str(path)


@pytest.fixture
def trace(tmp_path: Path) -> str:
    rows = [
        {
            "timestamp": 250 * i,
            "input_length": 600 + i,
            "output_length": 5 + i % 7,
            "hash_ids": [0, 1 + i],
        }
        for i in range(40)
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def simulate(*args: str) -> int:
    return main(["simulate", "--engine.num-kv-blocks", "2000", *args])


def test_prints_what_a_bench_prints(
    profile: str, trace: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulate("--profile", profile, "--trace", trace, "--slo", "ttft=1s") == 0
    out = capsys.readouterr().out
    for word in ("TTFT", "TPOT", "ITL", "E2E", "40 of 40 ok", "goodput", "prefill-0", "decode-0"):
        assert word in out


def test_same_seed_same_bytes(profile: str, tmp_path: Path) -> None:
    def files(name: str, seed: str) -> tuple[bytes, bytes]:
        outputs = [tmp_path / f"{name}.{kind}" for kind in ("json", "trace")]
        args = ["--profile", profile, "--rate", "9", "--num-requests", "80", "--seed", seed]
        args += ["--prompt-tokens", "10-400", "--output-tokens", "1-30", "--layout", "1P2D"]
        args += ["--fail", "kill:decode-1@3", "--link", "10"]
        args += ["--json", str(outputs[0]), "--chrome-trace", str(outputs[1])]
        assert simulate(*args) == 0
        return outputs[0].read_bytes(), outputs[1].read_bytes()

    first, again, other = files("a", "1"), files("b", "1"), files("c", "2")
    assert first == again
    assert first[0] != other[0]
    assert first[1] != other[1]


def test_the_document_is_that_of_a_bench(profile: str, trace: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    simulate("--profile", profile, "--trace", trace, "--layout", "2U", "--json", str(path))
    document = msgspec.json.decode(path.read_bytes())
    assert document["format"] == "baton-bench/1"
    (run,) = document["runs"]
    assert run["summary"]["num_ok"] == len(run["requests"]) == 40
    assert set(run["requests"][0]) >= {"index", "planned_s", "ttft_s", "tpot_s", "e2e_s"}
    assert [worker["worker_id"] for worker in document["workers"]] == ["unified-0", "unified-1"]
    assert sum(entry["cached_tokens"] for entry in run["requests"]) == 39 * 512  # all but the first


def test_the_chrome_trace_has_every_step(profile: str, trace: str, tmp_path: Path) -> None:
    json_path, path = tmp_path / "run.json", tmp_path / "chrome.json"
    args = ["--profile", profile, "--trace", trace, "--layout", "1P1D"]
    simulate(*args, "--json", str(json_path), "--chrome-trace", str(path))
    events = json.loads(path.read_text())["traceEvents"]
    steps = [event for event in events if "step" in event.get("args", {})]
    workers = json.loads(json_path.read_text())["workers"]
    assert sum(step["args"]["steps"] for step in steps) == sum(w["num_steps"] for w in workers)
    assert any("early" in event.get("args", {}) for event in events)
    ends = {}
    for step in sorted(steps, key=lambda step: step["ts"]):
        assert step["ts"] >= ends.get(step["pid"], 0.0) - 0.01, "two steps at once"
        ends[step["pid"]] = step["ts"] + step["dur"]


def test_a_rate_scales_a_trace(profile: str, trace: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    simulate("--profile", profile, "--trace", trace, "--rate", "8", "--json", str(path))
    (run,) = json.loads(path.read_text())["runs"]
    assert run["summary"]["offered_per_s"] == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--rate", "0"], "the arrival rate is 0: give a number above 0"),
        (["--duration", "0.0", "--num-requests", "0"], "is empty: give at least one request"),
        (["--trace", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--profile", "/nowhere.json"], "cannot read /nowhere.json"),
        (["--profile", "h100.vllm"], "and are next to it: h100-sxm.vllm"),
        (["--prompt-tokens", "9000", "--max-model-len", "8192"], "raise that, or leave such"),
        (["--prompt-tokens", "40000"], "raise engine.kv_cache_bytes"),
        (["--fail", "kill"], "write kill:WORKER@SECONDS"),
        (["--layout", "1P"], "each needs the other"),
        (["--link", "0"], "give it a rate above 0"),
        (["--slo", "ttft=2"], "METRIC=LIMIT"),
    ],
)
def test_bad_input_gets_a_sentence(
    args: list[str], words: str, profile: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulate("--profile", profile, *args) == 2
    err = capsys.readouterr().err
    assert words in err
    assert "Traceback" not in err


def test_a_profile_that_comes_with_baton_goes_by_its_name(
    profile: str, trace: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "decode=h100-sxm.vllm.qwen3-32b.16bit"
    given = ["--profile", profile, "--profile", name, "--layout", "1P1D"]
    assert simulate(*given, "--trace", trace) == 0
    assert "40 of 40 ok" in capsys.readouterr().out


def test_what_is_missing_is_named(profile: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--profile", profile]) == 2
    assert "set engine.kv_cache_bytes or engine.num_kv_blocks" in capsys.readouterr().err
    assert simulate() == 2
    assert "give --profile FILE" in capsys.readouterr().err
    assert simulate("--profile", f"prefill={profile}") == 2
    assert "--profile decode=FILE" in capsys.readouterr().err


def test_a_trace_out_of_order_gets_a_sentence(
    profile: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [{"timestamp": at, "input_length": 5, "output_length": 5} for at in (9000, 10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert simulate("--profile", profile, "--trace", str(path)) == 2
    assert "sort the file by time" in capsys.readouterr().err
