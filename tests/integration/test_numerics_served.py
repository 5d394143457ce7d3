"""Real processes against transformers: 50 prompts at once, in chunks, with hits and preemption."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from integration.runs import RUN_REQUESTS, Run
from numerics.prompts import MAX_LOGPROB_ERROR
from numerics.tiny_models import reference_logits


@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", ["1U", "1P1D", "2P2D"])
def test_greedy_answers_equal_transformers(
    layout: str, mixed_run: Callable[[str], Run], tiny_reference: Any
) -> None:
    run = mixed_run(layout)
    for answer, (prompt, length) in zip(run.answers, RUN_REQUESTS, strict=True):
        assert len(answer.token_ids) == len(answer.logprobs) == length
        logits = reference_logits(tiny_reference, [*prompt, *answer.token_ids[:-1]])
        logits = logits[len(prompt) - 1 :]
        # Each token the most likely one after those before it: by induction, the greedy answer.
        assert logits.argmax(-1).tolist() == answer.token_ids
        best = torch.log_softmax(logits, -1).max(-1).values
        assert (best - torch.tensor(answer.logprobs)).abs().max() < MAX_LOGPROB_ERROR


@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", ["1U", "1P1D", "2P2D"])
def test_counters_show_which_way_the_answers_went(
    layout: str, mixed_run: Callable[[str], Run]
) -> None:
    run = mixed_run(layout)
    if layout == "1U":
        assert run.total("unified", "preemptions") > 0
        assert run.total("unified", "prefix_hit_tokens") > 0
        return
    num_workers = int(layout[0])
    assert len([name for name in run.counters if name.startswith("prefill")]) == num_workers
    assert run.total("prefill", "tokens_generated") == len(run.answers)
    assert run.total("prefill", "prompt_tokens_computed") > 0
    assert run.total("prefill", "prefix_hit_tokens") > 0
    assert run.total("decode", "preemptions") > 0
    assert run.total("decode", "prompt_tokens_computed") == 0
    assert run.total("decode", "prompt_tokens_recomputed") > 0
    for worker, events in run.counters.items():
        if worker.startswith("decode"):
            assert events["imported_blocks"] > 0
    for waterfall in run.waterfalls:
        assert waterfall["prefill_worker"].startswith("prefill")
        assert waterfall["decode_worker"].startswith("decode")
