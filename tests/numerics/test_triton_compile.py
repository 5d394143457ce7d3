"""The Triton kernels compile for Hopper and fit into its shared memory; needs no GPU.

The interpreter takes much that the compiler refuses, so this is what says that they are Triton.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from baton.model_spec import ModelSpec, RopeSpec

SHARED_BYTES = 227 << 10  # of a thread block on compute capability 9.0
LLAMA_8B = ModelSpec(
    architecture="LlamaForCausalLM", vocab_size=128_256, hidden_size=4096,
    intermediate_size=14_336, num_layers=1, num_heads=32, num_kv_heads=8, head_dim=128,
    max_position=131_072, rms_norm_eps=1e-5, rope=RopeSpec(), qk_norm=False, qkv_bias=False,
    o_bias=False, mlp_bias=False, sliding_window=(None,), tie_word_embeddings=False,
    dtype="bfloat16",
)  # fmt: skip
ATTENTION = {"prefill", "decode_splits", "decode_reduce"}
ROWS = {"add_rms_norm", "rotate_and_write", "silu_mul", "stage_decode"}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("fields", "dtype", "block_size", "exact"),
    [
        ({}, "bfloat16", 16, False),
        ({"qk_norm": True, "qkv_bias": True, "num_kv_heads": 32}, "float16", 32, True),
        ({"head_dim": 256, "num_heads": 16, "num_kv_heads": 1}, "float32", 16, False),
    ],
)
def test_kernels_compile_and_fit(
    fields: dict[str, object], dtype: str, block_size: int, exact: bool, tmp_path: Path
) -> None:
    spec = msgspec.structs.replace(LLAMA_8B, **fields)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).with_name("compile_triton.py")
    arguments = [msgspec.json.encode(spec).decode(), dtype, str(block_size), str(exact)]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    ran = subprocess.run(
        [sys.executable, str(script), *arguments],
        env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    shared = {name: int(size) for name, size in (line.split() for line in ran.stdout.splitlines())}
    expected = ROWS | ({"prefill", "matmul"} if exact else ATTENTION)
    assert set(shared) == expected
    assert max(shared.values()) <= SHARED_BYTES, shared
