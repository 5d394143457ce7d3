"""Offline generation: the same engine, in process."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path

import msgspec

from baton.config import Config, load_config
from baton.engine.build import build_engine
from baton.engine.engine import Emitted
from baton.engine.inbox import Submit
from baton.errors import InvalidRequest, from_wire
from baton.model.hub import resolve_model
from baton.text.tokenizer import Tokenizer
from baton.types import FinishReason, Request, SampledLogprobs, SamplingParams, TokenDelta

GREEDY = SamplingParams(max_tokens=16, temperature=0.0)


class Completion(msgspec.Struct, frozen=True):
    """One answer. `logprobs` is empty unless asked for."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    num_cached: int
    logprobs: tuple[SampledLogprobs, ...] = ()


class LLM:
    """A model that answers prompts, without a server.

        llm = baton.LLM("path/to/model")
        for completion in llm.generate(["Hello"], baton.SamplingParams(max_tokens=20)):
            print(completion.text)

    Options are those of the configuration file, by section: `LLM(dir, engine={"threads": 2})`.

    Raises:
        ModelError, ConfigError: the model or an option cannot be used.
    """

    def __init__(self, model: str | Path, /, **sections: dict[str, object]) -> None:
        overrides = {
            f"{section}.{field}": value
            for section, fields in sections.items()
            for field, value in fields.items()
        }
        self.config: Config = load_config(None, {**overrides, "model.path": str(model)})
        path = resolve_model(str(model))
        self.tokenizer = Tokenizer.from_dir(path)
        self._deltas: list[TokenDelta] = []
        built = build_engine(
            self.config,
            path,
            self._collect,
            worker_id="offline",
            epoch=0,
            lease_secret=secrets.token_bytes(32),
            with_store=False,
        )
        self.engine = built.engine
        self.limits = built.limits
        self._eos_ids = built.spec.eos_ids
        self._num_requests = 0

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] = GREEDY,
        *,
        ignore_eos: bool = False,
    ) -> list[Completion]:
        """Answer all `prompts` (text or token ids) together; completions come in their order.

        The model's end-of-sequence tokens end an answer unless `ignore_eos`.

        Raises:
            InvalidRequest: a prompt or parameter cannot be served; nothing was generated.
        """
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        if len(each) != len(prompts):
            raise InvalidRequest(f"{len(prompts)} prompts, but {len(each)} sampling parameters")
        stops = () if ignore_eos else self._eos_ids
        requests = []
        for prompt, params in zip(prompts, each, strict=True):
            ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            params = msgspec.structs.replace(
                params, stop_token_ids=tuple({*params.stop_token_ids, *stops})
            )
            request = Request(f"offline-{self._num_requests}", tuple(ids), params)
            self.engine.scheduler.config.validate(request)
            self._num_requests += 1
            requests.append(request)
        for request in requests:
            self.engine.inbox.put(Submit(request))
        while self.engine.step():
            pass
        by_request: dict[str, list[TokenDelta]] = {request.id: [] for request in requests}
        for delta in self._deltas:
            by_request[delta.request_id].append(delta)
        self._deltas = []
        return [self._completion(by_request[request.id]) for request in requests]

    def _collect(self, emitted: Emitted) -> None:
        self._deltas += emitted.update.deltas

    def _completion(self, deltas: list[TokenDelta]) -> Completion:
        last = deltas[-1]
        if last.error is not None:
            raise from_wire(last.error)
        assert last.finish is not None
        token_ids = tuple(token for delta in deltas for token in delta.token_ids)
        shown = token_ids[:-1] if last.finish is FinishReason.STOP else token_ids
        return Completion(
            text=self.tokenizer.decode(shown),
            token_ids=token_ids,
            finish_reason=last.finish,
            num_cached=deltas[0].num_cached or 0,
            logprobs=tuple(one for delta in deltas for one in delta.logprobs or ()),
        )
