"""The official client against a real deployment, over every parameter, streaming and not.

The cases are those of `test_http_openai_client`; here a prefill and a decode worker answer them.
What only real workers can show stands below.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from faults.served import EOS, SMALL, Victim, make_model, target_of
from http_fixtures import Target
from openai import OpenAI
from test_http_bad_input import (
    http,
    test_escaped_control_characters_are_text,
)
from test_http_openai_client import (
    TestMeaning,
    chat,
    client,
    complete,
    test_chat_logprobs,
    test_completion_logprobs,
    test_default_lengths,
    test_echo,
    test_errors_are_the_clients_own_exceptions,
    test_harmless_fields_of_clients_are_ignored,
    test_many_streams_at_once,
    test_max_completion_tokens,
    test_models,
    test_prompt_token_ids,
    test_prompts_of_every_form,
    test_roles_and_text_parts,
    test_streamed_equals_unstreamed,
    tokenize,
)

__all__ = [
    "TestMeaning",
    "client",
    "http",
    "test_chat_logprobs",
    "test_completion_logprobs",
    "test_default_lengths",
    "test_echo",
    "test_errors_are_the_clients_own_exceptions",
    "test_escaped_control_characters_are_text",
    "test_harmless_fields_of_clients_are_ignored",
    "test_many_streams_at_once",
    "test_max_completion_tokens",
    "test_models",
    "test_prompt_token_ids",
    "test_prompts_of_every_form",
    "test_roles_and_text_parts",
    "test_streamed_equals_unstreamed",
]

MAX_MODEL_LEN = 320
BLOCK = 16
LONG = "The quick brown fox jumps over the lazy dog. " * 10


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    model = make_model(tmp_path_factory.mktemp("served") / "org-tiny")
    length = ("--model.max-model-len", str(MAX_MODEL_LEN))
    with Victim.start(model, "1P1D", *SMALL, *length) as deployment:
        assert isinstance(deployment, Victim)
        yield deployment


@pytest.fixture(scope="module")
def target(served: Victim) -> Target:
    return target_of(served, MAX_MODEL_LEN)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ask", [chat, complete], ids=["chat", "completions"])
def test_cached_tokens_are_those_of_the_prefill_side(
    client: OpenAI, target: Target, served: Victim, ask: Any, stream: bool
) -> None:
    text = f"{ask.__name__} {stream} {LONG}"
    said = {"messages": [{"role": "user", "content": text}]} if ask is chat else {"prompt": text}

    def hits() -> float:
        return served.counters()["prefill-0"]["prefix_hit_tokens"]

    def cached(**fields: Any) -> tuple[int, int]:
        usage = ask(client, target.model, stream, **said, **fields).usage
        return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]

    before = hits()
    num_prompt, first = cached()
    assert num_prompt > 4 * BLOCK
    assert first % BLOCK == 0
    assert first < num_prompt - 2 * BLOCK  # a beginning may be shared with other tests
    assert cached() == (num_prompt, (num_prompt - 1) // BLOCK * BLOCK)
    # Each prompt counts once, however many choices it has.
    assert cached(n=3) == (num_prompt, (num_prompt - 1) // BLOCK * BLOCK)
    assert hits() - before == first + 4 * ((num_prompt - 1) // BLOCK * BLOCK)


def test_decode_workers_compute_no_prompt(client: OpenAI, target: Target, served: Victim) -> None:
    complete(client, target.model, True, prompt=f"decode {LONG}")
    counters = served.counters()
    assert counters["prefill-0"]["prompt_tokens_computed"] > 0
    assert counters["decode-0"].get("prompt_tokens_computed", 0) == 0
    assert counters["decode-0"]["imported_blocks"] > 0
    assert counters["prefill-0"]["tokens_generated"] > 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_first_token_that_is_the_last(client: OpenAI, target: Target, stream: bool) -> None:
    """It ends on the prefill worker, and there is no handoff."""
    fields = {"logit_bias": {str(EOS): 100}, "return_token_ids": True}
    answer = complete(client, target.model, stream, **fields)
    assert (answer.token_ids, answer.finish, answer.texts) == ([[EOS]], ["stop"], [""])
    # With a minimum, the end comes from the decode worker.
    answer = complete(client, target.model, stream, **fields, min_tokens=5)
    assert (len(answer.token_ids[0]), answer.finish) == (6, ["stop"])
    assert EOS not in answer.token_ids[0][:5]
    # A token to stop at is one to stop at even where the end of sequence is not.
    answer = complete(client, target.model, stream, **fields, ignore_eos=True)
    assert (answer.token_ids, answer.finish) == ([[EOS] * 24], ["length"])


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_across_the_border_of_the_two_workers(
    client: OpenAI, target: Target, stream: bool
) -> None:
    """Every piece of the answer's beginning is a stop string once: of one token and of several."""
    whole = complete(client, target.model, stream, ignore_eos=True, return_token_ids=True)
    text = whole.texts[0]
    for start in range(4):
        for end in range(start + 1, start + 5):
            stop = text[start:end]
            answer = complete(client, target.model, stream, ignore_eos=True, stop=[stop])
            assert (answer.texts, answer.finish) == ([text[: text.index(stop)]], ["stop"])


def test_logprobs_are_those_of_the_model(client: OpenAI, target: Target) -> None:
    """The chosen token of a greedy answer is the likeliest, on both workers; sums stay below 1."""
    tokens = tokenize(target, "Hello, world!")
    answer = client.completions.create(
        model=target.model, prompt=tokens, max_tokens=12, temperature=0, logprobs=5,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )  # fmt: skip
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs and logprobs.top_logprobs
    for chosen, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert chosen == pytest.approx(max(top.values()), abs=1e-5)
    # The same tokens, asked for one at a time as a prompt, have the same log-probabilities.
    ids: list[int] = answer.choices[0].token_ids  # type: ignore[attr-defined]
    for number in (1, 5, 11):
        one = client.completions.create(
            model=target.model, prompt=[*tokens, *ids[:number]], max_tokens=1, temperature=0,
            logprobs=1, extra_body={"ignore_eos": True},
        )  # fmt: skip
        found = one.choices[0].logprobs
        assert found is not None and found.token_logprobs
        assert found.token_logprobs[0] == pytest.approx(logprobs.token_logprobs[number], abs=1e-3)


@pytest.mark.parametrize("ask", [chat, complete], ids=["chat", "completions"])
def test_choices_differ_and_come_again_by_seed(client: OpenAI, target: Target, ask: Any) -> None:
    fields = {"n": 8, "temperature": 1.0, "seed": 42, "ignore_eos": True, "return_token_ids": True}
    first = ask(client, target.model, True, **fields)
    assert len({tuple(ids) for ids in first.token_ids}) == 8
    assert ask(client, target.model, False, **fields).token_ids == first.token_ids
    assert ask(client, target.model, False, **{**fields, "n": 3}).token_ids == first.token_ids[:3]
