"""Parsing stays cheap on hostile bodies, and ignored fields are logged once."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest

from baton.errors import InvalidRequest
from baton.gateway import intake
from baton.gateway.intake import INTERNAL_FIELDS, UNSUPPORTED_FIELDS, parse
from baton.gateway.openai import ChatRequest, CompletionRequest, SamplingFields

GOOD: dict[str, Any] = {"model": "x", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(
    "fields",
    [
        {"logit_bias": {str(number): "q" for number in range(400_000)}},
        {"messages": [{"role": "user", "content": 1}] * 200_000},
        {"messages": [{"role": "user", "content": [{"type": "x"}] * 400_000}]},
        {"stop": [1] * 400_000},
        {"stop_token_ids": ["x"] * 400_000},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_many_errors_cost_no_more_than_one(fields: dict[str, Any]) -> None:
    started = time.process_time()
    with pytest.raises(InvalidRequest):
        parse(ChatRequest, {**GOOD, **fields})
    assert time.process_time() - started < 0.2


@pytest.mark.parametrize("prompt", [["a", 1] * 400_000, [1, "a"] * 400_000, [[1], 1] * 400_000])
def test_many_errors_in_a_prompt_cost_no_more_than_one(prompt: list[Any]) -> None:
    started = time.process_time()
    with pytest.raises(InvalidRequest):
        parse(CompletionRequest, {"model": "x", "prompt": prompt})
    assert time.process_time() - started < 0.2


def test_refused_fields_are_in_no_model() -> None:
    known = {*ChatRequest.model_fields, *CompletionRequest.model_fields}
    assert not known & INTERNAL_FIELDS
    assert not known & UNSUPPORTED_FIELDS.keys()
    assert not INTERNAL_FIELDS & UNSUPPORTED_FIELDS.keys()
    assert SamplingFields.model_fields.keys() < known


def test_ignored_fields_are_logged_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "_logged", set())
    caplog.set_level(logging.INFO)
    for _ in range(2):
        parse(ChatRequest, {**GOOD, "metadata": {}, "new\nfield": 1, "tools": []})
    assert sorted(record.getMessage() for record in caplog.records) == [
        "ignored unknown request field='metadata'",
        "ignored unknown request field='new\\nfield'",
    ]
    for number in range(1000):
        parse(ChatRequest, {**GOOD, f"field {number}": 1})
    assert len(caplog.records) < 300


def test_the_clients_own_values_are_not_repeated() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(ChatRequest, {**GOOD, "temperature": "secret", "stop": ["also secret" * 1000]})
    assert "secret" not in caught.value.message
