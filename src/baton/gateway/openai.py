"""What clients may send, field by field, with types and bounds.

The models are the source of the served OpenAPI document, so what it says is what is enforced.
Parsing is strict: no "1" for 1, no 1.0 for an integer, no true for 1. Every optional field also
takes null, which means its default. Fields that are not here are the business of `intake`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from baton.gateway.limits import (
    MAX_MESSAGES,
    MAX_N,
    MAX_PROMPTS,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
)
from baton.types import MAX_LOGIT_BIAS, MAX_TOP_LOGPROBS, SEED_MASK

MAX_TOKEN_IDS = 1 << 20
# Stand-ins until the workers have told what they serve; `openapi` and `prepare` know better then.
ANY_TOKEN_ID = (1 << 31) - 1
ANY_LENGTH = 1 << 31
MAX_STOP_TOKEN_IDS = 64  # the model's own end-of-sequence ids come on top


def _one_or_many(value: object) -> str:
    return "<many>" if isinstance(value, list) else "<one>"


def _prompt_kind(value: object) -> str:
    if not isinstance(value, list):
        return "<text>"
    first = value[0] if value else None
    if isinstance(first, str):
        return "<texts>"
    return "<token_lists>" if isinstance(first, list) else "<tokens>"


def _bounded(value: object) -> object:
    """Refuse a large dict before its entries are looked at: pydantic would collect their errors."""
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"at most {MAX_LOGIT_BIAS} entries are allowed")
    return value


TokenId = Annotated[int, Field(ge=0, le=ANY_TOKEN_ID)]
Text = Annotated[str, Field(min_length=1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKEN_IDS, fail_fast=True)]
Prompt = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[TokenIds, Tag("<tokens>")]
    | Annotated[list[Text], Field(max_length=MAX_PROMPTS, fail_fast=True), Tag("<texts>")]
    | Annotated[
        list[TokenIds], Field(max_length=MAX_PROMPTS, fail_fast=True), Tag("<token_lists>")
    ],
    Discriminator(_prompt_kind),
]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Stop = Annotated[
    Annotated[StopString, Tag("<one>")]
    | Annotated[
        list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True), Tag("<many>")
    ],
    Discriminator(_one_or_many),
]
BiasKey = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
ModelName = Annotated[str, Field(min_length=1, max_length=4096)]


class Fields(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)


class StreamOptions(Fields):
    include_usage: bool | None = Field(None, description="Send a last chunk that holds the usage.")


class SamplingFields(Fields):
    """What both completion operations take."""

    model: ModelName
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_N, description="Choices for each prompt.")
    stop: Stop | None = None
    seed: int | None = Field(
        None, ge=-(1 << 63), le=SEED_MASK, description="Taken modulo 2^64; minted if not given."
    )
    max_tokens: int | None = Field(None, ge=1, le=ANY_LENGTH)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    logit_bias: (
        Annotated[
            dict[BiasKey, Bias],
            Field(max_length=MAX_LOGIT_BIAS, json_schema_extra={"additionalProperties": False}),
            BeforeValidator(_bounded),
        ]
        | None
    ) = Field(None, description="Token id (as a string) to what is added to its logit.")
    presence_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1, le=1 << 30, description="-1 and 0: off.")
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    repetition_penalty: float | None = Field(None, gt=0, le=2, allow_inf_nan=False)
    min_tokens: int | None = Field(None, ge=0, le=ANY_LENGTH)
    stop_token_ids: (
        Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)] | None
    ) = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    skip_special_tokens: bool | None = Field(None, description="True if not given.")
    include_stop_str_in_output: bool | None = None


class CompletionRequest(SamplingFields):
    prompt: Prompt
    logprobs: int | None = Field(
        None, ge=0, le=MAX_TOP_LOGPROBS, description="Alternatives to tell for each token."
    )
    echo: bool | None = Field(None, description="Put the prompt before the answer.")


class TextPart(Fields):
    type: Literal["text"]
    text: str


class ChatMessage(Fields):
    """`developer` is treated as `system`. Text parts are joined by line feeds."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("<one>")]
        | Annotated[
            list[TextPart], Field(min_length=1, max_length=1024, fail_fast=True), Tag("<many>")
        ],
        Discriminator(_one_or_many),
    ]
    name: str | None = None

    def to_template(self) -> dict[str, Any]:
        content = self.content
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": content}
        if self.name is not None:
            message["name"] = self.name
        return message


Messages = Annotated[
    list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
]


class ChatRequest(SamplingFields):
    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1, le=ANY_LENGTH)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_TOP_LOGPROBS, description="Needs `logprobs`: true."
    )


class TokenizeRequest(Fields):
    """Either `prompt` or `messages`."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}]}
    )

    model: ModelName | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(
        None, description="For `prompt`; true if not given. A chat template adds its own."
    )
    add_generation_prompt: bool | None = Field(None, description="For `messages`.")


class DetokenizeRequest(Fields):
    model: ModelName | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKEN_IDS, fail_fast=True)]
    skip_special_tokens: bool | None = Field(None, description="False if not given.")
