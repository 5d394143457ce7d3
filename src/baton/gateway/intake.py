"""From a JSON object to a typed request, or a refusal that names the field.

Three kinds of fields are in no model. *Internal* ones steer Baton's own machinery and are refused:
a client that could name a store, a lease or a request id could read another's cache. *Unsupported*
ones change what the answer means, so ignoring them would be a lie. All others are ignored, and
logged once each.
"""

from __future__ import annotations

import logging
from typing import Any, TypeVar

from pydantic import ValidationError

from baton.errors import InvalidRequest
from baton.gateway.limits import MAX_MESSAGES
from baton.gateway.openai import ChatRequest, CompletionRequest, Fields, SamplingFields
from baton.gateway.problems import UnsupportedParameter

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Fields)

INTERNAL_FIELDS = frozenset(
    {
        "alone",
        "attempt",
        "bootstrap_host",
        "bootstrap_port",
        "bootstrap_room",
        "cache_salt",
        "choice",
        "data_parallel_rank",
        "deadline",
        "deadline_s",
        "decode_worker",
        "disagg_prefill_resp",
        "disaggregated_params",
        "ec_transfer_params",
        "emitted",
        "epoch",
        "grant",
        "grant_id",
        "hand_off",
        "handoff",
        "kv_format",
        "kv_keys",
        "kv_transfer_params",
        "lease",
        "lease_id",
        "mac",
        "nvext",
        "placement",
        "prefill_worker",
        "priority",
        "prompt_embeds",
        "request_id",
        "rid",
        "routed_dp_rank",
        "salt",
        "source",
        "tenant",
        "trace_id",
        "worker_id",
    }
)

# Field → values that mean nothing and so are let through (null always is).
UNSUPPORTED_FIELDS: dict[str, tuple[object, ...]] = {
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "function_call": ("none",),
    "functions": ([],),
    "grammar": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "json_schema": (),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "lora_path": (),
    "modalities": (["text"],),
    "prompt_logprobs": (),
    "regex": (),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "web_search_options": (),
}
_UNSUPPORTED_IN_MESSAGES = ("tool_calls", "function_call", "tool_call_id", "audio")
# Fields whose errors are told with the path inside them.
_NESTED = ("messages", "stream_options")
_MAX_LOGGED = 256
_logged: set[str] = set()


def parse(model: type[F], body: dict[str, Any]) -> F:
    """Raises:
    InvalidRequest: `param` names the field.
    """
    for field in body:
        if field in INTERNAL_FIELDS:
            raise InvalidRequest(
                f"{field} is an internal field; clients may not set it",
                stage="validate",
                param=field,
            )
    _refuse_unsupported(model, body)
    try:
        parsed = model.model_validate(body)
    except ValidationError as error:
        raise _to_invalid(error) from None
    for field in body.keys() - model.model_fields.keys() - UNSUPPORTED_FIELDS.keys():
        _log_ignored(field)
    if isinstance(parsed, SamplingFields):
        _refuse_contradictions(parsed)
    return parsed


def _refuse_unsupported(model: type[Fields], body: dict[str, Any]) -> None:
    for field, neutral in UNSUPPORTED_FIELDS.items():
        value = body.get(field)
        # 1 == True in Python, and not for a client.
        if value is None or any(value == known and type(value) is type(known) for known in neutral):
            continue
        raise UnsupportedParameter(
            f"{field} is not supported by this server", stage="validate", param=field
        )
    if issubclass(model, ChatRequest) and body.get("echo"):
        raise UnsupportedParameter(
            "echo is for /v1/completions only", stage="validate", param="echo"
        )
    messages = body.get("messages")
    if not isinstance(messages, list):
        return
    for index, message in enumerate(messages[:MAX_MESSAGES]):
        for field in _UNSUPPORTED_IN_MESSAGES:
            if isinstance(message, dict) and message.get(field) not in (None, []):
                where = f"messages[{index}].{field}"
                raise UnsupportedParameter(
                    f"{where} is not supported by this server", stage="validate", param=where
                )


def _refuse_contradictions(request: SamplingFields) -> None:
    if request.stream_options is not None and not request.stream:
        raise _invalid("stream_options needs stream: true", "stream_options")
    if isinstance(request, ChatRequest):
        tokens, completion_tokens = request.max_tokens, request.max_completion_tokens
        if None not in (tokens, completion_tokens) and tokens != completion_tokens:
            raise _invalid(
                f"max_tokens ({tokens}) and max_completion_tokens ({completion_tokens}) mean the"
                " same and differ; send one",
                "max_completion_tokens",
            )
        if request.top_logprobs is not None and not request.logprobs:
            raise _invalid("top_logprobs needs logprobs: true", "top_logprobs")
    if isinstance(request, CompletionRequest) and request.echo and request.logprobs is not None:
        raise UnsupportedParameter(
            "echo together with logprobs is not supported: the log-probabilities of the prompt"
            " are not computed",
            stage="validate",
            param="echo",
        )


def _invalid(message: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, stage="validate", param=param)


def _to_invalid(error: ValidationError) -> InvalidRequest:
    """The first of pydantic's complaints; the client's own value is never repeated."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    path = [part for part in first["loc"] if not str(part).startswith("<")]
    field = str(path[0]) if path else None
    where = field
    if field in _NESTED:
        where = field
        for part in path[1:]:
            where += f"[{part}]" if isinstance(part, int) else f".{part}"
    if first["type"] == "missing":
        return _invalid(f"{where} is required", where or "")
    reason = first["msg"].removeprefix("Value error, ").replace("Input should", "must")
    return InvalidRequest(f"{where}: {reason}", stage="validate", param=where)


def _log_ignored(field: str) -> None:
    """Once a name, and not without end: names come from clients."""
    if field not in _logged and len(_logged) < _MAX_LOGGED:
        _logged.add(field)
        log.info("ignored unknown request field=%r", field[:64])
