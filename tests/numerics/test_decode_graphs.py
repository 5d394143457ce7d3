"""Which decode steps are replayed in which size, and which body is chosen; no kernel runs."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import msgspec
import pytest
import torch

from baton.errors import ConfigError
from baton.model import bodies
from baton.model.batch import Batch
from baton.model.bodies import TritonKernels, choose_body
from baton.model.decode_graphs import DecodeGraphs, DecodeInputs, buckets
from baton.model_spec import ModelSpec, RopeSpec

SPEC = ModelSpec(
    architecture="LlamaForCausalLM", vocab_size=64, hidden_size=256, intermediate_size=64,
    num_layers=1, num_heads=4, num_kv_heads=2, head_dim=64, max_position=64, rms_norm_eps=1e-5,
    rope=RopeSpec(), qk_norm=False, qkv_bias=False, o_bias=False, mlp_bias=False,
    sliding_window=(None,), tie_word_embeddings=False, dtype="bfloat16",
)  # fmt: skip


def test_buckets() -> None:
    assert buckets(1) == (1,)
    assert buckets(3) == (1, 2, 4)
    assert buckets(5) == (1, 2, 4, 8)
    assert buckets(33) == (1, 2, 4, 8, 16, 24, 32, 40)
    assert buckets(256)[-1] == 256
    for n in range(1, 300):
        sizes = buckets(n)
        assert sizes[-1] >= n
        assert len(sizes) == 1 or sizes[-2] < n


def decode_batch(num_rows: int, max_blocks: int = 4) -> Batch:
    rows = torch.zeros(num_rows, dtype=torch.int64)
    tables = torch.zeros(num_rows, max_blocks, dtype=torch.int64)
    return Batch(rows, rows, rows, list(range(num_rows + 1)), [1] * num_rows, tables, rows)


def graphs() -> DecodeGraphs:
    def refuse(_: object) -> None:
        raise AssertionError("nothing is to be computed here")

    return DecodeGraphs(DecodeInputs(64, 8, torch.device("cpu")), refuse, refuse)


@pytest.mark.parametrize(
    ("rows", "bucket"), [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (57, 64), (64, 64), (65, None)]
)
def test_a_decode_batch_takes_the_next_larger_size(rows: int, bucket: int | None) -> None:
    assert graphs().bucket(decode_batch(rows)) == bucket


def test_what_is_no_recorded_step() -> None:
    mixed = decode_batch(3)
    mixed.query_starts, mixed.context_lens = [0, 1, 3], [1, 2]
    assert graphs().bucket(mixed) is None
    assert graphs().bucket(decode_batch(3, max_blocks=8)) == 4
    assert graphs().bucket(decode_batch(3, max_blocks=9)) is None, "the table is too wide"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the choice sees of a machine with a GPU and Triton; `triton` can be changed."""
    seen = SimpleNamespace(triton="3.6.0")
    monkeypatch.setattr(bodies, "triton_version", lambda: seen.triton)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return seen


@pytest.mark.parametrize("triton", ["3.6.0", "3.10.1", "4.0"])
def test_a_gpu_runs_triton(gpu: SimpleNamespace, triton: str) -> None:
    gpu.triton = triton
    expected = TritonKernels(False, triton, "sm90")
    assert choose_body("auto", SPEC, "bfloat16", "cuda") is None, "not before it has run on one"
    assert choose_body("triton", SPEC, "float16", "cuda") == expected
    assert choose_body("triton-exact", SPEC, "bfloat16", "cuda") == replace(expected, exact=True)
    assert choose_body("torch", SPEC, "bfloat16", "cuda") is None


@pytest.mark.parametrize(
    ("triton", "fields", "device", "reason"),
    [
        (None, {}, "cuda", "not installed"),
        ("3.5.1", {}, "cuda", "3.5.1 is installed"),
        ("3.6.0", {}, "cpu", "device is cpu"),
        ("3.6.0", {"head_dim": 264}, "cuda", "head sizes"),
        ("3.6.0", {"head_dim": 20}, "cuda", "head sizes"),
        ("3.6.0", {"num_heads": 130, "num_kv_heads": 2}, "cuda", "share a KV head"),
    ],
)
def test_what_triton_cannot_serve(
    gpu: SimpleNamespace, triton: str | None, fields: dict[str, int], device: str, reason: str
) -> None:
    gpu.triton = triton
    spec = msgspec.structs.replace(SPEC, **fields)
    for choice in ("triton", "triton-exact"):
        with pytest.raises(ConfigError, match=reason):
            choose_body(choice, spec, "bfloat16", device)
    if device == "cuda":
        assert choose_body("auto", spec, "bfloat16", device) is None
        with pytest.raises(ConfigError, match="run on the CPU"):
            choose_body("native", spec, "bfloat16", device)


def test_numerics_name_what_may_be_mixed() -> None:
    exact = TritonKernels(True, "3.6.0", "sm90")
    assert exact.numerics != replace(exact, triton="3.7.0").numerics
    assert exact.numerics != replace(exact, device="sm100").numerics
    assert replace(exact, exact=False).numerics == "triton"


def test_a_machine_without_a_gpu_does_without_triton() -> None:
    """The engine is imported, and none of the kernels, so that Triton need not be there."""
    program = (
        "import sys, baton.engine.build\n"
        "sys.exit(any(name.startswith('baton.model.triton_kernels') for name in sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
