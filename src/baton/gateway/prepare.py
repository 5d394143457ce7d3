"""From a parsed request to the work of its choices: prompts tokenized, every bound checked.

The gateway mints the ids here; no client names one. The choices of one prompt share an id and
differ in `choice`, so (seed, choice, position) draws each token; every prompt of a list has an id
of its own, and so the answer that it would have alone.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from baton.errors import InvalidRequest, Unavailable
from baton.gateway.choice import TextOptions
from baton.gateway.dispatch import Dispatcher, ServedModel
from baton.gateway.limits import MAX_CHOICES, Limits
from baton.gateway.openai import ChatRequest, CompletionRequest, SamplingFields
from baton.gateway.problems import ContextLengthExceeded
from baton.text.chat_template import ChatTemplate
from baton.text.tokenizer import Tokenizer
from baton.types import SEED_MASK, Request, SamplingParams

R = TypeVar("R")

_DEFAULT_COMPLETION_TOKENS = 16  # as OpenAI's /v1/completions has it


class Tenant(msgspec.Struct, frozen=True):
    """Whose request it is; `salt` keeps tenants' cached blocks apart."""

    name: str = ""
    salt: bytes = b""


class Work(msgspec.Struct, frozen=True):
    """`requests`: one a choice, in the order that clients see. `echo`: the text to show before
    each prompt's answers (empty strings without echo). `n`: choices for each prompt."""

    requests: tuple[Request, ...]
    options: TextOptions
    echo: tuple[str, ...]
    n: int

    @property
    def prompts(self) -> tuple[tuple[int, ...], ...]:
        return tuple(request.prompt for request in self.requests[:: self.n])


