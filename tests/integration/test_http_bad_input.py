"""What a client can do wrong: a 4xx in OpenAI's shape that names the field, and nothing broken."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from http_fixtures import Target

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MANY = "x" * 5000


@pytest.fixture(scope="module")
def http(target: Target) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {target.api_key}"}
    with httpx.Client(base_url=target.root, headers=headers, timeout=30) as client:
        yield client


def good(target: Target, path: str) -> dict[str, Any]:
    body: dict[str, Any] = {"model": target.model, "max_tokens": 2}
    if path == CHAT:
        return {**body, "messages": [{"role": "user", "content": "Hi"}]}
    return {**body, "prompt": "Hi"}


def check_error(
    response: httpx.Response, status: int, param: str | None, code: str | None = None
) -> str:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() == {"error"}
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code", "stage"}
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["stage"] == "validate"
    assert code is None or error["code"] == code
    message: str = error["message"]
    assert message
    assert param is None or param.split("[")[0].split(".")[0] in message
    for leak in ("Traceback", "/src/", ".py", "pydantic"):
        assert leak not in message
    return message


@pytest.fixture(autouse=True)
def still_serving(
    http: httpx.Client, target: Target, num_running: Callable[[], int]
) -> Iterator[None]:
    yield
    assert http.post(COMPLETIONS, json=good(target, COMPLETIONS)).status_code == 200
    wait_for(lambda: num_running() == 0)


# (fields put over a good request, the parameter that must be named)
BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"n": 10**9}, "n"),
    ({"n": 10**40}, "n"),
    ({"n": -1}, "n"),
    ({"n": "2"}, "n"),
    ({"n": 2.0}, "n"),
    ({"n": True}, "n"),
    ({"n": [1]}, "n"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**6}, "max_tokens"),
    ({"max_tokens": 1 << 62}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 5.0}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": {}}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 1.5}, "min_p"),
    ({"min_p": -0.5}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 3}, "repetition_penalty"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -2.5}, "frequency_penalty"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 3}, "min_tokens"),  # more than max_tokens
    ({"seed": 1 << 64}, "seed"),
    ({"seed": -(1 << 63) - 1}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"seed": "1"}, "seed"),
    ({"stop": [f"stop {number}" for number in range(100)]}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": MANY}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop": {"a": 1}}, "stop"),
    ({"stop": [["a"]]}, "stop"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"01": 1}}, "logit_bias"),
    ({"logit_bias": {"1.0": 1}}, "logit_bias"),
    ({"logit_bias": {"²": 1}}, "logit_bias"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
    ({"logit_bias": {"999999999": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"1": "5"}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"logit_bias": {str(token): 0 for token in range(2000)}}, "logit_bias"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": [999999999]}, "stop_token_ids"),
    ({"stop_token_ids": list(range(300))}, "stop_token_ids"),
    ({"stop_token_ids": 5}, "stop_token_ids"),
    ({"stream": "yes"}, "stream"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": False, "stream_options": {}}, "stream_options"),
    ({"stream": True, "stream_options": []}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"ignore_eos": "no"}, "ignore_eos"),
    ({"return_token_ids": 0}, "return_token_ids"),
    ({"skip_special_tokens": "x"}, "skip_special_tokens"),
    ({"include_stop_str_in_output": []}, "include_stop_str_in_output"),
    ({"model": 5}, "model"),
    ({"model": None}, "model"),
    ({"model": ""}, "model"),
    # not there yet, and not to be ignored
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"response_format": {"type": "text", "x": 1}}, "response_format"),
    ({"best_of": 2}, "best_of"),
    ({"best_of": True}, "best_of"),
    ({"suffix": "end"}, "suffix"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"guided_json": {}}, "guided_json"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
    # internal
    *(
        ({name: value}, name)
        for name in (
            "hand_off", "handoff", "attempt", "emitted", "kv_transfer_params", "bootstrap_host",
            "bootstrap_port", "bootstrap_room", "grant", "tenant", "salt", "cache_salt",
            "request_id", "rid", "epoch", "choice", "deadline_s", "priority", "prompt_embeds",
            "nvext", "data_parallel_rank", "worker_id",
        )
        for value in ({}, None)
    ),
]  # fmt: skip

BAD_COMPLETION: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [""]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": True}, "prompt"),
    ({"prompt": {"text": "x"}}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [1.0]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [10**9]}, "prompt"),
    ({"prompt": [10**30]}, "prompt"),
    ({"prompt": [[[1]]]}, "prompt"),
    ({"prompt": [[1], "a"]}, "prompt"),
    ({"prompt": ["a"] * 1000}, "prompt"),
    ({"prompt": ["a"] * 100}, "prompt"),  # with n below: too many choices
    ({"prompt": "long " * 5000}, "prompt"),
    ({"prompt": [5] * 5000}, "prompt"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"logprobs": 1, "echo": True}, "echo"),
    ({"echo": 1}, "echo"),
]

BAD_CHAT: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": {}}, "messages"),
    ({"messages": [1]}, "messages[0]"),
    ({"messages": [{}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
    ),
    (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
        "messages[0].tool_calls",
    ),
    ({"messages": [{"role": "user", "content": "long " * 5000}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x"}] * 5000}, "messages"),
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": False, "top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"max_completion_tokens": 3}, "max_completion_tokens"),  # max_tokens is 2
    ({"max_completion_tokens": 0, "max_tokens": None}, "max_completion_tokens"),
    ({"max_completion_tokens": 10**6, "max_tokens": None}, "max_completion_tokens"),
    ({"echo": True}, "echo"),
]


def short(value: object) -> str:
    return str(value)[:60]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(("fields", "param"), BAD_FIELDS, ids=short)
def test_bad_fields(
    http: httpx.Client, target: Target, path: str, fields: dict[str, Any], param: str, stream: bool
) -> None:
    body = {**good(target, path), "stream": stream, **fields}
    if stream and param == "stream_options":
        body["stream"] = fields.get("stream", False)
    check_error(http.post(path, json=body), 400, param)


@pytest.mark.parametrize(("fields", "param"), BAD_COMPLETION, ids=short)
def test_bad_completions(
    http: httpx.Client, target: Target, fields: dict[str, Any], param: str
) -> None:
    body = {**good(target, COMPLETIONS), **fields}
    if fields.get("prompt") == ["a"] * 100:
        body["n"] = 16
        param = "n"
    check_error(http.post(COMPLETIONS, json=body), 400, param)


@pytest.mark.parametrize(("fields", "param"), BAD_CHAT, ids=short)
def test_bad_chats(http: httpx.Client, target: Target, fields: dict[str, Any], param: str) -> None:
    check_error(http.post(CHAT, json={**good(target, CHAT), **fields}), 400, param)


@pytest.mark.parametrize(
    ("path", "left_out"),
    [(COMPLETIONS, "prompt"), (COMPLETIONS, "model"), (CHAT, "messages"), (CHAT, "model")],
)
def test_missing_fields(http: httpx.Client, target: Target, path: str, left_out: str) -> None:
    body = good(target, path)
    del body[left_out]
    assert "required" in check_error(http.post(path, json=body), 400, left_out)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_over_long_prompts_are_refused_with_counts(
    http: httpx.Client, target: Target, path: str
) -> None:
    long = "long " * 3000
    fields = {"messages": [{"role": "user", "content": long}]} if path == CHAT else {"prompt": long}
    response = http.post(path, json={**good(target, path), **fields})
    message = check_error(
        response, 400, "messages" if path == CHAT else "prompt", "context_length_exceeded"
    )
    assert str(target.max_model_len) in message
    response = http.post(path, json={**good(target, path), "max_tokens": target.max_model_len})
    message = check_error(response, 400, "max_tokens", "context_length_exceeded")
    assert str(target.max_model_len) in message


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
def test_unknown_models(http: httpx.Client, target: Target, path: str) -> None:
    body = {**good(target, path), "model": "no/such"}
    if path == "/detokenize":
        body = {"model": "no/such", "tokens": [5]}
    check_error(http.post(path, json=body), 404, "model", "model_not_found")


RAW: list[tuple[bytes, str | None]] = [
    (b"", None),
    (b"{", None),
    (b"not json", None),
    (b"[]", None),
    (b'"text"', None),
    (b"null", None),
    (b"\xff\xfe{}", None),
    (b'{"model": MODEL, "prompt": "x", "temperature": NaN}', "temperature"),
    (b'{"model": MODEL, "prompt": "x", "temperature": Infinity}', "temperature"),
    (b'{"model": MODEL, "prompt": "x", "temperature": -Infinity}', "temperature"),
    (b'{"model": MODEL, "prompt": "x", "temperature": 1e999}', "temperature"),
    (b'{"model": MODEL, "prompt": "a\x00b"}', "prompt"),
    (b'{"model": MODEL, "prompt": "a\nb"}', "prompt"),
    (b'{"model": MODEL, "prompt": "a\\ud800b"}', "prompt"),
    (b'{"model": MODEL, "prompt": "a\\udc00\\ud800"}', "prompt"),
    (b'{"model": MODEL, "prompt": "x", "stop": ["\\ud800"]}', "stop"),
    (b'{"model": MODEL, "prompt": "x",}', None),
    (b'{"model": MODEL, "prompt": "x"} {}', None),
    (b"{'model': MODEL}", None),
    (b'{"model": MODEL, "n": ' + b"9" * 5000 + b"}", None),
    (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
    (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, None),
    (b'{"model": MODEL, "prompt": ' + b"[" * 900 + b"1" + b"]" * 900 + b"}", "prompt"),
]


@pytest.mark.parametrize(("raw", "param"), RAW, ids=short)
def test_what_is_not_json(
    http: httpx.Client, target: Target, raw: bytes, param: str | None
) -> None:
    body = raw.replace(b"MODEL", json.dumps(target.model).encode())
    headers = {"content-type": "application/json"}
    check_error(http.post(COMPLETIONS, content=body, headers=headers), 400, param)


def test_escaped_control_characters_are_text(http: httpx.Client, target: Target) -> None:
    text = b'"a\\u0000\\n\\u001fb"'
    for path, raw in (
        (COMPLETIONS, b'{"model": MODEL, "max_tokens": 2, "prompt": TEXT}'),
        (
            CHAT,
            b'{"model": MODEL, "max_tokens": 2, "messages": [{"role": "user", "content": TEXT}]}',
        ),
        ("/tokenize", b'{"model": MODEL, "prompt": TEXT}'),
    ):
        body = raw.replace(b"MODEL", json.dumps(target.model).encode()).replace(b"TEXT", text)
        response = http.post(path, content=body, headers={"content-type": "application/json"})
        assert response.status_code == 200, response.text
    tokens = response.json()["tokens"]
    back = http.post("/detokenize", json={"tokens": tokens, "skip_special_tokens": True})
    assert back.json()["prompt"] == "a\x00\n\x1fb"


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
def test_wrong_content_types(http: httpx.Client, target: Target, content_type: str) -> None:
    response = http.post(
        COMPLETIONS,
        content=json.dumps(good(target, COMPLETIONS)),
        headers={"content-type": content_type},
    )
    check_error(response, 415, None, "unsupported_media_type")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", COMPLETIONS),
        ("PUT", COMPLETIONS),
        ("DELETE", CHAT),
        ("PATCH", "/tokenize"),
        ("POST", "/v1/models"),
        ("POST", "/health"),
        ("OPTIONS", CHAT),
    ],
)
def test_wrong_methods(http: httpx.Client, method: str, path: str) -> None:
    response = http.request(method, path)
    check_error(response, 405, None, "method_not_allowed")
    assert response.headers["allow"]


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/", "/v1/embeddings", "/v1/completions/", "/docs", "/metrics", "/%00"]
)
def test_unknown_urls(http: httpx.Client, path: str) -> None:
    check_error(http.get(path), 404, None, "not_found")


TOKENIZE: list[tuple[str, dict[str, Any], str]] = [
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
    ("/tokenize", {"prompt": 5}, "prompt"),
    ("/tokenize", {"messages": []}, "messages"),
    ("/tokenize", {"prompt": "x", "add_special_tokens": 1}, "add_special_tokens"),
    ("/tokenize", {"prompt": "x", "chat_template": "x"}, "chat_template"),
    ("/detokenize", {}, "tokens"),
    ("/detokenize", {"tokens": "x"}, "tokens"),
    ("/detokenize", {"tokens": [-1]}, "tokens"),
    ("/detokenize", {"tokens": [1.5]}, "tokens"),
    ("/detokenize", {"tokens": [10**30]}, "tokens"),
    ("/detokenize", {"tokens": [1], "tenant": "x"}, "tenant"),
]


@pytest.mark.parametrize(("path", "body", "param"), TOKENIZE, ids=short)
def test_bad_tokenize(http: httpx.Client, path: str, body: dict[str, Any], param: str) -> None:
    check_error(http.post(path, json=body), 400, param)


def read_response(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """(status, body) of a response with a Content-Length."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = connection.recv(65536)
        assert part, data
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    [length] = [int(line.split(":")[1]) for line in lines if line.startswith("content-length")]
    while len(body) < length:
        body += connection.recv(65536)
    return int(lines[0].split()[1]), json.loads(body)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("path", [COMPLETIONS, "/tokenize"])
