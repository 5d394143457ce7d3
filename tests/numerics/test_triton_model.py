"""The GPU's body of the model against the torch body and against itself.

`recorded` keeps what a graph would: the fixed inputs and outputs, in a batch size's bucket.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from numerics.by_hand import Handmade, Sequence_, random_prompt
from numerics.tiny_models import VOCAB_SIZE, make_checkpoint
from numerics.triton_here import DEVICE, error
from torch import Tensor

from baton.model.bodies import TritonKernels
from baton.model.cuda_layers import CudaLayers
from baton.model.loader import load_weights
from baton.model_spec import load_model_spec

pytestmark = pytest.mark.usefixtures("one_thread")

VARIANTS = ["llama-mha-biases-tied", "qwen3-biases-windowed"]
# Of the logits; in bf16 both bodies round after every step, and not at the same places.
NEAR = {"float32": 1e-5, "bfloat16": 3e-2}


@pytest.fixture(scope="module", params=VARIANTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp(request.param), request.param, num_hidden_layers=2, layer_types=None
    )


class Recorder:
    """A `Capture` that says what was recorded, and gives the same memory at every replay."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.recorded += 1
        fixed = run().clone()

        def replay() -> Tensor:
            self.replayed += 1
            return fixed.copy_(run())

        return replay


def load(path: Path, dtype: str, exact: bool, recorder: Recorder | None = None) -> Handmade:
    ours = Handmade.load(path, dtype, DEVICE, kernels=TritonKernels(exact, "3.6", "here"))
    if recorder is not None:
        spec = load_model_spec(path)
        weights = load_weights(path, spec, dtype, DEVICE)
        ours.model._layers = CudaLayers(spec, weights, exact, recorder)
    return ours


def run(model: Handmade, prompts: list[list[int]], cuts: list[int]) -> Tensor:
    """Prefill up to the cuts, then a mixed step, then decode together to the prompts' end."""
    sequences = [Sequence_(prompt) for prompt in prompts]
    logits = [model.step(list(zip(sequences, cuts, strict=True)))]
    logits.append(model.step([(s, n) for s, n in zip(sequences, (1, 5, 1), strict=True)], True))
    logits += [model.step([(s, 1) for s in sequences]) for _ in range(3)]
    model.release(*sequences)
    return torch.cat(logits)


PROMPTS = [random_prompt(n, VOCAB_SIZE, seed=1) for n in (44, 38, 7)]
CUTS = [40, 30, 3]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_the_torch_body(checkpoint: Path, dtype: str, exact: bool) -> None:
    recorder = Recorder()
    found = run(load(checkpoint, dtype, exact, recorder), PROMPTS, CUTS)
    expected = run(Handmade.load(checkpoint, dtype, DEVICE), PROMPTS, CUTS)
    assert expected.std() > 0.5, "the model is degenerate; nothing would be tested"
    assert found.dtype == torch.float32
    assert error(found, expected.double()) < NEAR[dtype]
    assert (recorder.recorded, recorder.replayed) == (1, 3)  # of 5 steps 3 are decode, padded to 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_exact_mode_no_bit_depends_on_the_batch(checkpoint: Path, dtype: str) -> None:
    ours = load(checkpoint, dtype, exact=True)
    prompt = random_prompt(24, VOCAB_SIZE, seed=2)

    def logits(sizes: list[int], others: int = 0) -> Tensor:
        one, parts = Sequence_(prompt), []
        company = [Sequence_(random_prompt(9 + i, VOCAB_SIZE, seed=3)) for i in range(others)]
        for i, size in enumerate(sizes):
            chunks = [(one, size)] + [(s, 1 + 4 * (i == 0)) for s in company]
            parts.append(ours.step(chunks, every=True)[:size])
        ours.release(one, *company)
        return torch.cat(parts)

    whole = logits([24])
    assert whole.std() > 0.5
    for sizes, others in (([23, 1], 0), ([9, 1, 14], 0), ([21, 1, 1, 1], 2)):
        assert torch.equal(logits(sizes, others), whole), sizes


def test_padding_writes_into_no_block(checkpoint: Path) -> None:
    ours = load(checkpoint, "float32", exact=False, recorder=Recorder())
    sequences = [Sequence_(random_prompt(9, VOCAB_SIZE, seed=4 + i)) for i in range(3)]
    ours.step([(s, 8) for s in sequences])
    before = ours.kv.data.clone()
    ours.step([(s, 1) for s in sequences])  # 3 rows in a bucket of 4
    changed = (ours.kv.data != before) & ~(ours.kv.data.isnan() & before.isnan())
    where = changed.flatten(1).any(1).nonzero().flatten().tolist()
    assert sorted(where) == sorted(s.table[1] for s in sequences)
    assert changed.any(-1).any(-1).sum() == 3 * 2 * 2  # one slot each, K and V of two layers


def test_a_decode_row_that_is_not_sampled_is_left_out(checkpoint: Path) -> None:
    ours = load(checkpoint, "float32", exact=False)
    sequences = [Sequence_(random_prompt(6, VOCAB_SIZE, seed=6 + i)) for i in range(3)]
    ours.step([(s, 5) for s in sequences])
    kept: list[Tensor] = []
    forward = ours.model.forward

    def without_the_second(batch, kv):
        kept.append(forward(batch, kv).clone())
        batch.sample_rows = torch.tensor([0, 2], device=DEVICE)
        return forward(batch, kv)

    ours.model.forward = without_the_second
    found = ours.step([(s, 1) for s in sequences])
    assert torch.equal(found, kept[0][[0, 2]])


def test_recording_beforehand_leaves_nothing_to_record(checkpoint: Path) -> None:
    recorder = Recorder()
    ours = load(checkpoint, "float32", exact=False, recorder=recorder)
    before = ours.kv.data.clone()
    ours.model.prepare(ours.kv, 9)
    assert recorder.recorded == 5  # 1, 2, 4, 8, 16
    assert torch.equal(ours.kv.data.isnan(), before.isnan()), "recording wrote into the pool"
    sequences = [Sequence_([1 + i, 2]) for i in range(9)]
    ours.step([(s, 2) for s in sequences])
    for n in (1, 3, 9):
        for s in sequences[:n]:
            s.tokens.append(5)
        ours.step([(s, 1) for s in sequences[:n]])
    assert (recorder.recorded, recorder.replayed) == (5, 3)
