"""The model against transformers, and against itself in other batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from numerics.by_hand import Handmade, Sequence_, random_prompt
from numerics.native_kernels import kernels_named
from numerics.tiny_models import (
    VARIANTS,
    VOCAB_SIZE,
    make_checkpoint,
    reference_greedy,
    reference_logits,
    reference_model,
)

from baton.model.native import Kernels
from baton.model_spec import load_model_spec

TOLERANCE = 1e-4


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=list(VARIANTS))
def variant(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(variant, tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp(variant), variant)


@pytest.fixture(scope="module")
def reference(checkpoint):
    return reference_model(checkpoint)


@pytest.fixture(scope="module", params=["torch", "native"])
def kernels(request) -> Kernels | None:
    return kernels_named(request.param)


@pytest.fixture(scope="module")
def ours(checkpoint, kernels) -> Handmade:
    return Handmade.load(checkpoint, kernels=kernels)


def prompt_logits(ours: Handmade, prompt: list[int], *cuts: int) -> torch.Tensor:
    """Logits of every prompt token, computed in chunks that end at `cuts`."""
    sequence = Sequence_(prompt)
    parts = [
        ours.step([(sequence, cut - sequence.computed)], every=True) for cut in (*cuts, len(prompt))
    ]
    ours.release(sequence)
    return torch.cat(parts)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("length", [1, 7, 150, 700])
def test_prompt_logits_equal_transformers(ours, reference, length):
    prompt = random_prompt(length, VOCAB_SIZE, seed=1)
    expected = reference_logits(reference, prompt)
    assert expected.std() > 0.5, "the model is degenerate; nothing would be tested"
    assert_close(prompt_logits(ours, prompt), expected)


def test_chunks_equal_one_shot(ours):
    prompt = random_prompt(150, VOCAB_SIZE, seed=2)
    whole = prompt_logits(ours, prompt)
    # Cuts on and beside block borders, chunks of one token (which is decode), and within windows.
    for cuts in ((75,), (1, 2, 64), (63, 64, 65, 66, 149), (8, 16, 24, 32)):
        assert_close(prompt_logits(ours, prompt, *cuts), whole)


def test_mixed_batch_equals_each_alone(ours):
    # (length, tokens computed before): decode at several lengths, first and later chunks.
    shapes = [(90, 89), (40, 0), (3, 2), (300, 299), (61, 30), (1, 0), (130, 128), (25, 24)]
    prompts = [
        random_prompt(length, VOCAB_SIZE, seed=3 + i) for i, (length, _) in enumerate(shapes)
    ]
    alone = [prompt_logits(ours, prompt)[-1] for prompt in prompts]
    sequences = [Sequence_(prompt) for prompt in prompts]
    for sequence, (_, before) in zip(sequences, shapes, strict=True):
        if before:
            ours.step([(sequence, before)])
    together = ours.step([(s, len(s.tokens) - s.computed) for s in sequences])
    ours.release(*sequences)
    assert_close(together, torch.stack(alone))


def test_greedy_continuation_equals_transformers(ours, reference):
    lengths, num_tokens = (1, 5, 60), 40
    sequences = [Sequence_(random_prompt(n, VOCAB_SIZE, seed=20)) for n in lengths]
    logits = ours.step([(s, len(s.tokens)) for s in sequences])
    for _ in range(num_tokens - 1):
        for sequence, token in zip(sequences, logits.argmax(-1).tolist(), strict=True):
            sequence.tokens.append(token)
        logits = ours.step([(s, 1) for s in sequences])
    for sequence, token in zip(sequences, logits.argmax(-1).tolist(), strict=True):
        sequence.tokens.append(token)
    ours.release(*sequences)
    for sequence, length in zip(sequences, lengths, strict=True):
        found = sequence.tokens[length:]
        assert found == reference_greedy(reference, sequence.tokens[:length], num_tokens)
        assert len(set(found)) > 3, "the model is degenerate; nothing would be tested"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_fp32(checkpoint, reference, kernels, dtype):
    if kernels is not None and dtype == "float16":
        pytest.skip("fp16 runs on torch")
    half = Handmade.load(checkpoint, dtype, kernels=kernels)
    prompt = random_prompt(100, VOCAB_SIZE, seed=30)
    expected = reference_logits(reference, prompt)
    found = prompt_logits(half, prompt, 33, 34)
    assert found.dtype == torch.float32
    error = (found - expected).square().mean().sqrt() / expected.std()
    assert error < (0.1 if dtype == "bfloat16" else 0.02)


def test_parameter_and_cache_sizes(checkpoint, reference, ours):
    spec = load_model_spec(checkpoint)
    assert spec.num_parameters() == sum(p.numel() for p in reference.parameters())
    weights = Handmade.load(checkpoint).model.weights
    assert weights.nbytes() == 4 * spec.num_parameters()
    assert ours.kv.data[0].nbytes == ours.kv.block_bytes


def test_no_tensor_is_on_another_device(checkpoint):
    """On the meta device nothing is computed, but an operand left on the CPU is an error."""
    elsewhere = Handmade.load(checkpoint, device="meta")
    sequences = [Sequence_(random_prompt(60, VOCAB_SIZE, seed=40 + i)) for i in range(4)]
    elsewhere.step([(s, 10 + i) for i, s in enumerate(sequences)])
    logits = elsewhere.step([(sequences[0], 1), (sequences[1], 1), (sequences[2], 40)])
    assert logits.device.type == "meta"
    assert logits.shape == (3, VOCAB_SIZE)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_transformers(checkpoint, reference):
    ours = Handmade.load(checkpoint, device="cuda")
    prompt = random_prompt(300, VOCAB_SIZE, seed=50)
    assert_close(
        prompt_logits(ours, prompt, 150, 151, 152).cpu(), reference_logits(reference, prompt)
    )
