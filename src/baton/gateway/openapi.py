"""The served OpenAPI document, built from the types that parse requests and make replies."""

from __future__ import annotations

from typing import Any

import msgspec
from pydantic.json_schema import models_json_schema

from baton import __version__
from baton.gateway import openai, replies
from baton.gateway.problems import ErrorReply

_REF = "#/components/schemas/"
_REQUESTS = (
    openai.CompletionRequest,
    openai.ChatRequest,
    openai.TokenizeRequest,
    openai.DetokenizeRequest,
)
_REPLIES = (
    replies.Completion,
    replies.ChatCompletion,
    replies.ModelList,
    replies.Model,
    replies.Tokens,
    replies.Detokenized,
    replies.Status,
    ErrorReply,
)
_PROBLEMS = {
    "400": "The request is wrong; `param` names the field.",
    "401": "The API key is missing or not accepted.",
    "404": "There is no such model or URL.",
    "405": "The URL does not take this method.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "429": "Too much is in flight; Retry-After tells when to try again.",
    "500": "A fault of the server.",
    "502": "KV could not be moved between workers.",
    "503": "No worker can take the request, or its worker was lost.",
    "504": "The deadline passed.",
}


def document(with_keys: bool) -> dict[str, Any]:
    """The OpenAPI 3.1 document; `with_keys`: the server asks for API keys."""
    schemas: dict[str, Any] = {}
    _, requests = models_json_schema(
        [(model, "validation") for model in _REQUESTS], ref_template=_REF + "{model}"
    )
    schemas.update(requests["$defs"])
    _, components = msgspec.json.schema_components(_REPLIES, ref_template=_REF + "{name}")
    schemas.update(components)
    text = ("Answered by the workers.", ("400", "404", "408", "413", "415", "429"))
    result: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Baton", "version": __version__},
        "paths": {
            "/v1/models": {"get": _operation("list_models", replies.ModelList)},
            "/v1/models/{model_id}": {
                "get": {
                    **_operation("get_model", replies.Model, problems=("404",)),
                    "parameters": [
                        {
                            "name": "model_id",
                            "in": "path",
                            "required": True,
                            "schema": {"type": "string", "minLength": 1},
                        }
                    ],
                }
            },
            "/v1/completions": {
                "post": _operation(
                    "create_completion", replies.Completion, openai.CompletionRequest, text[1], True
                )
            },
            "/v1/chat/completions": {
                "post": _operation(
                    "create_chat_completion",
                    replies.ChatCompletion,
                    openai.ChatRequest,
                    text[1],
                    True,
                )
            },
            "/tokenize": {
                "post": _operation("tokenize", replies.Tokens, openai.TokenizeRequest, text[1])
            },
            "/detokenize": {
                "post": _operation(
                    "detokenize", replies.Detokenized, openai.DetokenizeRequest, text[1]
                )
            },
            "/health": {"get": {**_operation("health", replies.Status), "security": []}},
            "/ready": {"get": _operation("ready", replies.Status)},
        },
        "components": {"schemas": schemas},
    }
    if with_keys:
        result["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        result["security"] = [{"key": []}]
    return result


def _operation(
    name: str,
    reply: type[msgspec.Struct],
    request: type[openai.Fields] | None = None,
    problems: tuple[str, ...] = (),
    streams: bool = False,
) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": _schema(reply.__name__)}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    responses: dict[str, Any] = {"200": {"description": "The answer.", "content": content}}
    for status in (*problems, "401", "405", "500", "502", "503", "504"):
        responses[status] = {
            "description": _PROBLEMS[status],
            "content": {"application/json": _schema(ErrorReply.__name__)},
        }
    operation: dict[str, Any] = {"operationId": name, "responses": responses}
    if request is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": _schema(request.__name__)},
        }
    return operation


def _schema(name: str) -> dict[str, Any]:
    return {"schema": {"$ref": _REF + name}}
