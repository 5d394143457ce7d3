"""Errors on their way to an HTTP client: what only HTTP has, and OpenAI's shape for all of them.

{"error": {"message", "type", "param", "code", "stage"}}
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from baton.errors import Internal, InvalidRequest, NotFound, ServeError, Unauthorized


class BodyTooLarge(InvalidRequest):
    code = "body_too_large"
    status = 413


class BodyTimeout(InvalidRequest):
    code = "body_timeout"
    status = 408


class UnsupportedMediaType(InvalidRequest):
    code = "unsupported_media_type"
    status = 415


class MethodNotAllowed(InvalidRequest):
    code = "method_not_allowed"
    status = 405


class ModelNotFound(NotFound):
    code = "model_not_found"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class UnsupportedParameter(InvalidRequest):
    code = "unsupported_parameter"


class ErrorDetail(msgspec.Struct, frozen=True):
    """`param` names the field at fault, `stage` the place: validate, queue, prefill, export,
    transfer, decode or gateway."""

    message: str
    type: str
    param: str | None
    code: str
    stage: str


class ErrorReply(msgspec.Struct, frozen=True):
    error: ErrorDetail


def to_reply(error: ServeError) -> ErrorReply:
    return ErrorReply(
        ErrorDetail(error.message, _type(error), error.param, error.code, error.stage)
    )


def _type(error: ServeError) -> str:
    if isinstance(error, Unauthorized):
        return "authentication_error"
    if error.status == 429:
        return "rate_limit_error"
    return "server_error" if error.status >= 500 else "invalid_request_error"


def to_response(error: ServeError, headers: Mapping[str, str] | None = None) -> Response:
    """The whole HTTP answer, with Retry-After (whole seconds) where the error tells a time."""
    all_headers = dict(headers or {})
    if error.retry_after_s is not None:
        all_headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, Unauthorized):
        all_headers["www-authenticate"] = "Bearer"
    return Response(
        msgspec.json.encode(to_reply(error)), error.status, all_headers, "application/json"
    )


def from_http(error: HTTPException) -> ServeError:
    """What Starlette's router raises (unknown route, wrong method), in our tree."""
    if error.status_code == 405:
        return MethodNotAllowed("this method is not allowed on this URL", stage="validate")
    if error.status_code == 404:
        return NotFound("there is no such URL here", stage="validate")
    if error.status_code < 500:
        return InvalidRequest(error.detail, stage="validate")
    return Internal(error.detail)
