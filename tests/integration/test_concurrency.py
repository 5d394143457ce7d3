"""200 streams at once on the demo model: each ends once, and is what its prompt gives alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from integration.runs import NUM_STREAMS, STREAM_TOKENS, Run, stream_sampling

import baton
from baton import SamplingParams


@pytest.mark.timeout(300)
def test_each_stream_ends_exactly_once(stream_run: Run) -> None:
    assert len(stream_run.answers) == NUM_STREAMS
    for answer in stream_run.answers:
        assert len(answer.finishes) == answer.num_usages == 1
        assert answer.finishes[0] in ("stop", "length")
    waterfalls = stream_run.waterfalls
    assert len(waterfalls) == NUM_STREAMS
    assert len({waterfall["request_id"] for waterfall in waterfalls}) == NUM_STREAMS
    assert {waterfall["error"] for waterfall in waterfalls} == {None}
    ends = {
        labels: count
        for (name, labels), count in stream_run.metrics.items()
        if name == "baton_request_success_total"
    }
    assert sum(ends.values()) == NUM_STREAMS
    for reason in ("stop", "length"):
        told = sum(answer.finishes == [reason] for answer in stream_run.answers)
        assert ends.get((("finished_reason", reason),), 0) == told
        assert sum(waterfall["finish"] == reason for waterfall in waterfalls) == told
    errors = [name for name, _ in stream_run.metrics if name == "baton_request_errors_total"]
    assert not errors
    generated = sum(waterfall["num_generated_tokens"] for waterfall in waterfalls)
    assert generated == sum(len(answer.token_ids) for answer in stream_run.answers)
    assert stream_run.total("decode", "prompt_tokens_computed") == 0


@pytest.mark.timeout(300)
def test_each_stream_is_what_its_prompt_gives_alone(stream_run: Run, demo_model: Path) -> None:
    torch.set_num_threads(1)
    alone = baton.LLM(
        demo_model,
        model={"dtype": "float32"},
        engine={"threads": 1, "prefix_cache": False, "num_kv_blocks": 256},
    )
    assert len({answer.text for answer in stream_run.answers}) > NUM_STREAMS // 4
    for i, answer in enumerate(stream_run.answers):
        sampling = SamplingParams(max_tokens=STREAM_TOKENS, **stream_sampling(i))
        (expected,) = alone.generate([answer.prompt], sampling)
        assert answer.token_ids == list(expected.token_ids), f"stream {i}"
        assert answer.text == expected.text
        assert answer.finishes == [expected.finish_reason.value]
