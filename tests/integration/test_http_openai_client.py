"""The official client against a gateway, over every parameter, streaming and not."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from http_fixtures import Target
from openai import OpenAI

CHAT = [{"role": "user", "content": "What does os.path.join do?"}]
PROMPT = "What does os.path.join do?"
# Greedy, so that an answer can be asked for twice.
BASE: dict[str, Any] = {"temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def client(target: Target) -> Iterator[OpenAI]:
    with OpenAI(
        base_url=target.root + "/v1", api_key=target.api_key, max_retries=0, timeout=60
    ) as client:
        yield client


class Answer:
    """One answer, streamed or not, in one form."""

    def __init__(self, num_choices: int) -> None:
        self.texts = [""] * num_choices
        self.finish: list[str | None] = [None] * num_choices
        self.token_ids: list[list[int]] = [[] for _ in range(num_choices)]
        self.logprobs: list[list[Any]] = [[] for _ in range(num_choices)]
        self.usage: Any = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Answer) and vars(self) == vars(other)

    def __repr__(self) -> str:
        return repr(vars(self))


def chat(client: OpenAI, model: str, stream: bool, **fields: Any) -> Answer:
    extra, plain = split(fields)
    num_choices = plain.get("n") or 1
    answer = Answer(num_choices)
    asked = {"model": model, "messages": CHAT, "extra_body": extra, **plain}
    if not stream:
        whole = client.chat.completions.create(**asked)
        assert whole.id.startswith("chatcmpl-")
        assert [choice.index for choice in whole.choices] == list(range(num_choices))
        for choice in whole.choices:
            assert choice.message.role == "assistant"
            answer.texts[choice.index] = choice.message.content or ""
            answer.finish[choice.index] = choice.finish_reason
            answer.token_ids[choice.index] = getattr(choice, "token_ids", [])
            if choice.logprobs is not None:
                answer.logprobs[choice.index] = [e.model_dump() for e in choice.logprobs.content]
        answer.usage = whole.usage.model_dump()
        return answer
    ids, seen = set(), set()
    for chunk in client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ):
        assert answer.usage is None
        ids.add(chunk.id)
        if not chunk.choices:
            answer.usage = chunk.usage.model_dump()
        for choice in chunk.choices:
            assert chunk.usage is None
            assert answer.finish[choice.index] is None
            assert (choice.delta.role == "assistant") == (choice.index not in seen)
            seen.add(choice.index)
            answer.texts[choice.index] += choice.delta.content or ""
            answer.finish[choice.index] = choice.finish_reason
            answer.token_ids[choice.index] += getattr(choice, "token_ids", [])
            if choice.logprobs is not None:
                answer.logprobs[choice.index] += [e.model_dump() for e in choice.logprobs.content]
    assert len(ids) == 1
    return answer


def complete(client: OpenAI, model: str, stream: bool, **fields: Any) -> Answer:
    extra, plain = split(fields)
    asked = {"model": model, "prompt": PROMPT, "extra_body": extra, **plain}
    prompts = asked["prompt"]
    many = isinstance(prompts, list) and isinstance(prompts[0], str | list)
    answer = Answer((plain.get("n") or 1) * (len(prompts) if many else 1))
    if not stream:
        whole = client.completions.create(**asked)
        assert whole.id.startswith("cmpl-")
        parts = [whole]
        answer.usage = whole.usage.model_dump()
    else:
        parts = list(
            client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        )
        assert len({part.id for part in parts}) == 1
        *parts, last = parts
        assert last.choices == []
        answer.usage = last.usage.model_dump()
    for part in parts:
        assert part.choices
        for choice in part.choices:
            assert answer.finish[choice.index] is None
            answer.texts[choice.index] += choice.text
            answer.finish[choice.index] = choice.finish_reason
            answer.token_ids[choice.index] += getattr(choice, "token_ids", [])
            if choice.logprobs is not None:
                lps = choice.logprobs
                answer.logprobs[choice.index] += list(
                    zip(
                        lps.tokens, lps.token_logprobs, lps.top_logprobs, lps.text_offset,
                        strict=True,
                    )
                )  # fmt: skip
    return answer


EXTRAS = {
    "top_k", "min_p", "repetition_penalty", "min_tokens", "stop_token_ids", "ignore_eos",
    "return_token_ids", "skip_special_tokens", "include_stop_str_in_output",
}  # fmt: skip


def split(fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(fields that the client knows only as `extra_body`, the others)."""
    fields = {**BASE, **fields}
    return (
        {name: value for name, value in fields.items() if name in EXTRAS},
        {name: value for name, value in fields.items() if name not in EXTRAS},
    )


