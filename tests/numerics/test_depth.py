"""A step submitted before the one before it is read changes no token.

On the exact kernels answers at depth 2 must equal those at depth 1 in every bit, although other
sequences share their steps: with preemption, chunks, prefix hits, stop tokens, drawn answers,
penalties and log-probabilities. A handoff between two engines is part of it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from numerics.checkpoints import make_served_checkpoint
from numerics.engines import Engines
from numerics.native_kernels import kernels_named
from numerics.prompts import TINY_POOL_BLOCKS, long_requests, mixed_requests

import baton
from baton import SamplingParams
from baton.core.plan import StepPlan
from baton.engine import runner
from baton.engine.llm import Completion

ENGINE: dict[str, object] = {
    "max_num_batched_tokens": 96,
    "num_kv_blocks": TINY_POOL_BLOCKS,
    "threads": 1,
    "kernels": "native",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kernels_named("native")
    torch.set_num_threads(1)
    return make_served_checkpoint(tmp_path_factory.mktemp("depth") / "model", "llama")


@pytest.fixture
def num_unknown(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects how many tokens of each step the host did not know when it was submitted."""
    counts: list[int] = []
    submit = runner.TorchRunner.submit

    def counting(self: runner.TorchRunner, plan: StepPlan) -> None:
        counts.append(sum(chunk.start == chunk.seq.num_tokens for chunk in plan.chunks))
        submit(self, plan)

    monkeypatch.setattr(runner.TorchRunner, "submit", counting)
    return counts


def _params(i: int, max_tokens: int) -> SamplingParams:
    kinds: list[dict[str, object]] = [
        {"temperature": 0.0},
        {"temperature": 0.0, "stop_token_ids": tuple(range(0, 256, 9))},
        {"temperature": 1.0, "seed": i},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 0.8, "top_p": 0.9, "seed": i, "stop_token_ids": tuple(range(1, 256, 9))},
        {"temperature": 0.0, "logprobs": 2},
        {"temperature": 0.7, "min_tokens": 20, "seed": i, "frequency_penalty": 0.2},
    ]
    return SamplingParams(max_tokens=max_tokens, **kinds[i % len(kinds)])  # type: ignore[arg-type]


def _answers(checkpoint: Path, *, greedy: bool) -> tuple[list[Completion], dict[str, int]]:
    llm = baton.LLM(checkpoint, engine=ENGINE)
    answers = []
    for requests in (mixed_requests()[:24], long_requests()):
        params = [_params(0 if greedy else i, count) for i, (_, count) in enumerate(requests)]
        answers += llm.generate([prompt for prompt, _ in requests], params, ignore_eos=True)
    scheduler = llm.engine.scheduler
    scheduler.check()
    assert scheduler.pool.num_free == TINY_POOL_BLOCKS
    return answers, scheduler.counters


@pytest.mark.parametrize("greedy", [True, False])
def test_depth_2_gives_the_bytes_of_depth_1(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, num_unknown: list[int], greedy: bool
) -> None:
    expected, _ = _answers(checkpoint, greedy=greedy)
    assert not any(num_unknown)
    monkeypatch.setitem(runner.DEPTHS, "cpu", 2)
    answers, counters = _answers(checkpoint, greedy=greedy)
    assert sum(num_unknown) > 1000
    for ours, theirs in zip(answers, expected, strict=True):
        assert (ours.token_ids, ours.finish_reason) == (theirs.token_ids, theirs.finish_reason)
        assert ours.logprobs == theirs.logprobs
    assert counters["preemptions"] > 0
    if not greedy:
        reasons = {answer.finish_reason for answer in answers}
        assert len(reasons) == 2, "stop tokens ended nothing, or everything"


def test_handoffs_at_depth_2_give_the_same_tokens(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, num_unknown: list[int]
) -> None:
    options = {f"engine.{name}": value for name, value in ENGINE.items()}
    requests = mixed_requests(seed=2)[:16]

    def tokens() -> list[list[int]]:
        with Engines(checkpoint, "1P1D", **options).running() as engines:
            answers = engines.generate(requests)
        assert engines.counters("decode")["imported_blocks"] > 0
        return [answer.token_ids for answer in answers]

    expected = tokens()
    monkeypatch.setitem(runner.DEPTHS, "cpu", 2)
    assert tokens() == expected
    assert sum(num_unknown) > 100
