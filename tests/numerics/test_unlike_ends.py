"""Prefill and decode engines whose blocks are of other sizes and types.

Another block size changes no bit of an answer. Another type does, so there the answers are judged
as in `test_bf16`: each token where it stands, by fp32 logits; and the conversion itself is held to
torch's, number by number.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numerics.checkpoints import make_served_checkpoint
from numerics.engines import Engines
from numerics.native_kernels import kernels_named
from numerics.prompts import prompts_of_mixed_lengths
from numerics.tiny_models import reference_logits, reference_model

from baton.fabric.recut import convert

TYPES = ("bfloat16", "float16", "float32")
REQUESTS = [(prompt, 24) for prompt in prompts_of_mixed_lengths()[:16]]
OPTIONS = {"engine.max_num_batched_tokens": 96, "engine.num_kv_blocks": 800}
MARGIN = 0.75
MAX_MEAN_SHORTFALL = 0.0025


def of_role(name: str, prefill: object, decode: object) -> dict[str, dict[str, object]]:
    return {"prefill": {name: prefill}, "decode": {name: decode}}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("variant", ["llama", "qwen3-biases-windowed"])
def test_another_block_size_changes_no_bit(tmp_path: Path, variant: str, dtype: str) -> None:
    kernels_named("native")
    path = make_served_checkpoint(tmp_path / "model", variant, dtype=dtype)
    options = {**OPTIONS, "engine.kernels": "native"}
    with Engines(path, "1U", **options).running() as engines:
        expected = [(a.token_ids, a.logprobs) for a in engines.generate(REQUESTS, logprobs=5)]
    num_tokens = sum(len(prompt) for prompt, _ in REQUESTS)
    for theirs, ours in ((16, 32), (32, 16), (16, 24), (7, 16)):
        sizes = of_role("engine.block_size", theirs, ours)
        with Engines(path, "1P1D", sizes, **options).running() as engines:
            answers = engines.generate(REQUESTS, logprobs=5)
        assert [(a.token_ids, a.logprobs) for a in answers] == expected, (theirs, ours)
        counters = engines.counters("decode")
        assert counters["prompt_tokens_computed"] == 0
        assert counters["converted_blocks"] == counters["imported_blocks"] > 0
        # All came by way of the fetch, or were found by the keys of the decode worker's own size.
        came = ours * counters["converted_blocks"] + counters["prefix_hit_tokens"]
        assert came >= num_tokens


@pytest.mark.parametrize(
    ("theirs", "ours"), [(one, other) for one in TYPES for other in TYPES if one != other]
)
def test_another_type_costs_no_more_than_its_rounding(
    tmp_path: Path, theirs: str, ours: str
) -> None:
    path = make_served_checkpoint(tmp_path / "model", "llama", dtype="float32")
    roles = of_role("model.dtype", theirs, ours)
    roles["decode"]["engine.block_size"] = 24
    with Engines(path, "1P1D", roles, **OPTIONS).running() as engines:
        answers = engines.generate(REQUESTS)
    counters = engines.counters("decode")
    assert counters["prompt_tokens_computed"] == 0
    assert counters["converted_blocks"] > 0
    exact = reference_model(path)
    shortfall = []
    for (prompt, _), answer in zip(REQUESTS, answers, strict=True):
        tokens = answer.token_ids
        logits = reference_logits(exact, [*prompt, *tokens[:-1]])[len(prompt) - 1 :]
        best = logits.max(-1, keepdim=True).values
        shortfall.append(best - logits.gather(1, torch.tensor(tokens)[:, None]))
    lost = torch.cat(shortfall)
    print(f"{theirs} to {ours}: mean shortfall {lost.mean():.2g}, worst {lost.max():.2g}")
    assert lost.mean().item() < MAX_MEAN_SHORTFALL
    assert lost.max().item() < MARGIN


def bits(values: torch.Tensor) -> np.ndarray:
    """As `convert` takes and gives them: bf16 as its bits."""
    return (values.view(torch.uint16) if values.dtype is torch.bfloat16 else values).numpy()


@pytest.mark.parametrize("theirs", TYPES)
@pytest.mark.parametrize("ours", TYPES)
def test_every_number_becomes_what_torch_makes_of_it(theirs: str, ours: str) -> None:
    if theirs == "float32":
        # Every bf16 number, its neighbours, and the middles between two of fp16 or bf16.
        upper = torch.arange(1 << 16, dtype=torch.int64)[:, None] << 16
        lower = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
        every = (upper + lower).to(torch.int32).view(torch.float32).flatten()
    else:
        every = torch.arange(1 << 16).to(torch.uint16).view(getattr(torch, theirs))
    wanted = every.to(getattr(torch, ours))
    lost = wanted.isinf() & every.isfinite()
    assert lost.any() == ((theirs, ours) in LOSSY)
    found = convert(bits(every[~lost]), theirs, ours)
    assert found is not None
    is_nan = wanted[~lost].isnan().numpy()
    assert np.array_equal(found[~is_nan], bits(wanted[~lost])[~is_nan])
    back = torch.from_numpy(found[is_nan])
    assert (back.view(getattr(torch, ours)) if ours == "bfloat16" else back).isnan().all()
    if lost.any():
        assert convert(bits(every), theirs, ours) is None


LOSSY = {("float32", "float16"), ("bfloat16", "float16"), ("float32", "bfloat16")}
