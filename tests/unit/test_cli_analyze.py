"""`baton analyze` as a user runs it: files, a server, what it prints, writes and refuses."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from unit import trace_files as files

from baton.cli import analyze_probe
from baton.cli.main import main

OUTPUT_TOKENS = 10
BASE_S, TOKEN_S, STEP_S, SEQUENCE_S = 0.005, 5e-4, 0.004, 0.008


class TimedServer:
    """Answers after a time that grows with the prompt; its gaps grow with what else runs."""

    def __init__(self) -> None:
        self.num_running = 0
        self.lengths: list[int] = []
        self.longest = 10_000

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"].endswith("/models"):
            await self._reply(send, 200, b'{"data": [{"id": "tiny"}]}')
            return
        body = json.loads((await receive())["body"])
        count = len(body["prompt"].split())
        if count > self.longest:
            await self._reply(send, 400, b'{"error": {"code": "too_long", "message": "no"}}')
            return
        self.lengths.append(count)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(BASE_S + TOKEN_S * count)
        self.num_running += 1
        tokens = body["max_tokens"]
        for i in range(tokens):
            if i:
                await asyncio.sleep(STEP_S + SEQUENCE_S * self.num_running)
            finish = "length" if i == tokens - 1 else None
            await self._event(send, {"choices": [{"text": "w ", "finish_reason": finish}]})
        self.num_running -= 1
        usage = {"prompt_tokens": count, "completion_tokens": tokens}
        await self._event(send, {"choices": [], "usage": usage})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    @staticmethod
    async def _event(send: Any, payload: dict[str, Any]) -> None:
        data = b"data: " + json.dumps(payload).encode() + b"\n\n"
        await send({"type": "http.response.body", "body": data, "more_body": True})

    @staticmethod
    async def _reply(send: Any, status: int, body: bytes) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body})


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[TimedServer, str]]:
    monkeypatch.setattr(analyze_probe, "OUTPUT_TOKENS", OUTPUT_TOKENS)
    app = TimedServer()
    config = uvicorn.Config(app, port=0, log_level="critical", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield app, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    rows = [
        {"timestamp": 250 * i, "input_length": 600 + i, "output_length": 20 + i,
         "hash_ids": [0, i // 3 + 1]}
        for i in range(200)
    ]  # fmt: skip
    file = tmp_path / "trace.jsonl"
    file.write_text(files.lines(*rows))
    return file


def test_a_trace_is_printed(trace: Path, capsys: Any) -> None:
    assert main(["analyze", str(trace), "--cache", "1k,2M"]) == 0
    text = capsys.readouterr().out
    assert "200 requests, mooncake" in text
    for heading in (
        "Lengths (tokens)",
        "Traffic",
        "Shared prefixes",
        "Prefill : decode (Llama-3.1",
    ):
        assert heading in text
    assert "cache of 2 M tokens" in text
    assert "H100 SXM" in text
    assert "costs are those of Llama-3.1-8B; give --model" in text
    assert "splitting pays only above 1,000 requests a day: 347,337 requests" in " ".join(
        text.split()
    )
    assert max(map(len, text.splitlines())) < 400


def test_page_and_json(trace: Path, tmp_path: Path, capsys: Any) -> None:
    html = tmp_path / "page.html"
    argv = ["analyze", str(trace), "--html", str(html), "--json", "-", "--hardware", "L40S, A100"]
    assert main([*argv, "--model", "Llama-2-7B", "--batch", "4"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["num_requests"] == 200
    assert document["model"]["name"] == "Llama-2-7B"
    assert [split["label"] for split in document["splits"]] == [
        "L40S", "L40S", "A100-80GB SXM",
    ]  # fmt: skip
    assert {split["batch"] for split in document["splits"]} == {4}
    assert "Lengths" in captured.err
    assert html.read_text().startswith("<!doctype html>")


def test_a_model_directory(trace: Path, capsys: Any) -> None:
    demo = Path(__file__).parents[2] / "models" / "baton-demo-mini"
    assert main(["analyze", str(trace), "--model", str(demo), "--hardware", "Dev CPU"]) == 0
    assert "(baton-demo-mini)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give a TRACE, or --url"),
        (["TRACE", "--columns", "a=b"], "--columns 'a=b': write FIELD=COLUMN"),
        (["TRACE", "--cache", "many"], "--cache 'many': write sizes"),
        (["TRACE", "--cache", "0"], "--cache '0': write sizes"),
        (["TRACE", "--model", "Lama-3.1-8B"], "did you mean Llama-3.1-8B"),
        (["TRACE", "--hardware", "H10O"], "not known"),
        (["TRACE", "--profile", "none.json"], "cannot read the profile none.json"),
        (["TRACE", "--profile", "TRACE"], "no profile of this version"),
        (["TRACE", "--html", "/no/such/page.html"], "there is no such directory"),
        (["TRACE", "--tpot", "0"], "0 is not above 0"),
        (["TRACE", "--batch", "-1"], "-1 is less than 1"),
        (["nothing.jsonl"], "cannot read nothing.jsonl"),
        (["--url", "ftp://x"], "must begin with http"),
        (["--url", "http://x", "--probe-lengths", "1,x"], "--probe-lengths '1,x': write whole"),
        (["--url", "http://x", "--probe-lengths", "8,9"], "4 lengths are needed"),
        (["--url", "http://x", "--probe", "nan"], "--probe nan: give a number"),
    ],
)
def test_what_is_wrong_is_said(argv: list[str], message: str, trace: Path, capsys: Any) -> None:
    assert main(["analyze", *(str(trace) if word == "TRACE" else word for word in argv)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1


def test_a_server_is_measured(served: tuple[TimedServer, str], tmp_path: Path, capsys: Any) -> None:
    app, url = served
    app.longest = 1000
    json_file = tmp_path / "out.json"
    argv = ["analyze", "--url", url, "--json", str(json_file), "--html", str(tmp_path / "p.html")]
    argv += ["--probe-lengths", "10,100,400,800,2000", "--probe-batches", "3,6"]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert "tiny at http://127.0.0.1" in text
    measured = text.partition("Measured (medians)")[2].splitlines()[2:8]
    assert [row.split()[:2] for row in measured] == [
        ["10", "1"], ["100", "1"], ["400", "1"], ["800", "1"], ["400", "3"], ["400", "6"],
    ]  # fmt: skip
    assert "these are the requests of the measurement" in text
    document = json.loads(json_file.read_text())
    ttft = document["endpoint"]["ttft"]["coefficients"]
    gap = document["endpoint"]["gap"]["coefficients"]
    # Twice four lengths alone; three and six at a time tell of gaps only.
    assert document["endpoint"]["ttft"]["num_points"] == 8
    assert document["endpoint"]["gap"]["num_points"] == 8 + 3 + 6
    # Sleeps are never shorter than asked for, and this machine may be busy.
    prefill_s = 800 * ttft["per_token"] + 800**2 * ttft["per_token_squared"]
    assert 0.5 * 800 * TOKEN_S < prefill_s < 3 * 800 * TOKEN_S
    assert 0.5 * STEP_S < gap["step"] + gap["per_sequence"] < 6 * (STEP_S + SEQUENCE_S)
    assert gap["per_sequence"] + 400 * gap["per_kv_token"] > 0.3 * SEQUENCE_S
    sent = document["measured_requests"]
    assert {entry["at_a_time"] for entry in sent} == {1, 3, 6}
    assert [entry["failure"] for entry in sent if entry["failure"]] == ["http 400"]
    assert all(len(entry["itl_s"]) == OUTPUT_TOKENS - 1 for entry in sent if not entry["failure"])
    assert document["splits"][0]["prefill"]["device_s"] > 0
    assert max(app.lengths) == 800


def test_a_trace_is_split_as_a_server_was_measured(
    served: tuple[TimedServer, str], trace: Path, capsys: Any
) -> None:
    _, url = served
    argv = ["analyze", str(trace), "--url", url, "--probe-lengths", "10,50,100,200"]
    assert main([*argv, "--probe-batches", "2"]) == 0
    text = capsys.readouterr().out
    assert "200 requests, mooncake" in text
    assert "measured from outside" in text
    assert "costs are those of" not in text


def test_a_server_that_refuses_is_told(served: tuple[TimedServer, str], capsys: Any) -> None:
    app, url = served
    app.longest = 1
    assert main(["analyze", "--url", url]) == 1
    assert "the first request to" in capsys.readouterr().err
