"""A request's body: read within a bound, parsed as strict JSON.

Too large a body is refused from its Content-Length or, without one, at the byte that is too many;
nothing beyond the bound is kept. Strict means RFC 8259: no NaN, no raw control characters, no
lone surrogates. The parser says where it stopped; for small bodies `_blame` finds the field.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
from starlette.requests import Request

from baton.errors import InvalidRequest
from baton.gateway.limits import Limits, OpenRequests
from baton.gateway.problems import BodyTimeout, BodyTooLarge, UnsupportedMediaType

_MAX_BLAMED_BYTES = 64 << 10
_MAX_NUMBER = float("1e308")


async def read_json(
    request: Request, limits: Limits, open_requests: OpenRequests
) -> dict[str, Any]:
    """The JSON object in the body.

    Raises:
        UnsupportedMediaType: the content type is something else than JSON.
        BodyTooLarge, BodyTimeout, Overloaded: see `Limits`.
        InvalidRequest: the body is not a JSON object.
        ClientDisconnect: the client left in the middle.
    """
    _check_content_type(request.headers.get("content-type"))
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:20]) > limits.max_body_bytes:
        raise _too_large(limits)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for chunk in request.stream():
                if len(body) + len(chunk) > limits.max_body_bytes:
                    raise _too_large(limits)
                body += chunk
                open_requests.hold_bytes(len(chunk))
        return parse_object(bytes(body))
    except TimeoutError as error:
        raise BodyTimeout(
            f"the body did not arrive within {limits.body_timeout_s:g} s", stage="validate"
        ) from error
    finally:
        open_requests.drop_bytes(len(body))


def parse_object(body: bytes) -> dict[str, Any]:
    """Raises:
    InvalidRequest: not a JSON object; `param` names the field if it can be told.
    """
    try:
        value = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        param, reason = _blame(body)
        raise InvalidRequest(
            f"the body is not valid JSON: {reason or error}", stage="validate", param=param
        ) from error
    if not isinstance(value, dict):
        raise InvalidRequest("the body must be a JSON object", stage="validate")
    return value


def _check_content_type(value: str | None) -> None:
    kind = (value or "application/json").split(";", 1)[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise UnsupportedMediaType(
            f"the content type must be application/json, not {kind[:80]!r}", stage="validate"
        )


def _too_large(limits: Limits) -> BodyTooLarge:
    return BodyTooLarge(
        f"the body exceeds {limits.max_body_bytes} bytes, the most this server takes",
        stage="validate",
    )


def _blame(body: bytes) -> tuple[str | None, str | None]:
    """(field, reason) of why strict parsing failed, by parsing once more without the strictness."""
    if len(body) > _MAX_BLAMED_BYTES:
        return None, None
    try:
        value = json.loads(body, strict=False)
    except (ValueError, RecursionError):
        return None, None
    if not isinstance(value, dict):
        return None, None
    for name, reason in (
        ("surrogate", "a lone surrogate is not valid Unicode"),
        ("number", "NaN, Infinity and numbers out of range are not JSON numbers"),
        ("control", "a control character in a string must be escaped"),
    ):
        for field, content in value.items():
            if _holds(content, name) or (name != "number" and _holds(field, name)):
                printable = field.encode("utf-8", "backslashreplace").decode("utf-8")
                return printable, f"{reason} (in {printable!r})"
    return None, None


def _holds(value: object, what: str) -> bool:
    """Whether `value` holds, at any depth, what strict JSON forbids. `value` is small."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            stack += item.keys()
            stack += item.values()
        elif isinstance(item, list):
            stack += item
        elif isinstance(item, str):
            if what == "surrogate" and any("\ud800" <= char <= "\udfff" for char in item):
                return True
            if what == "control" and any(char < " " for char in item):
                return True
        elif what == "number" and isinstance(item, int | float) and not abs(item) < _MAX_NUMBER:
            return True
    return False