def test_a_body_of_50_mb_is_refused_without_being_kept(
    target: Target, path: str, chunked: bool
) -> None:
    host, port = target.root.removeprefix("http://").split(":")
    before = rss_bytes()
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        framing = "transfer-encoding: chunked" if chunked else f"content-length: {50 << 20}"
        connection.sendall(
            f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {target.api_key}\r\n"
            f"content-type: application/json\r\n{framing}\r\n\r\n".encode()
        )
        piece = b" " * (1 << 20)
        sent = 0
        peak = before
        if chunked:
            # Only as much as the bound and one piece need be sent for the refusal to come.
            while sent <= target.max_body_bytes:
                connection.sendall(b"%x\r\n" % len(piece) + piece + b"\r\n")
                sent += len(piece)
        status, body = read_response(connection)
        assert status == 413
        assert body["error"]["code"] == "body_too_large"
        assert body["error"].keys() == {"message", "type", "param", "code", "stage"}
        # A client that goes on sending is read to its end, and nothing of it is kept.
        while sent < 50 << 20:
            try:
                connection.sendall(b"%x\r\n" % len(piece) + piece + b"\r\n" if chunked else piece)
            except (BrokenPipeError, ConnectionResetError):
                break
            sent += len(piece)
            peak = max(peak, rss_bytes())
    assert peak - before < 16 << 20


def rss_bytes() -> int:
    """Of this process, in which the gateway runs too."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


def wait_for(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)
