"""`baton.LLM`: the offline face of the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
from numerics.checkpoints import make_served_checkpoint

import baton
from baton.errors import ConfigError, InvalidRequest, ModelError
from baton.types import FinishReason

ENGINE = {"threads": 1, "num_kv_blocks": 64}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> baton.LLM:
    path = make_served_checkpoint(tmp_path_factory.mktemp("llm") / "model", "llama")
    return baton.LLM(path, engine=ENGINE)


def test_text_and_token_ids_give_the_same_answer(llm: baton.LLM) -> None:
    text = "hello there"
    ids = llm.tokenizer.encode(text)
    by_text, by_ids = llm.generate([text, ids])
    assert by_text.token_ids == by_ids.token_ids
    assert len(by_text.token_ids) == 16
    assert by_text.finish_reason is FinishReason.LENGTH
    assert by_text.text == llm.tokenizer.decode(by_text.token_ids)


def test_a_seed_decides_and_the_batch_does_not(llm: baton.LLM) -> None:
    drawn = baton.SamplingParams(max_tokens=24, seed=7)
    (alone,) = llm.generate(["once"], drawn)
    other = baton.SamplingParams(max_tokens=24, seed=8)
    among = llm.generate(["once", "upon", "once"], [drawn, drawn, other])
    assert among[0].token_ids == alone.token_ids
    assert among[2].token_ids != alone.token_ids


def test_a_stop_token_ends_the_answer_and_is_not_shown(llm: baton.LLM) -> None:
    greedy = baton.SamplingParams(max_tokens=16, temperature=0.0)
    (whole,) = llm.generate(["abc"], greedy)
    stop = whole.token_ids[5]
    first = whole.token_ids.index(stop)
    (cut,) = llm.generate(
        ["abc"], baton.SamplingParams(max_tokens=16, temperature=0.0, stop_token_ids=(stop,))
    )
    assert cut.token_ids == whole.token_ids[: first + 1]
    assert cut.finish_reason is FinishReason.STOP
    assert cut.text == llm.tokenizer.decode(whole.token_ids[:first])


def test_logprobs_are_of_the_chosen_tokens(llm: baton.LLM) -> None:
    (answer,) = llm.generate(
        ["abc"], baton.SamplingParams(max_tokens=4, temperature=0.0, logprobs=3)
    )
    assert [one.chosen.token_id for one in answer.logprobs] == list(answer.token_ids)
    for one in answer.logprobs:
        assert one.chosen == one.top[0]
        assert len(one.top) == 3
        assert one.top[0].logprob >= one.top[1].logprob >= one.top[2].logprob


def test_a_second_question_finds_the_first_ones_prefix(llm: baton.LLM) -> None:
    prompt = list(range(40))
    llm.generate([prompt])
    (again,) = llm.generate([prompt])
    assert again.num_cached == 32  # the full blocks before the last token


def test_bad_input_generates_nothing(llm: baton.LLM) -> None:
    steps = llm.engine.progress
    with pytest.raises(InvalidRequest, match="empty"):
        llm.generate(["good", []])
    with pytest.raises(InvalidRequest, match="temperature"):
        llm.generate(["good"], baton.SamplingParams(max_tokens=4, temperature=float("nan")))
    with pytest.raises(InvalidRequest, match="2 prompts"):
        llm.generate(["a", "b"], [baton.SamplingParams(max_tokens=4)])
    assert llm.engine.progress == steps


def test_an_unusable_model_or_option_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        baton.LLM(tmp_path / "nowhere")
    path = make_served_checkpoint(tmp_path / "model", "llama")
    with pytest.raises(ConfigError, match="max_model_len"):
        baton.LLM(path, model={"max_model_len": 4096}, engine=ENGINE)
    config = path / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "MambaForCausalLM"))
    with pytest.raises(ModelError, match="Mamba"):
        baton.LLM(path, engine=ENGINE)