BOTH = [
    {},
    {"n": 3},
    {"n": 2, "temperature": 1.0, "seed": 7},
    {"seed": -5, "temperature": 0.7},
    {"stop": "e"},
    {"stop": ["a", "e", " "]},
    {"stop": ["e"], "include_stop_str_in_output": True},
    {"stop": ["not in any answer"]},
    {"max_tokens": 1},
    {"top_p": 0.5, "temperature": 1.5, "seed": 1},
    {"top_k": 3, "temperature": 1.0, "seed": 1},
    {"top_k": -1},
    {"min_p": 0.2, "temperature": 1.0, "seed": 1},
    {"presence_penalty": 1.5},
    {"frequency_penalty": -1.5},
    {"repetition_penalty": 1.3},
    {"logit_bias": {"70": 5, "71": -100}},
    {"logit_bias": {"70": 100}},
    {"min_tokens": 10},
    {"ignore_eos": True},
    {"stop_token_ids": [70, 71, 72]},
    {"return_token_ids": True},
    {"skip_special_tokens": False},
    {"stop": None, "seed": None, "logit_bias": None, "n": None, "top_p": None},
]


@pytest.mark.parametrize("ask", [chat, complete], ids=["chat", "completions"])
@pytest.mark.parametrize("fields", BOTH, ids=str)
def test_streamed_equals_unstreamed(
    client: OpenAI, target: Target, ask: Any, fields: dict[str, Any]
) -> None:
    whole = ask(client, target.model, False, **fields)
    streamed = ask(client, target.model, True, **fields)
    # What the cache held may differ between the two.
    whole.usage.pop("prompt_tokens_details")
    streamed.usage.pop("prompt_tokens_details")
    assert streamed == whole
    assert set(whole.finish) <= {"stop", "length"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ask", [chat, complete], ids=["chat", "completions"])
class TestMeaning:
    def test_usage(self, client: OpenAI, target: Target, ask: Any, stream: bool) -> None:
        answer = ask(client, target.model, stream, n=2, return_token_ids=True)
        usage = answer.usage
        assert usage["completion_tokens"] == sum(len(ids) for ids in answer.token_ids)
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        assert 0 <= cached <= usage["prompt_tokens"]

    def test_max_tokens(self, client: OpenAI, target: Target, ask: Any, stream: bool) -> None:
        answer = ask(client, target.model, stream, max_tokens=5, ignore_eos=True)
        assert answer.usage["completion_tokens"] == 5
        assert answer.finish == ["length"]

    def test_forced_token(self, client: OpenAI, target: Target, ask: Any, stream: bool) -> None:
        fields = {"max_tokens": 4, "logit_bias": {"70": 100}, "return_token_ids": True}
        assert ask(client, target.model, stream, **fields).token_ids == [[70] * 4]
        answer = ask(client, target.model, stream, **fields, stop_token_ids=[70])
        assert (answer.token_ids, answer.finish) == ([[70]], ["stop"])
        assert answer.texts == [""]
        answer = ask(client, target.model, stream, **fields, stop_token_ids=[70], min_tokens=4)
        assert len(answer.token_ids[0]) == 4

    def test_seed(self, client: OpenAI, target: Target, ask: Any, stream: bool) -> None:
        def texts(**fields: Any) -> tuple[str, ...]:
            return tuple(ask(client, target.model, stream, temperature=1.5, n=2, **fields).texts)

        assert texts(seed=11) == texts(seed=11)
        assert len(set(texts(seed=11))) == 2
        assert texts(seed=11) != texts(seed=12)
        assert texts() != texts()

    def test_stop(self, client: OpenAI, target: Target, ask: Any, stream: bool) -> None:
        [text] = ask(client, target.model, stream, max_tokens=40, ignore_eos=True).texts
        middle = len(text) // 2
        stop = text[middle : middle + 3]
        fields = {"max_tokens": 40, "ignore_eos": True, "stop": ["@@not there@@", stop]}
        answer = ask(client, target.model, stream, **fields)
        assert (answer.texts, answer.finish) == ([text[: text.index(stop)]], ["stop"])
        answer = ask(client, target.model, stream, **fields, include_stop_str_in_output=True)
        assert answer.texts == [text[: text.index(stop) + 3]]


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(client: OpenAI, target: Target, stream: bool) -> None:
    answer = chat(
        client, target.model, stream, logprobs=True, top_logprobs=3, return_token_ids=True
    )
    entries = answer.logprobs[0]
    assert len(entries) == len(answer.token_ids[0]) == answer.usage["completion_tokens"]
    for entry in entries:
        assert -9999 <= entry["logprob"] <= 0
        assert len(entry["top_logprobs"]) == 3
        ranked = [top["logprob"] for top in entry["top_logprobs"]]
        assert ranked == sorted(ranked, reverse=True)
    shown = chat(client, target.model, stream, skip_special_tokens=False, logprobs=True)
    joined = b"".join(bytes(entry["bytes"]) for entry in shown.logprobs[0])
    if shown.finish == ["length"]:
        assert joined.decode("utf-8", "replace") == shown.texts[0]
    assert all(entry["top_logprobs"] == [] for entry in shown.logprobs[0])
    assert chat(client, target.model, stream, logprobs=False).logprobs == [[]]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wanted", [0, 2])
def test_completion_logprobs(client: OpenAI, target: Target, stream: bool, wanted: int) -> None:
    answer = complete(client, target.model, stream, logprobs=wanted, ignore_eos=True)
    entries = answer.logprobs[0]
    assert len(entries) == answer.usage["completion_tokens"] == 24
    offsets = [entry[3] for entry in entries]
    assert offsets[0] == 0
    assert offsets == sorted(offsets)
    assert offsets[-1] <= len(answer.texts[0])
    for token, logprob, top, _ in entries:
        assert wanted <= len(top) <= wanted + 1
        assert top[token] == logprob


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_of_every_form(client: OpenAI, target: Target, stream: bool) -> None:
    tokens = tokenize(target, PROMPT)
    other = tokenize(target, "Another one")
    one = complete(client, target.model, stream)
    assert complete(client, target.model, stream, prompt=tokens).texts == one.texts
    two = complete(client, target.model, stream, prompt="Another one")
    both = [*one.texts, *two.texts]
    asked = complete(client, target.model, stream, prompt=[PROMPT, "Another one"])
    assert asked.texts == both
    assert asked.usage["prompt_tokens"] == len(tokens) + len(other)
    assert complete(client, target.model, stream, prompt=[tokens, other]).texts == both
    # Choices of one prompt stand together, and each is what its prompt gives alone.
    fields = {"temperature": 1.0, "seed": 5, "n": 2}
    alone = [complete(client, target.model, stream, prompt=p, **fields) for p in (tokens, other)]
    together = complete(client, target.model, stream, prompt=[tokens, other], **fields)
    assert together.texts == alone[0].texts + alone[1].texts


@pytest.mark.parametrize("stream", [False, True])
def test_echo(client: OpenAI, target: Target, stream: bool) -> None:
    plain = complete(client, target.model, stream, prompt=[PROMPT, "Another one"], n=2)
    echoed = complete(client, target.model, stream, prompt=[PROMPT, "Another one"], n=2, echo=True)
    prompts = [PROMPT, PROMPT, "Another one", "Another one"]
    assert echoed.texts == [p + t for p, t in zip(prompts, plain.texts, strict=True)]
    # A stop string in the prompt does not end the answer.
    assert (
        complete(client, target.model, stream, echo=True, stop=PROMPT).texts[0].startswith(PROMPT)
    )


def tokenize(target: Target, text: str) -> list[int]:
    with OpenAI(base_url=target.root, api_key=target.api_key) as client:
        reply: Any = client.post("/tokenize", cast_to=object, body={"prompt": text})
        tokens: list[int] = reply["tokens"]
        assert reply["count"] == len(tokens)
        assert reply["max_model_len"] == target.max_model_len
        back: Any = client.post(
            "/detokenize",
            cast_to=object,
            body={"tokens": tokens, "skip_special_tokens": True},
        )
        assert back["prompt"] == text
        return tokens


def test_max_completion_tokens(client: OpenAI, target: Target) -> None:
    fields: dict[str, Any]
    for fields in ({"max_tokens": None}, {"max_tokens": 3}):
        answer = chat(
            client, target.model, False, max_completion_tokens=3, ignore_eos=True, **fields
        )
        assert answer.usage["completion_tokens"] == 3


def test_default_lengths(client: OpenAI, target: Target) -> None:
    answer = complete(client, target.model, False, max_tokens=None, ignore_eos=True)
    assert answer.usage["completion_tokens"] == 16
    answer = chat(client, target.model, False, max_tokens=None, ignore_eos=True)
    assert answer.usage["total_tokens"] == target.max_model_len


def test_prompt_token_ids(client: OpenAI, target: Target) -> None:
    extra = {"return_token_ids": True}
    whole = client.completions.create(
        model=target.model, prompt=PROMPT, max_tokens=2, extra_body=extra
    )
    tokens = tokenize(target, PROMPT)
    assert whole.choices[0].prompt_token_ids == tokens  # type: ignore[attr-defined]
    whole_chat: Any = client.chat.completions.create(
        model=target.model,
        messages=CHAT,
        max_tokens=2,
        extra_body=extra,  # type: ignore[arg-type]
    )
    assert len(whole_chat.prompt_token_ids) == whole_chat.usage.prompt_tokens
    first: Any = next(
        iter(
            client.chat.completions.create(
                model=target.model,
                messages=CHAT,
                max_tokens=2,
                extra_body=extra,
                stream=True,  # type: ignore[arg-type, call-overload]
            )
        )
    )
    assert first.prompt_token_ids == whole_chat.prompt_token_ids


def test_roles_and_text_parts(client: OpenAI, target: Target) -> None:
    def ask(*messages: Any) -> Any:
        return client.chat.completions.create(
            model=target.model, messages=messages, max_tokens=8, temperature=0
        )

    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    split_up = ask(
        {"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}
    )
    joined = ask(
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "one\ntwo"}
    )
    assert split_up.choices[0].message.content == joined.choices[0].message.content
    assert split_up.usage.prompt_tokens == joined.usage.prompt_tokens


def test_harmless_fields_of_clients_are_ignored(client: OpenAI, target: Target) -> None:
    whole = client.chat.completions.create(
        model=target.model,
        messages=CHAT,  # type: ignore[arg-type]
        max_tokens=2,
        user="somebody",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        parallel_tool_calls=False,
        tools=[],
        response_format={"type": "text"},
        extra_body={"some_new_field": 1, "best_of": 1, "suffix": None, "ignore_eos": True},
    )
    assert whole.choices[0].finish_reason == "length"


def test_models(client: OpenAI, target: Target) -> None:
    [model] = client.models.list().data
    assert model.id == target.model
    assert client.models.retrieve(target.model).id == target.model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nothing")
    assert caught.value.code == "model_not_found"


def test_errors_are_the_clients_own_exceptions(client: OpenAI, target: Target) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=target.model, prompt="x", temperature=3)
    assert (caught.value.param, caught.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nothing", prompt="x")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")


def test_many_streams_at_once(client: OpenAI, target: Target) -> None:
    def ask(number: int) -> Answer:
        return chat(client, target.model, number % 2 == 0, seed=number // 2, temperature=1.0)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(32)))
    for even, odd in zip(answers[::2], answers[1::2], strict=True):
        assert even.texts == odd.texts