class Preparer(msgspec.Struct, frozen=True):
    """Turns requests into work, for one model."""

    dispatcher: Dispatcher
    tokenizer: Tokenizer
    template: ChatTemplate | None
    limits: Limits

    async def completion(
        self, base_id: str, request: CompletionRequest, tenant: Tenant, deadline_s: float
    ) -> Work:
        """`base_id` begins the id of every request that the work consists of.

        Raises:
        InvalidRequest: `param` names the field.
        Unavailable: no worker has told what it serves.
        """
        model = self.served_model()
        n = request.n or 1
        texts, prompts = await self._completion_prompts(request.prompt)
        if len(prompts) * n > MAX_CHOICES:
            raise InvalidRequest(
                f"{len(prompts)} prompts with n = {n} make {len(prompts) * n} choices; at most"
                f" {MAX_CHOICES} are allowed",
                stage="validate",
                param="n" if n > 1 else "prompt",
            )
        echo = tuple("" for _ in prompts)
        if request.echo:
            skip = request.skip_special_tokens is not False
            decoded = (self.tokenizer.decode(ids, skip) for ids in prompts)
            echo = texts if texts is not None else tuple(decoded)
        params = [
            self._sampling(
                request, model, ids, "prompt", "max_tokens", request.max_tokens, request.logprobs
            )
            for ids in prompts
        ]
        return self._work(base_id, request, prompts, params, echo, tenant, deadline_s)

    async def chat(
        self, base_id: str, request: ChatRequest, tenant: Tenant, deadline_s: float
    ) -> Work:
        """Raises: as `completion`."""
        model = self.served_model()
        prompt = await self.chat_prompt([m.to_template() for m in request.messages])
        wanted, name = request.max_completion_tokens, "max_completion_tokens"
        if wanted is None:
            wanted, name = request.max_tokens, "max_tokens"
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        params = self._sampling(request, model, prompt, "messages", name, wanted, logprobs)
        return self._work(base_id, request, (prompt,), [params], ("",), tenant, deadline_s)

    async def chat_prompt(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool = True
    ) -> tuple[int, ...]:
        template = self.template
        if template is None:
            raise InvalidRequest(
                "this model has no chat template, so it cannot take chat messages; send a prompt"
                " to /v1/completions instead",
                stage="validate",
                param="messages",
            )

        def encode() -> tuple[int, ...]:
            text = template.render(messages, add_generation_prompt=add_generation_prompt)
            return tuple(self.tokenizer.encode(text, add_special_tokens=False, param="messages"))

        prompt = await self._off_loop(encode, sum(len(m["content"]) for m in messages))
        if not prompt:
            raise InvalidRequest(
                "the messages make an empty prompt", stage="validate", param="messages"
            )
        return prompt

    async def text_prompt(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        return await self._off_loop(
            lambda: tuple(self.tokenizer.encode(text, add_special_tokens)), len(text)
        )

    async def detokenize(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return await self._off_loop(
            lambda: self.tokenizer.decode(tokens, skip_special_tokens), len(tokens)
        )

    def served_model(self) -> ServedModel:
        model = self.dispatcher.model()
        if model is None:
            reason = self.dispatcher.readiness().reason or "no worker has said hello yet"
            raise Unavailable(f"not ready: {reason}", stage="gateway", retry_after_s=1.0)
        return model

    async def _completion_prompts(
        self, prompt: str | list[int] | list[str] | list[list[int]]
    ) -> tuple[tuple[str, ...] | None, tuple[tuple[int, ...], ...]]:
        """(the prompts' texts if they came as text, their token ids)."""
        if isinstance(prompt, str):
            return (prompt,), (await self.text_prompt(prompt),)
        texts: list[str] = []
        ids: list[tuple[int, ...]] = []
        flat: list[int] = []
        for item in prompt:
            if isinstance(item, str):
                texts.append(item)
            elif isinstance(item, list):
                ids.append(tuple(item))
            else:
                flat.append(item)
        if texts:

            def encode() -> tuple[tuple[int, ...], ...]:
                return tuple(tuple(self.tokenizer.encode(text)) for text in texts)

            encoded = await self._off_loop(encode, sum(len(text) for text in texts))
            return tuple(texts), encoded
        return None, tuple(ids) if ids else (tuple(flat),)

    async def _off_loop(self, function: Callable[[], R], num_chars: int) -> R:
        if num_chars <= self.limits.inline_chars:
            return function()
        return await asyncio.to_thread(function)

    def _sampling(
        self,
        request: SamplingFields,
        model: ServedModel,
        prompt: tuple[int, ...],
        prompt_param: str,
        max_tokens_param: str,
        max_tokens: int | None,
        logprobs: int | None,
    ) -> SamplingParams:
        room = model.max_model_len - len(prompt)
        if room < 1:
            raise ContextLengthExceeded(
                f"{prompt_param} has {len(prompt)} tokens; this model's context is"
                f" {model.max_model_len} tokens, of which at least one is for the answer",
                stage="validate",
                param=prompt_param,
            )
        if not prompt:
            raise InvalidRequest("the prompt is empty", stage="validate", param=prompt_param)
        if max(prompt) >= model.vocab_size:
            raise InvalidRequest(
                f"the prompt names token {max(prompt)}; the vocabulary has {model.vocab_size}",
                stage="validate",
                param=prompt_param,
            )
        if max_tokens is None:
            default = _DEFAULT_COMPLETION_TOKENS if prompt_param == "prompt" else room
            max_tokens = min(max(default, request.min_tokens or 0), room)
        elif max_tokens > room:
            raise ContextLengthExceeded(
                f"{max_tokens_param} = {max_tokens} and a prompt of {len(prompt)} tokens do not"
                f" fit into this model's context of {model.max_model_len} tokens; at most {room}"
                " are left",
                stage="validate",
                param=max_tokens_param,
            )
        seed = request.seed if request.seed is not None else secrets.randbits(64)
        eos = () if request.ignore_eos else self.tokenizer.eos_token_ids
        known_eos = tuple(token for token in eos if token < model.vocab_size)
        params = SamplingParams(
            max_tokens=max_tokens,
            seed=seed & SEED_MASK,
            temperature=_given(request.temperature, 1.0),
            top_p=_given(request.top_p, 1.0),
            top_k=max(request.top_k or 0, 0),
            min_p=_given(request.min_p, 0.0),
            repetition_penalty=_given(request.repetition_penalty, 1.0),
            presence_penalty=_given(request.presence_penalty, 0.0),
            frequency_penalty=_given(request.frequency_penalty, 0.0),
            logit_bias={int(key): bias for key, bias in (request.logit_bias or {}).items()},
            logprobs=logprobs,
            min_tokens=request.min_tokens or 0,
            stop_token_ids=tuple(dict.fromkeys((*(request.stop_token_ids or ()), *known_eos))),
        )
        try:
            params.validate(model.vocab_size)
        except InvalidRequest as error:
            raise InvalidRequest(error.message, stage="validate", param=error.param) from None
        return params

    def _work(
        self,
        base_id: str,
        request: SamplingFields,
        prompts: tuple[tuple[int, ...], ...],
        params: list[SamplingParams],
        echo: tuple[str, ...],
        tenant: Tenant,
        deadline_s: float,
    ) -> Work:
        n = request.n or 1
        requests = []
        for number, (prompt, sampling) in enumerate(zip(prompts, params, strict=True)):
            requests += [
                Request(
                    id=f"{base_id}.{number}",
                    prompt=prompt,
                    sampling=sampling,
                    choice=choice,
                    deadline_s=deadline_s,
                    tenant=tenant.name,
                    salt=tenant.salt,
                )
                for choice in range(n)
            ]
        stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
        options = TextOptions(
            stop=stop,
            include_stop=bool(request.include_stop_str_in_output),
            skip_special_tokens=request.skip_special_tokens is not False,
            stop_token_ids=frozenset(params[0].stop_token_ids),
            min_tokens=request.min_tokens or 0,
            continues=isinstance(request, CompletionRequest),
        )
        return Work(tuple(requests), options, echo, n)


def _given(value: float | None, default: float) -> float:
    """0 is a value; only null means the default."""
    return default if value is None else float(value)
