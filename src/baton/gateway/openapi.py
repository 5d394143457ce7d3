"""The served OpenAPI document, built from the types that parse requests and make replies.

Once the workers have told what they serve, the document has this model's own bounds.
"""

from __future__ import annotations

from typing import Any

import msgspec
from pydantic.json_schema import models_json_schema

from baton import __version__
from baton.gateway import openai, replies
from baton.gateway.dispatch import ServedModel
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
    replies.ChatChunk,
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


def document(model_name: str, served: ServedModel | None, with_keys: bool) -> dict[str, Any]:
    """The OpenAPI 3.1 document; `with_keys`: the server asks for API keys."""
    schemas: dict[str, Any] = {}
    _, requests = models_json_schema(
        [(model, "validation") for model in _REQUESTS], ref_template=_REF + "{model}"
    )
    schemas.update(requests["$defs"])
    _tighten(schemas, served)
    for model in _REQUESTS:
        _name_model(schemas[model.__name__]["properties"]["model"], model_name)
    _, components = msgspec.json.schema_components(_REPLIES, ref_template=_REF + "{name}")
    schemas.update(components)
    problems = ("400", "404", "408", "413", "415", "429")
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
                            "schema": {"type": "string", "enum": [model_name]},
                        }
                    ],
                }
            },
            "/v1/completions": {
                "post": _operation(
                    "create_completion",
                    replies.Completion,
                    openai.CompletionRequest,
                    problems,
                    stream=replies.Completion,
                )
            },
            "/v1/chat/completions": {
                "post": _operation(
                    "create_chat_completion",
                    replies.ChatCompletion,
                    openai.ChatRequest,
                    problems,
                    stream=replies.ChatChunk,
                )
            },
            "/tokenize": {
                "post": _operation("tokenize", replies.Tokens, openai.TokenizeRequest, problems)
            },
            "/detokenize": {
                "post": _operation(
                    "detokenize", replies.Detokenized, openai.DetokenizeRequest, problems
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


def _tighten(node: Any, served: ServedModel | None) -> None:
    """Put this model's own bounds in the place of the stand-ins, everywhere in `node`."""
    if served is None:
        return
    if isinstance(node, list):
        for item in node:
            _tighten(item, served)
    elif isinstance(node, dict):
        if node.get("maximum") == openai.ANY_TOKEN_ID:
            node["maximum"] = served.vocab_size - 1
        elif node.get("maximum") == openai.ANY_LENGTH:
            node["maximum"] = served.max_model_len - 1
        elif node.get("maxItems") == openai.MAX_TOKEN_IDS:
            node["maxItems"] = min(openai.MAX_TOKEN_IDS, served.max_model_len - 1)
        for value in node.values():
            _tighten(value, served)


def _name_model(schema: dict[str, Any], model_name: str) -> None:
    """Only one name is accepted, so the document says which."""
    for alternative in schema.get("anyOf", [schema]):
        if alternative.get("type") == "string":
            alternative["enum"] = [model_name]


def _operation(
    name: str,
    reply: type[msgspec.Struct],
    request: type[openai.Fields] | None = None,
    problems: tuple[str, ...] = (),
    stream: type[msgspec.Struct] | None = None,
) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": _schema(reply.__name__)}
    if stream is not None:
        content["text/event-stream"] = {"schema": _event(stream)}
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


def _event(data: type[msgspec.Struct]) -> dict[str, Any]:
    """One server-sent event; its data is JSON in a string."""
    chunk = _schema(data.__name__)["schema"]
    return {
        "type": "object",
        "description": "With `stream`: true. An error in the middle is the last event; otherwise"
        " the last one's data is `[DONE]`.",
        "properties": {
            "data": {
                "anyOf": [
                    {"type": "string", "const": "[DONE]"},
                    {
                        "type": "string",
                        "contentMediaType": "application/json",
                        "contentSchema": {"anyOf": [chunk, _schema("ErrorReply")["schema"]]},
                    },
                ]
            }
        },
        "required": ["data"],
    }


def _schema(name: str) -> dict[str, Any]:
    return {"schema": {"$ref": _REF + name}}
