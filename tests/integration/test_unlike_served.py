"""Whole deployments whose prefill and decode workers have blocks of other sizes and types."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from faults.served import LONG, SMALL, Victim, make_long_model, prompt_of

PROMPTS = [prompt_of(length, seed) for seed, length in enumerate((1, 15, 16, 17, 33, 200, 700))]
NUM_TOKENS = 12
TCP = ("--fabric.transport", "tcp")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_long_model(tmp_path_factory.mktemp("unlike") / "org-tiny")


@pytest.fixture(scope="module")
def expected(model: Path) -> Iterator[list[list[int]]]:
    with Victim.start(model, "1U", *SMALL) as served:
        yield [served.ask(prompt, NUM_TOKENS) for prompt in PROMPTS]


def flags_of(name: str, prefill: object, decode: object) -> tuple[str, ...]:
    return (f"--prefill.{name}", str(prefill), f"--decode.{name}", str(decode))


@pytest.mark.parametrize(("theirs", "ours", "way"), [(16, 32, ()), (24, 16, TCP)])
def test_another_block_size_changes_no_token(
    model: Path, expected: list[list[int]], theirs: int, ours: int, way: tuple[str, ...]
) -> None:
    flags = (*SMALL, *flags_of("block-size", theirs, ours), *way)
    with Victim.start(model, "1P1D", *flags) as served:
        assert [served.ask(prompt, NUM_TOKENS) for prompt in PROMPTS] == expected
        of_decode = served.counters()["decode-0"]
        check = httpx.post(f"{served.admin_url}/fabric/check", timeout=60, trust_env=False).json()
        served.until(served.is_idle)
        output = served.output
    assert of_decode["prompt_tokens_computed"] == 0
    num_came = of_decode["imported_blocks"] + of_decode["early_blocks"]
    assert of_decode["converted_blocks"] == num_came
    assert num_came == sum(-(-len(prompt) // ours) for prompt in PROMPTS)
    lost = {name for name, total in of_decode.items() if name.startswith("early_lost") and total}
    assert not lost
    assert f"name={'tcp' if way else 'shm'}" in output
    # What the workers cannot use as it is can be measured all the same.
    pairs = {(link["source"], link["reader"]) for link in check["links"]}
    assert ("prefill-0", "decode-0") in pairs
    assert [link["problem"] for link in check["links"]] == [""] * len(check["links"])


@pytest.mark.parametrize(
    ("theirs", "ours", "dtype"), [(16, 32, "float32"), (24, 16, "float32"), (16, 16, "bfloat16")]
)
def test_most_of_it_arrives_before_the_last_chunk_is_computed(
    model: Path, expected: list[list[int]], theirs: int, ours: int, dtype: str
) -> None:
    flags = (*SMALL, *LONG, *flags_of("block-size", theirs, ours), "--decode.dtype", dtype)
    with Victim.start(model, "1P1D", *flags) as served:
        tokens = served.ask(PROMPTS[-1], NUM_TOKENS)  # 44 chunks
        (waterfall,) = served.requests()
        of_decode = served.counters()["decode-0"]
    assert dtype != "float32" or tokens == expected[-1]
    num_blocks = -(-700 // ours)
    assert waterfall["num_early_blocks"] >= 0.8 * num_blocks
    assert of_decode["early_blocks"] + of_decode["imported_blocks"] == num_blocks
    assert of_decode["converted_blocks"] == num_blocks
    assert of_decode["prompt_tokens_computed"] == 0


@pytest.mark.parametrize(("theirs", "ours"), [("float32", "bfloat16"), ("bfloat16", "float16")])
def test_another_type_is_converted(model: Path, theirs: str, ours: str) -> None:
    flags = (*SMALL, *flags_of("dtype", theirs, ours), "--decode.block-size", "24")
    with Victim.start(model, "1P1D", *flags) as served:
        for prompt in PROMPTS:
            assert len(served.ask(prompt, NUM_TOKENS)) == NUM_TOKENS
        before = served.counters()["decode-0"]
        served.ask(PROMPTS[-1], NUM_TOKENS)  # as one whose KV comes from the same arithmetic
        of_decode = served.counters()["decode-0"]
    assert of_decode["prompt_tokens_computed"] == 0
    assert before["converted_blocks"] == sum(-(-len(prompt) // 24) for prompt in PROMPTS)
    assert of_decode["prefix_hit_tokens"] - before["prefix_hit_tokens"] == 700 // 24 * 24


def test_what_cannot_be_converted_ends_the_start_with_the_reason(model: Path) -> None:
    command = [sys.executable, "-m", "baton", "serve", "--model", str(model), "--layout", "1P1D"]
    command += [*SMALL, *flags_of("kernels", "native", "torch"), "--port", "0", "--admin-port", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    said = ended.stdout + ended.stderr
    assert ended.returncode == 1, said
    assert "refused this worker: its numerics is cpu-" in said
    assert "their KV cannot be converted, so give both the same" in said
    assert "cpu-torch-float32" in said
    assert "cpu-exact-" in said
