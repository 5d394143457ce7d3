"""Bad input against a real deployment: refused as on the toy model, and no worker hears of it.

The cases are those of `test_http_bad_input`. Nothing here but the last request may reach a worker.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from faults.served import COMPLETIONS, SMALL, Victim, make_model, target_of
from http_fixtures import Target
from test_http_bad_input import (
    CHAT,
    good,
    http,
    read_response,
    test_bad_chats,
    test_bad_completions,
    test_bad_fields,
    test_bad_tokenize,
    test_missing_fields,
    test_over_long_prompts_are_refused_with_counts,
    test_unknown_models,
    test_unknown_urls,
    test_what_is_not_json,
    test_wrong_content_types,
    test_wrong_methods,
)

__all__ = [
    "http",
    "test_bad_chats",
    "test_bad_completions",
    "test_bad_fields",
    "test_bad_tokenize",
    "test_missing_fields",
    "test_over_long_prompts_are_refused_with_counts",
    "test_unknown_models",
    "test_unknown_urls",
    "test_what_is_not_json",
    "test_wrong_content_types",
    "test_wrong_methods",
]

MAX_MODEL_LEN = 512


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    model = make_model(tmp_path_factory.mktemp("served") / "org-tiny")
    length = ("--model.max-model-len", str(MAX_MODEL_LEN))
    with Victim.start(model, "1P1D", *SMALL, *length) as deployment:
        assert isinstance(deployment, Victim)
        pids = deployment.processes()
        assert pids.keys() == {"gateway", "prefill-0", "decode-0"}
        yield deployment
        # All of it has passed, and no worker was disturbed: the only work is the last request's.
        assert deployment.processes() == pids
        assert len(deployment.ask([7] * 40, 9)) == 9
        totals = deployment.counters()
        assert totals["prefill-0"]["tokens_computed"] == 40
        assert totals["prefill-0"]["tokens_generated"] == 1
        assert totals["decode-0"]["tokens_computed"] == 8
        for worker in ("prefill-0", "decode-0"):
            assert totals[worker].get("refused", 0) == totals[worker].get("aborts", 0) == 0
        assert "Traceback" not in deployment.output


@pytest.fixture(scope="module")
def target(served: Victim) -> Target:
    return target_of(served, MAX_MODEL_LEN)


@pytest.fixture(autouse=True)
def still_serving(http: httpx.Client) -> Iterator[None]:
    yield
    assert http.get("/ready").status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize"])
def test_a_body_of_50_mb_is_refused_without_being_kept(
    served: Victim, target: Target, path: str, chunked: bool
) -> None:
    host, port = target.root.removeprefix("http://").split(":")
    gateway = served.processes()["gateway"]
    before = peak = rss_bytes(gateway)
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        framing = "transfer-encoding: chunked" if chunked else f"content-length: {50 << 20}"
        connection.sendall(
            f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            f"{framing}\r\n\r\n".encode()
        )
        piece = b" " * (1 << 20)
        frame = b"%x\r\n" % len(piece) + piece + b"\r\n" if chunked else piece
        sent = 0
        while chunked and sent <= target.max_body_bytes:
            connection.sendall(frame)
            sent += len(piece)
        status, body = read_response(connection)
        assert (status, body["error"]["code"]) == (413, "body_too_large")
        while sent < 50 << 20:
            try:
                connection.sendall(frame)
            except (BrokenPipeError, ConnectionResetError):
                break
            sent += len(piece)
            peak = max(peak, rss_bytes(gateway))
    # What came before the refusal was held in pieces and once as a whole, at most.
    assert peak - before < 3 * target.max_body_bytes


def test_many_bad_requests_at_once(served: Victim, target: Target) -> None:
    """A flood of refusals, and an open connection that says nothing, stall nobody."""
    host, port = target.root.removeprefix("http://").split(":")
    statuses: list[int] = []

    def flood() -> None:
        with served.http() as client:
            for number in range(40):
                fields = {"n": 10**9} if number % 2 else {"prompt": "long " * 5000}
                body = {**good(target, COMPLETIONS), **fields}
                statuses.append(client.post(COMPLETIONS, json=body).status_code)

    with socket.create_connection((host, int(port)), timeout=20) as silent:
        silent.sendall(f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\n".encode())
        threads = [threading.Thread(target=flood) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert statuses == [400] * 160


def test_nothing_is_leaked(served: Victim, http: httpx.Client, target: Target) -> None:
    """No refusal tells a path, a line of code or a version of this server."""
    answers = [
        http.post(COMPLETIONS, content=b"{", headers={"content-type": "application/json"}),
        http.post(COMPLETIONS, json={**good(target, COMPLETIONS), "handoff": {}}),
        http.get("/../../etc/passwd"),
        http.get("/openapi.json"),
    ]
    for answer in answers:
        text = answer.text + json.dumps(dict(answer.headers))
        for leak in ("Traceback", ".py", "uvicorn", "starlette", str(served.pid), "/tmp"):
            assert leak not in text, leak


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
