"""Bodies: strict JSON, and the bounds while reading."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.types import Message

from baton.errors import InvalidRequest, Overloaded, ServeError
from baton.gateway.body import parse_object, read_json
from baton.gateway.limits import Limits, OpenRequests
from baton.gateway.problems import BodyTimeout, BodyTooLarge, UnsupportedMediaType


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"[1]", None),
        (b'"x"', None),
        (b"null", None),
        (b'{"a": 1} 2', None),
        (b"\xff\xfe", None),
        (b'{"a": "\xed\xa0\x80"}', "a"),
        (b'{"a": NaN}', "a"),
        (b'{"x": 1, "a": [0, {"b": -Infinity}]}', "a"),
        (b'{"a": 1e999}', "a"),
        (b'{"a": ' + b"9" * 5_000 + b"}", None),
        (b'{"a": "\\ud800"}', "a"),
        (b'{"\\ud800": 1}', "\\ud800"),
        (b'{"a": "\x00"}', "a"),
        (b'{"x": "y", "a": ["line\nbreak"]}', "a"),
        (b"[" * 200_000 + b"]" * 200_000, None),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, None),
        (b'{"a": "\\ud800", "b": "' + b"x" * (64 << 10) + b'"}', None),
    ],
)
def test_what_is_not_strict_json_is_refused(body: bytes, param: str | None) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_object(body)
    assert caught.value.param == param
    assert (caught.value.status, caught.value.stage) == (400, "validate")
    assert caught.value.message.isprintable()


def test_escaped_control_characters_are_text() -> None:
    assert parse_object(b'{"a": "\\u0000\\n\\ud83d\\ude00"}') == {"a": "\0\n\U0001f600"}


@given(st.binary(max_size=60))
def test_any_bytes_are_an_object_or_a_refusal(body: bytes) -> None:
    try:
        assert isinstance(parse_object(body), dict)
    except InvalidRequest as error:
        assert error.status == 400


def read(
    chunks: AsyncIterator[bytes], limits: Limits, open_requests: OpenRequests, **headers: str
) -> tuple[object, int]:
    """(what came of it, how many bytes were asked for)."""
    taken = 0

    async def receive() -> Message:
        nonlocal taken
        chunk = await anext(chunks, None)
        taken += len(chunk or b"")
        return {"type": "http.request", "body": chunk or b"", "more_body": chunk is not None}

    scope = {
        "type": "http",
        "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()],
    }

    async def scenario() -> object:
        try:
            return await read_json(Request(scope, receive), limits, open_requests)
        except ServeError as error:
            return error

    return asyncio.run(scenario()), taken


async def of(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def forever() -> AsyncIterator[bytes]:
    while True:
        yield b" " * 1000


def test_too_large_a_body_is_refused_unread() -> None:
    limits = Limits(max_body_bytes=10_000)
    held = OpenRequests(limits)
    error, taken = read(forever(), limits, held, content_length="50000000")
    assert isinstance(error, BodyTooLarge)
    assert taken == 0
    error, taken = read(forever(), limits, held)
    assert isinstance(error, BodyTooLarge)
    assert taken == 11_000
    assert error.status == 413
    assert held.body_bytes == 0


def test_a_trickling_body_is_refused_in_time() -> None:
    async def trickle() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(30)

    limits = Limits(body_timeout_s=0.05)
    error, _ = read(trickle(), limits, OpenRequests(limits))
    assert isinstance(error, BodyTimeout)


def test_bodies_together_are_bounded() -> None:
    limits = Limits(max_body_bytes=1000)
    held = OpenRequests(limits)
    held.hold_bytes(31_990)
    error, _ = read(of(b"{}" + b" " * 18), limits, held)
    assert isinstance(error, Overloaded)
    assert held.body_bytes == 31_990
    assert read(of(b'{"a"', b":1}"), limits, held)[0] == {"a": 1}


@pytest.mark.parametrize(
    ("content_type", "accepted"),
    [
        ("application/json", True),
        ("Application/JSON; charset=utf-8", True),
        ("application/problem+json", True),
        ("text/plain", False),
        ("application/x-www-form-urlencoded", False),
        ("multipart/form-data; boundary=x", False),
    ],
)
def test_content_types(content_type: str, accepted: bool) -> None:
    result, _ = read(of(b"{}"), Limits(), OpenRequests(Limits()), content_type=content_type)
    assert (result == {}) if accepted else isinstance(result, UnsupportedMediaType)
