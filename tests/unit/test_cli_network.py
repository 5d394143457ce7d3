"""`bench` and `chat` against a small server over real sockets, well and ill behaved."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from baton.cli.chat import Chat
from baton.cli.endpoint import Endpoint, connect
from baton.cli.load.client import Silent, Target, run_load
from baton.cli.load.prompts import PromptSource
from baton.cli.load.workload import Arrival
from baton.cli.main import main
from baton.errors import BatonError
from baton.observe.results import RequestResult

FIRST_S = 0.10
GAP_S = 0.03
NUM_TOGETHER = 4


class FakeServer:
    """Streams `max_tokens` words; the request's own `behave` field chooses a misbehaviour.

    With token ids where they are asked for, as Baton and vLLM do. Of the misbehaviours, `old`
    ignores the wish and `strict` refuses it; `hidden` shows only the first and the third token,
    and `hidden old` tells no ids besides; `pairs` sends two tokens in each event; `together` is
    answered when there are `NUM_TOGETHER` such requests.
    """

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.arrived: list[float] = []
        self.sent: list[float] = []  # when each token was
        self.together: list[asyncio.Event] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        headers = {k.decode(): v.decode() for k, v in scope["headers"]}
        if scope["path"] == "/v1/models":
            await self._reply(send, 200, b'{"data": [{"id": "tiny"}, {"id": "other"}]}')
            return
        if scope["path"] == "/locked/v1/models":
            await self._reply(send, 401, b"{}")
            return
        self.arrived.append(time.perf_counter())
        body = json.loads((await receive())["body"])
        self.requests.append(body)
        self.headers.append(headers)
        behave = body.get("behave")
        if behave == "busy":
            error = {"error": {"code": "overloaded", "message": "come back later"}}
            await self._reply(send, 429, json.dumps(error).encode())
            return
        if behave == "strict" and "return_token_ids" in body:
            error = {"error": {"code": "unknown_parameter", "message": "return_token_ids"}}
            await self._reply(send, 400, json.dumps(error).encode())
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        async for piece in self._stream(body, behave, "messages" in body):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        if behave == "disconnect":
            raise ConnectionResetError  # uvicorn closes the connection without its last chunk
        await send({"type": "http.response.body", "body": b""})

    @staticmethod
    async def _reply(send: Any, status: int, body: bytes) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, body: dict[str, Any], behave: str | None, chat: bool) -> Any:
        tells_ids = body.get("return_token_ids") and behave not in ("old", "hidden old")

        def event(text: str | None, finish: str | None = None, num_tokens: int = 0) -> bytes:
            choice: dict[str, Any] = {"delta": {"content": text}} if chat else {"text": text or ""}
            if tells_ids:
                choice["token_ids"] = [7] * num_tokens
            return sse({"choices": [{**choice, "finish_reason": finish}]})

        if behave == "together":
            self.together.append(asyncio.Event())
            if len(self.together) == NUM_TOGETHER:
                for waiting in self.together:
                    waiting.set()
            await self.together[-1].wait()
        count = body.get("max_tokens", 3)
        if chat:
            yield sse({"choices": [{"delta": {"role": "assistant"}}]})
        await asyncio.sleep(FIRST_S)
        for i in range(count):
            if i:
                await asyncio.sleep(GAP_S)
            if behave == "error" and i == 1:
                yield sse({"error": {"code": "worker_lost", "message": "gone"}})
                return
            if behave == "garbage" and i == 1:
                yield b"data: {nonsense\n\n"
            if behave == "hang" and i == 1:
                await asyncio.sleep(2)
            if behave in ("cut", "disconnect") and i == 1:
                return
            if behave == "odd" and i == 1:  # a raw U+2028, a comment, CRLF, and a cut in between
                choice = {"text": "a\u2028b", "token_ids": [7]}
                whole = json.dumps({"choices": [choice]}, ensure_ascii=False)
                data = b": ping\r\ndata:" + whole.encode() + b"\r\n\r\n"
                yield data[:20]
                await asyncio.sleep(0.01)
                yield data[20:]
                continue
            self.sent.append(time.perf_counter())
            is_hidden = behave in ("hidden", "hidden old") and i not in (0, 2)
            if is_hidden and tells_ids:
                yield event("", num_tokens=1)
            elif behave == "pairs":
                yield event("ww ", num_tokens=2)
            elif behave != "mute" and not is_hidden:
                yield event("\x1b[2J" if behave == "escape" else f"w{i} ", num_tokens=1)
        if behave == "flush":  # text that was held back, in an event that tells no ids at all
            tells_ids = False
            yield event("held back")
        yield event("", "length")
        if behave not in ("no usage", "pairs", "bare"):
            details = {"cached_tokens": 2}
            usage = {"prompt_tokens": 5, "completion_tokens": 0 if behave == "mute" else count}
            yield sse({"choices": [], "usage": {**usage, "prompt_tokens_details": details}})
        yield b"data: [DONE]\n\n"


def sse(payload: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[FakeServer, str]]:
    app = FakeServer()
    config = uvicorn.Config(app, port=0, log_level="critical", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield app, f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def url(served: tuple[FakeServer, str]) -> str:
    app, url = served
    app.requests.clear()
    app.headers.clear()
    app.arrived.clear()
    app.sent.clear()
    app.together.clear()
    return url


@pytest.fixture
def app(served: tuple[FakeServer, str]) -> FakeServer:
    return served[0]


def load(url: str, times: list[float], **kwargs: Any) -> list[RequestResult]:
    extra = {"behave": kwargs.pop("behave")} if "behave" in kwargs else {}
    num_tokens = kwargs.pop("num_tokens", 4)
    target = Target(Endpoint(f"{url}/v1", "tiny"), extra=extra, **kwargs)
    arrivals = [Arrival(at_s, 6, num_tokens) for at_s in times]
    return asyncio.run(run_load(target, arrivals, PromptSource("1")))


def test_times_are_those_of_the_wire(url: str, app: FakeServer) -> None:
    [result] = load(url, [0.0])
    assert result.failure is None
    assert result.sent_s <= app.arrived[0]
    assert len(result.event_s) == 4
    assert all(s <= seen for s, seen in zip(app.sent, result.event_s, strict=True))
    # As long as the server took, but for what a busy machine adds to single events.
    assert result.tpot_s == pytest.approx((app.sent[-1] - app.sent[0]) / 3, rel=0.5)
    assert result.ttft_s is not None and result.ttft_s > 0.9 * FIRST_S
    assert result.event_s[0] < app.sent[-1], "it was seen before the last one was sent"
    assert (result.prompt_tokens, result.cached_tokens, result.output_tokens) == (5, 2, 4)
    assert result.counted_by == "token ids"
    [request] = app.requests
    assert request["return_token_ids"] is True
    assert request["stream_options"] == {"include_usage": True}
    assert (request["max_tokens"], request["ignore_eos"]) == (4, True)
    assert len(request["prompt"].split()) == 6


def test_open_loop_does_not_wait_for_answers(url: str, app: FakeServer) -> None:
    times = [0.0, 0.05, 0.1, 0.1]
    assert len(times) == NUM_TOGETHER  # nobody is answered before all have asked
    results = load(url, times, behave="together", timeout_s=30)
    assert [r.failure for r in results] == [None] * 4
    assert all(r.sent_s >= r.planned_s for r in results)
    assert all(
        seen >= results[0].planned_s + at for seen, at in zip(app.arrived, times, strict=True)
    )
    planned = [r.planned_s - results[0].planned_s for r in results]
    assert planned == pytest.approx(times)
    assert len({json.dumps(r["prompt"]) for r in app.requests}) == 4


def test_chat_events_without_text_are_not_tokens(url: str, app: FakeServer) -> None:
    [result] = load(url, [0.0], api="chat")
    assert result.failure is None
    assert len(result.event_s) == 4
    assert result.ttft_s is not None and result.ttft_s > FIRST_S * 0.9  # not the role's event
    assert app.requests[0]["messages"][0]["role"] == "user"


def test_events_survive_odd_line_ends_and_cuts(url: str) -> None:
    [result] = load(url, [0.0], behave="odd")
    assert result.failure is None
    assert len(result.event_s) == 4


def test_without_token_ids_the_usage_counts(url: str) -> None:
    [result] = load(url, [0.0], behave="old")
    assert (result.output_tokens, result.counted_by, len(result.event_s)) == (4, "usage", 4)


def test_without_token_ids_and_usage_events_are_counted(url: str) -> None:
    [result] = load(url, [0.0], behave="no usage", token_ids=False)
    assert (result.output_tokens, result.counted_by, result.prompt_tokens) == (4, "events", None)


def test_tokens_of_one_event_are_counted_without_usage(url: str) -> None:
    [result] = load(url, [0.0], behave="pairs", num_tokens=3)
    assert (result.output_tokens, result.counted_by, len(result.event_s)) == (6, "token ids", 3)
    assert result.tpot_s == pytest.approx((result.event_s[-1] - result.event_s[0]) / 5)


def test_text_held_back_is_no_token(url: str) -> None:
    [result] = load(url, [0.0], behave="flush")
    assert (result.output_tokens, len(result.event_s)) == (4, 4)
    [result] = load(url, [0.0], behave="flush", api="chat")
    assert (result.output_tokens, len(result.event_s)) == (4, 4)


@pytest.mark.parametrize(("behave", "num_events"), [("hidden", 5), ("hidden old", 2)])
def test_tokens_without_text_take_their_time(
    url: str, app: FakeServer, behave: str, num_events: int
) -> None:
    """The last two of five show nothing: counted to the last text, TPOT would be half of it."""
    [result] = load(url, [0.0], behave=behave, num_tokens=5)
    assert result.failure is None
    assert (result.output_tokens, len(result.event_s)) == (5, num_events)
    assert result.tpot_s == pytest.approx((app.sent[-1] - app.sent[0]) / 4, rel=0.3)


def test_a_server_that_refuses_token_ids_is_asked_without(
    url: str, capsys: Any, app: FakeServer
) -> None:
    args = ["bench", "--url", url, "--rate", "inf", "--num-requests", "2", "--output-tokens", "3"]
    assert main([*args, "--extra", '{"behave": "strict"}']) == 0
    assert "refuses return_token_ids" in capsys.readouterr().out
    assert ["return_token_ids" in request for request in app.requests] == [True] + [False] * 3
    assert main([*args, "--extra", '{"behave": "hidden old"}']) == 0
    text = capsys.readouterr().out
    assert "refuses" not in text
    assert "note        2 of 6 tokens came without an event of their own" in text
    assert main([*args, "--extra", '{"behave": "bare", "return_token_ids": null}']) == 0
    assert "neither token ids nor usage" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("behave", "kind", "detail", "num_events"),
    [
        ("busy", "http 429", "overloaded: come back later", 0),
        ("error", "error worker_lost", "gone", 1),
        ("garbage", "malformed event", "", 1),
        ("cut", "cut short", "without a finish reason", 1),
        ("disconnect", "disconnected", "", 1),
        ("hang", "timeout", "0.5 s", 1),
        ("mute", "no tokens", "", 0),
    ],
)
def test_failures_have_a_kind_and_are_kept(
    url: str, behave: str, kind: str, detail: str, num_events: int
) -> None:
    results = load(url, [0.0, 0.0], behave=behave, timeout_s=0.5)
    assert [r.failure for r in results] == [kind, kind]
    assert detail in results[0].detail
    assert len(results[0].event_s) == num_events


def test_no_server_is_a_kind_of_failure_too() -> None:
    [result] = load("http://127.0.0.1:9", [0.0])
    assert result.failure == "connect"


def test_interruption_keeps_what_was_sent(url: str) -> None:
    target = Target(Endpoint(f"{url}/v1", "tiny"))
    arrivals = [Arrival(0.0, 6, 2), Arrival(0.0, 6, 100), Arrival(60.0, 6, 2)]

    class Watching(Silent):
        first = asyncio.Event()

        def ended(self, result: RequestResult) -> None:
            self.first.set()

    async def interrupted() -> list[RequestResult]:
        watching = Watching()
        task = asyncio.create_task(run_load(target, arrivals, PromptSource("1"), watching))
        await watching.first.wait()
        task.cancel()
        return await task

    results = asyncio.run(interrupted())
    assert [r.failure for r in results] == [None, "interrupted"]


def test_connect_finds_the_model_and_says_what_is_wrong(url: str, tmp_path: Path) -> None:
    assert connect(url, None, None) == Endpoint(f"{url}/v1", "tiny")
    assert connect(f"{url}/v1/", "x", None) == Endpoint(f"{url}/v1", "x")
    key = tmp_path / "key"
    key.write_text("secret\n")
    assert connect(url, None, f"@{key}").headers["Authorization"] == "Bearer secret"
    with pytest.raises(BatonError, match="wants an API key"):
        connect(f"{url}/locked", None, None)
    with pytest.raises(BatonError, match="baton serve"):
        connect("http://127.0.0.1:9", None, None)
    with pytest.raises(BatonError, match="http://"):
        connect("localhost:8000", None, None)


def test_bench_prints_and_writes(url: str, tmp_path: Path, capsys: Any, app: FakeServer) -> None:
    out = tmp_path / "run.json"
    args = ["bench", "--url", url, "--rate", "50", "--num-requests", "8", "--output-tokens", "3"]
    args += ["--seed", "5", "--slo", "ttft=5s,tpot=1us", "--json", str(out), "--api-key", "k3y"]
    assert main(args) == 0
    text = capsys.readouterr().out
    assert "8 of 8 ok" in text
    assert "missed tpot 8x" in text
    written = json.loads(out.read_text())
    [run] = written["runs"]
    assert len(run["requests"]) == 8
    assert run["summary"]["attainment"] == 0.0
    assert run["summary"]["output_tokens"] == 24
    assert written["plan"]["seed"] == 5
    assert "k3y" not in out.read_text()
    assert len(app.requests) == 9  # one to warm up
    assert app.headers[0]["authorization"] == "Bearer k3y"
    prompts = {json.dumps(r["prompt"]) for r in app.requests}
    assert len(prompts) == 9


def test_bench_sweep_and_plot(url: str, tmp_path: Path, capsys: Any, app: FakeServer) -> None:
    picture, out = tmp_path / "f.png", tmp_path / "f.json"
    args = ["bench", "--url", url, "--sweep", "40,20", "--num-requests", "4", "--token-ids"]
    args += ["--output-tokens", "2", "--prompt-tokens", "7", "--slo", "ttft=5s"]
    assert main([*args, "--plot", str(picture), "--json", str(out)]) == 0
    assert "sustained up to 40 requests/s" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [run["rate"] for run in json.loads(out.read_text())["runs"]] == [20.0, 40.0]
    assert all(len(r["prompt"]) == 7 for r in app.requests)
    assert len({tuple(r["prompt"]) for r in app.requests}) == 9


def test_bench_trace_and_json_on_stdout(url: str, tmp_path: Path, capsys: Any) -> None:
    trace = tmp_path / "t.jsonl"
    rows = [{"timestamp": t, "input_length": 30, "output_length": 20} for t in (0, 100, 9_000_000)]
    trace.write_text("\n".join(map(json.dumps, rows)))
    args = ["bench", "--url", url, "--trace", str(trace), "--trace-scale", "0.1", "--duration", "1"]
    assert main([*args, "--json", "-"]) == 0
    captured = capsys.readouterr()
    requests = json.loads(captured.out)["runs"][0]["requests"]
    assert [r["output_tokens"] for r in requests] == [2, 2]
    assert "TTFT" in captured.err


def test_bench_reads_traces_as_the_twin_does(
    url: str, tmp_path: Path, capsys: Any, app: FakeServer
) -> None:
    log = tmp_path / "log.csv"
    log.write_text("when,asked,given\n0.1,9,2\n0,5,3\n")
    args = ["bench", "--url", url, "--warmup", "0", "--seed", "1", "--trace", str(log)]
    args += ["--columns", "arrival=when,prompt=asked,output=given"]
    assert main(args) == 2
    assert "line 3: its time lies 0.1 s before" in capsys.readouterr().err
    assert main([*args, "--sort"]) == 0
    assert [len(r["prompt"].split()) for r in app.requests] == [5, 9]
    assert [r["max_tokens"] for r in app.requests] == [3, 2]
    capsys.readouterr()
    rows = [{"timestamp": 50 * (i // 3), "input_length": 3, "output_length": 1} for i in range(9)]
    coarse = tmp_path / "coarse.jsonl"
    coarse.write_text("\n".join(map(json.dumps, rows)))
    assert main(["bench", "--url", url, "--warmup", "0", "--trace", str(coarse)]) == 0
    assert "note: arrivals are told to 0.05 s" in capsys.readouterr().out


def test_bench_stops_at_once_if_the_first_request_fails(url: str, capsys: Any) -> None:
    assert main(["bench", "--url", url, "--extra", '{"behave": "busy"}']) == 1
    assert "http 429): overloaded: come back later" in capsys.readouterr().err


def test_bench_without_success_exits_with_1(url: str, capsys: Any) -> None:
    args = ["bench", "--url", url, "--extra", '{"behave": "busy"}', "--warmup", "0", "--rate"]
    assert main([*args, "inf", "--num-requests", "3"]) == 1
    assert "3x http 429" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--slo", "ttft=2"], "METRIC=LIMIT"),
        (["--rate", "0"], "not above 0"),
        (["--num-requests", "0"], "less than 1"),
        (["--plot", "x.png"], "--sweep"),
        (["--sweep", "1", "--plot", "x.jpg2"], "must end in"),
        (["--sweep", "1", "--trace", "x"], "leave out --trace"),
        (["--rate", "inf", "--duration", "3"], "give --num-requests"),
        (["--rate", "inf", "--sweep", "auto"], "no sweep"),
        (["--extra", "[1]"], "--extra"),
        (["--token-ids", "--api", "chat"], "completions only"),
        (["--trace", "nowhere.jsonl"], "cannot read"),
    ],
)
def test_bench_refuses_nonsense(url: str, capsys: Any, args: list[str], message: str) -> None:
    assert main(["bench", "--url", url, *args]) == 2
    assert message in capsys.readouterr().err


def test_chat_in_a_pipe(url: str, capsys: Any, monkeypatch: Any, app: FakeServer) -> None:
    monkeypatch.setattr(sys, "stdin", iter_stdin("one\n\ntwo\n/reset\nthree\n/exit\nfour\n"))
    assert main(["chat", "--url", url, "--system", "S", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "w0 w1 w2 \n" * 3
    roles = [[m["content"] for m in r["messages"]] for r in app.requests]
    assert roles == [["S", "one"], ["S", "one", "w0 w1 w2 ", "two"], ["S", "three"]]
    assert app.requests[0]["temperature"] == 0.0


def iter_stdin(text: str) -> Any:
    import io

    return io.StringIO(text)


def ask(url: str, behave: str | None) -> Chat:
    return Chat(Endpoint(f"{url}/v1", "tiny"), {"behave": behave}, [])


@pytest.mark.parametrize(
    ("behave", "message", "kept"),
    [("busy", "429", 0), ("error", "gone", 2), ("cut", "broke off", 2), ("garbage", "broke", 2)],
)
def test_a_broken_answer_is_an_error(url: str, behave: str, message: str, kept: int) -> None:
    with ask(url, behave) as chat, pytest.raises(BatonError, match=message):
        list(chat.ask("hello"))
    assert len(chat.messages) == kept


def test_stopping_an_answer_keeps_what_came(url: str) -> None:
    with ask(url, None) as chat:
        answer = chat.ask("hello")
        assert next(answer) == "w0 "
        answer.close()
        assert chat.messages[-1] == {"role": "assistant", "content": "w0 "}


def test_a_model_cannot_send_escape_sequences(url: str, capsys: Any, monkeypatch: Any) -> None:
    from baton.cli import chat

    monkeypatch.setattr(sys, "stdin", iter_stdin("x\n"))
    original = chat.Chat.__init__

    def escaping(self: Chat, endpoint: Any, options: Any, start: Any) -> None:
        original(self, endpoint, {**options, "behave": "escape"}, start)

    monkeypatch.setattr(chat.Chat, "__init__", escaping)
    assert main(["chat", "--url", url]) == 0
    assert capsys.readouterr().out == "[2J[2J[2J\n"
