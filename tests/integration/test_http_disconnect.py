"""Clients that leave, over real sockets."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable

import pytest
from http_fixtures import Target, ToyModel

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_work(
    target: Target, toy_target: tuple[Target, ToyModel], stream: bool
) -> None:
    model = toy_target[1]
    closed = model.num_closed_early
    host, port = target.root.removeprefix("http://").split(":")
    body = json.dumps(
        {
            "model": target.model,
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 400,
            "n": 2,
            "ignore_eos": True,
            "stream": stream,
        }
    )
    model.delay_s = 0.05
    try:
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(
                f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {target.api_key}\r\n"
                f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n{body}"
                .encode()
            )  # fmt: skip
            wait_for(lambda: model.num_running == 2)
            if stream:
                assert connection.recv(100)
        wait_for(lambda: model.num_running == 0)  # all of it would take 10 s
    finally:
        model.delay_s = 0.0
    assert model.num_closed_early == closed + 2


def wait_for(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)
