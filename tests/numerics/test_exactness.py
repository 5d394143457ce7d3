"""On the CPU kernels a sequence's logits have the same bits however they came about.

Alone or among others, in chunks of any size, prefilled or decoded, before and after preemption,
with any number of threads and any block size, in any layout: every test demands equality, never
closeness.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from numerics.by_hand import Handmade, Sequence_, random_prompt
from numerics.checkpoints import make_served_checkpoint
from numerics.engines import Engines
from numerics.native_kernels import ON_THIS_KIND, kernels_named
from numerics.prompts import (
    TINY_POOL_BLOCKS,
    long_requests,
    mixed_requests,
    prompts_of_mixed_lengths,
)
from torch import Tensor

import baton
from baton import SamplingParams
from baton.engine import runner
from baton.model.native import Kernels
from baton.model.sampler import SampleRow, sample

VARIANTS = ["llama", "llama-mha-biases-tied", "mistral", "qwen2", "qwen3-biases-windowed"]
VOCAB = 256


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=VARIANTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_served_checkpoint(tmp_path_factory.mktemp("exact") / "model", request.param)


@pytest.fixture(params=ON_THIS_KIND)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    found = kernels_named(request.param)
    assert found is not None
    return found


@pytest.fixture(params=["bfloat16", "float32"])
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


def logits_in_chunks(ours: Handmade, prompt: list[int], sizes: list[int]) -> Tensor:
    sequence = Sequence_(prompt)
    parts = []
    for i, size in enumerate(sizes):
        torch.set_num_threads(1 + i % 2)
        parts.append(ours.step([(sequence, size)], every=True))
    torch.set_num_threads(1)
    ours.release(sequence)
    return torch.cat(parts)


def test_chunks_and_decoding_change_no_bit(checkpoint: Path, kernels: Kernels, dtype: str) -> None:
    ours = Handmade.load(checkpoint, dtype, kernels=kernels)
    prompt = random_prompt(150, VOCAB, seed=1)
    whole = logits_in_chunks(ours, prompt, [150])
    assert whole.std() > 0.5, "the model is degenerate; nothing would be tested"
    for sizes in ([1] * 150, [64, 86], [7] * 21 + [3], [149, 1], [1, 13, 14, 15, 107]):
        assert torch.equal(logits_in_chunks(ours, prompt, sizes), whole)


def test_31_others_change_no_bit(checkpoint: Path, kernels: Kernels, dtype: str) -> None:
    ours = Handmade.load(checkpoint, dtype, kernels=kernels)
    prompt = random_prompt(40, VOCAB, seed=2)
    alone = logits_in_chunks(ours, prompt, [40])
    others = [Sequence_(random_prompt(1 + 5 * i, VOCAB, seed=3)) for i in range(31)]
    one = Sequence_(prompt)
    sequences = [*others[:13], one, *others[13:]]
    for size, torch_threads in ((20, 2), (1, 1), (19, 2)):
        torch.set_num_threads(torch_threads)
        # The others go on by one token where they can, or by many.
        chunks = [
            (s, size if s is one else min(3, len(s.tokens) - s.computed))
            for s in sequences
            if s is one or s.computed < len(s.tokens)
        ]
        found = ours.step(chunks)[[s is one for s, _ in chunks].index(True)]
        assert torch.equal(found, alone[one.computed - 1])
    ours.release(*sequences)


class Recorder:
    """Keeps the logits of every sampled row by (prompt, output so far); insists on the same."""

    def __init__(self) -> None:
        self.seen: dict[tuple[tuple[int, ...], tuple[int, ...]], Tensor] = {}
        self.num_again = 0

    def sample(self, logits: Tensor, rows: list[SampleRow], kernels: Kernels | None) -> object:
        for one, row in zip(logits, rows, strict=True):
            key = (tuple(row.prompt), tuple(row.output))
            if key in self.seen:
                self.num_again += 1
                assert torch.equal(one, self.seen[key])
            else:
                self.seen[key] = one.clone()
        return sample(logits, rows, kernels)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(runner, "sample", recorder.sample)
    return recorder


def make_llm(path: Path, dtype: str, budget: int, blocks: int, **engine: object) -> baton.LLM:
    kernels_named("native")
    return baton.LLM(
        path,
        model={"dtype": dtype},
        engine={
            "kernels": "native",
            "max_num_batched_tokens": budget,
            "num_kv_blocks": blocks,
            "threads": 1,
            **engine,
        },
    )


def test_the_engine_gives_the_same_bits_with_any_budget_and_after_preemption(
    checkpoint: Path, dtype: str, recorder: Recorder
) -> None:
    prompts = prompts_of_mixed_lengths(seed=4)[:24]
    # A penalty of no effect makes the runner pass on the output so far, which names the row.
    params = SamplingParams(max_tokens=64, temperature=0.0, presence_penalty=1e-30)
    make_llm(checkpoint, dtype, 2048, 2000, prefix_cache=False).generate(prompts, params)
    first = len(recorder.seen)
    assert first >= 24 * 64 - 64 and recorder.num_again == 0
    for budget, blocks, engine in (
        (96, 80, {}),
        (33, 180, {"block_size": 7, "threads": 2}),
    ):
        llm = make_llm(checkpoint, dtype, budget, blocks, **engine)
        llm.generate(prompts, params)
        counters = llm.engine.scheduler.counters
        assert counters["preemptions"] > 0
        assert counters["prefix_hit_tokens"] > 0
    alone = make_llm(checkpoint, dtype, 512, 100)
    for prompt in prompts[:8]:
        alone.generate([prompt], params)
    assert len(recorder.seen) == first, "some output went another way"
    assert recorder.num_again >= 2 * first


@pytest.mark.parametrize("variant", ["llama", "qwen3-biases-windowed"])
def test_every_layout_gives_the_same_bits(tmp_path: Path, variant: str) -> None:
    """In bf16: tokens and log-probabilities, which depend on every bit of a row of logits."""
    kernels_named("native")
    path = make_served_checkpoint(tmp_path / "model", variant, dtype="bfloat16")
    found = {}
    for layout, blocks, budget in (
        ("1U", 2500, 512),
        ("1U", TINY_POOL_BLOCKS, 96),
        ("1P1D", TINY_POOL_BLOCKS, 96),
        ("2P2D", TINY_POOL_BLOCKS, 70),
    ):
        options = {"engine.num_kv_blocks": blocks, "engine.max_num_batched_tokens": budget}
        with Engines(path, layout, **options, **{"engine.kernels": "native"}).running() as engines:
            answers = engines.generate(mixed_requests(), logprobs=5)
            answers += engines.generate(long_requests(), logprobs=5)
        found[layout, blocks] = [(a.token_ids, a.logprobs) for a in answers]
        if blocks == TINY_POOL_BLOCKS:
            decode = engines.counters("unified" if layout == "1U" else "decode")
            assert decode["preemptions"] > 0
            assert layout == "1U" or decode["imported_blocks"] > 0
    expected = found.pop(("1U", 2500))
    assert sum(len(tokens) for tokens, _ in expected) > 5000
    for which, answers in found.items():
        assert answers == expected, which


def test_decoding_equals_prefilling_what_was_decoded(checkpoint: Path, dtype: str) -> None:
    """Teacher-forced: the answer is handed back as a prompt, and its logits come out again."""
    prompt = random_prompt(50, VOCAB, seed=6)
    ours = Handmade.load(checkpoint, dtype, kernels=kernels_named("native"))
    sequence = Sequence_(list(prompt))
    decoded = [ours.step([(sequence, 50)])[0]]
    for _ in range(30):
        sequence.tokens.append(int(decoded[-1].argmax()))
        decoded.append(ours.step([(sequence, 1)])[0])
    again = logits_in_chunks(ours, sequence.tokens, [80])
    assert torch.equal(torch.stack(decoded), again[49:])


def test_numerics_name_the_kernels(checkpoint: Path, dtype: str) -> None:
    native = kernels_named("native")
    assert native is not None

    def numerics(kernels: str) -> str:
        llm = baton.LLM(checkpoint, model={"dtype": dtype}, engine={"kernels": kernels})
        return llm.engine.scheduler.config.numerics

    assert numerics("auto") == f"cpu-exact-v2-{native.isa}-{dtype}"
    assert numerics("torch") == f"cpu-torch-{dtype}"
