"""Each CPU kernel against fp64, for every instruction set that this machine has; and their bits.

"Exact" means here: a row's bits do not depend on the other rows, nor on the number of threads.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from numerics.attention_pool import Pool, error, random
from numerics.native_kernels import ON_THIS_KIND, available, kernels_named

from baton.errors import ConfigError
from baton.model.native import (
    DTYPES,
    Kernels,
    LayerArgs,
    Packed,
    StepArgs,
    choose_kernels,
    find_kernels,
)
from baton.model.rope import inverse_frequencies, rotate
from baton.model_spec import ModelSpec, RopeSpec

DTYPE_NAMES = ["bfloat16", "float32"]
# Of the norm of the error to the norm of the result. The second holds for results rounded to bf16:
# half a unit in the last of 8 places.
SUMS = 2e-6
ROUNDED = {torch.float32: 1e-6, torch.bfloat16: 2.5e-3}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=ON_THIS_KIND)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    found = kernels_named(request.param)
    assert found is not None
    return found


@pytest.fixture(params=DTYPE_NAMES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return getattr(torch, request.param)


# Linear


@pytest.mark.parametrize(
    ("n", "k"),
    [(1, 1), (16, 2), (32, 64), (33, 63), (95, 129), (129, 96), (512, 160)],
)
def test_linear_equals_fp64(kernels: Kernels, dtype: torch.dtype, n: int, k: int) -> None:
    weight, bias = random(n, k, dtype=dtype), random(n, dtype=dtype, seed=1)
    packed, biased = Packed(kernels, weight.clone()), Packed(kernels, weight.clone(), bias)
    for m in (*range(1, 71), 513):
        x, residual = random(m, k, dtype=dtype, seed=2), random(m, n, dtype=dtype, seed=3)
        product = x.double() @ weight.double().T
        assert error(kernels.linear(x, packed, wide=True), product) < SUMS
        found = kernels.linear(x, biased, residual)
        assert found.dtype == dtype
        assert error(found, product + bias.double() + residual.double()) < ROUNDED[dtype]


@pytest.mark.parametrize(("n", "k"), [(64, 256), (95, 129)])
def test_a_row_of_linear_is_the_same_in_any_company(
    kernels: Kernels, dtype: torch.dtype, n: int, k: int
) -> None:
    x, packed = random(513, k, dtype=dtype), Packed(kernels, random(n, k, dtype=dtype, seed=1))
    whole = kernels.linear(x, packed, wide=True)
    for size in (1, 2, 3, 5, 12, 13, 14, 15, 16, 31, 64, 200):
        parts = [kernels.linear(part.contiguous(), packed, wide=True) for part in x.split(size)]
        assert torch.equal(torch.cat(parts), whole), size
    torch.set_num_threads(3)
    assert torch.equal(kernels.linear(x, packed, wide=True), whole)
    # A column is the same in a panel's last lanes and in a narrower matrix, too.
    weight = random(n, k, dtype=dtype, seed=1)
    narrow = kernels.linear(x, Packed(kernels, weight[: n - 9].clone()), wide=True)
    assert torch.equal(narrow, whole[:, : n - 9])


@pytest.mark.parametrize("n", [8192, 8193])
def test_large_results_are_those_of_their_rows(
    kernels: Kernels, dtype: torch.dtype, n: int
) -> None:
    """Past some size a kernel may write them another way."""
    x, weight = random(300, 32, dtype=dtype), random(n, 32, dtype=dtype, seed=1)
    for bias in (None, random(n, dtype=dtype, seed=2)):
        packed = Packed(kernels, weight.clone(), bias)
        whole = kernels.linear(x, packed)
        assert whole.nbytes > 4 << 20
        parts = [kernels.linear(part.contiguous(), packed) for part in x.split(37)]
        assert torch.equal(torch.cat(parts), whole)


def test_packing_keeps_every_weight(kernels: Kernels, dtype: torch.dtype) -> None:
    for n, k in ((64, 32), (70, 33), (1, 1), (96, 50)):
        weight = random(n, k, dtype=dtype)
        packed = Packed(kernels, weight.clone())
        ids = torch.randint(n, (200,), generator=torch.Generator().manual_seed(0))
        assert torch.equal(kernels.embed(packed, ids), weight[ids])


def test_packing_takes_no_memory_where_the_shape_allows(kernels: Kernels) -> None:
    weight = random(64, 32, dtype=torch.bfloat16)
    assert Packed(kernels, weight).memory is weight


# Rows


@pytest.mark.parametrize("width", [1, 15, 16, 17, 64, 100, 1536])
def test_norm_and_gate_equal_fp64(kernels: Kernels, dtype: torch.dtype, width: int) -> None:
    x, weight = random(9, width, dtype=dtype), random(width, dtype=dtype, seed=1)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert error(kernels.rms_norm(x, weight, 1e-5), expected) < ROUNDED[dtype]
    both = 6 * random(9, 2 * width, dtype=dtype, seed=2)
    gate, up = both.double().chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up
    assert error(kernels.silu_mul(both), expected) < ROUNDED[dtype]


def test_the_exponential_holds_over_its_whole_range(kernels: Kernels) -> None:
    """Through silu, which is x / (1 + e^-x)."""
    gate = torch.cat([torch.linspace(-87, 87, 10_001), torch.tensor([0.0, -0.0, 1e-30, -1e-30])])
    both = torch.stack([gate, torch.ones_like(gate)], dim=1)
    found = kernels.silu_mul(both).flatten().double()
    expected = gate.double() / (1 + torch.exp(-gate.double()))
    assert ((found - expected).abs() <= 1e-6 * expected.abs() + 1e-37).all()
    extremes = torch.tensor([[-1e4, 1.0], [1e4, 1.0], [math.nan, 1.0], [-math.inf, 1.0]])
    low, high, nan, _ = kernels.silu_mul(extremes).flatten().tolist()
    assert abs(low) < 1e-30
    assert high == 1e4
    assert math.isnan(nan)


def test_rounding_to_bf16_is_torchs(kernels: Kernels) -> None:
    """A product with the unit matrix shows how sums are rounded: ties, infinity, NaN."""
    bits = torch.arange(0x3F800000, 0x3F840000, 0x1000, dtype=torch.int32)
    x = bits.view(torch.float32)
    high, low = x.bfloat16(), (x - x.bfloat16().float()).bfloat16()
    # high + low is x, exactly: a weight of ones adds them.
    pairs = torch.stack([high, low], dim=1).contiguous()
    ones = Packed(kernels, torch.ones((32, 2), dtype=torch.bfloat16))
    found = kernels.linear(pairs, ones)[:, 0]
    assert torch.equal(found, (high.float() + low.float()).bfloat16())
    odd = torch.tensor([[math.nan, 0.0], [math.inf, 0.0], [3.4e38, 3.4e38]]).bfloat16()
    nan, inf, over = kernels.linear(odd, ones)[:, 0].tolist()
    assert math.isnan(nan)
    assert inf == over == math.inf


def test_rows_are_the_same_in_any_company(kernels: Kernels, dtype: torch.dtype) -> None:
    x, weight = random(70, 100, dtype=dtype), random(100, dtype=dtype)
    for function in (lambda x: kernels.rms_norm(x, weight, 1e-6), kernels.silu_mul):
        whole = function(x)
        alone = torch.cat([function(row[None].contiguous()) for row in x])
        assert torch.equal(alone, whole)
        torch.set_num_threads(3)
        assert torch.equal(function(x), whole)
        torch.set_num_threads(1)


def test_angles_equal_fp64_of_the_fp32_product(kernels: Kernels) -> None:
    frequencies = inverse_frequencies(RopeSpec(), 24)
    positions = torch.tensor([0, 1, 2, 511, 131_071])
    cos, sin = kernels.angles(frequencies, positions, 1.25)
    angles = (positions[:, None].float() * frequencies).double()
    torch.testing.assert_close(cos.double(), angles.cos() * 1.25, atol=2e-7, rtol=0)
    torch.testing.assert_close(sin.double(), angles.sin() * 1.25, atol=2e-7, rtol=0)


# Attention


@pytest.mark.parametrize("window", [None, 1, 20, 64, 100])
@pytest.mark.parametrize("dim", [2, 16, 24, 64, 80, 256])
def test_attention_equals_fp64(
    kernels: Kernels, dtype: torch.dtype, dim: int, window: int | None
) -> None:
    pool = Pool(dtype, [1, 7, 64, 150], dim)
    parts = [(i, 0, len(q)) for i, q in enumerate(pool.q)]
    for which, found in enumerate(pool.attend(kernels, parts, window)):
        assert error(found, pool.expected(which, window)) < ROUNDED[dtype]


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("dim", [24, 64, 128])
def test_a_token_attends_alike_in_any_chunk_and_company(
    kernels: Kernels, dtype: torch.dtype, dim: int, window: int | None
) -> None:
    length = 200
    pool = Pool(dtype, [length, 1, 33, 70], dim)
    (whole,) = pool.attend(kernels, [(0, 0, length)], window)
    cuts = [(1,) * length, (64, 64, 72), (63, 1, 1, 135), (7,) * 28 + (4,), (199, 1)]
    others = [(1, 0, 1), (2, 30, 33), (3, 0, 70)]
    for sizes in cuts:
        assert sum(sizes) == length
        found, at = [], 0
        for i, size in enumerate(sizes):
            torch.set_num_threads(1 + i % 3)
            company = others[: i % 4]
            found.append(pool.attend(kernels, [*company, (0, at, at + size)], window)[-1])
            at += size
        assert torch.equal(torch.cat(found), whole), sizes[:4]


@pytest.mark.parametrize("window", [None, 700])
def test_a_long_context_comes_out_alike_however_it_is_shared_out(
    kernels: Kernels, dtype: torch.dtype, window: int | None
) -> None:
    """Over several segments, which many threads take apart, by KV heads and along the context."""
    length = 1100
    pool = Pool(dtype, [length, 300], 32, block_size=16)
    torch.set_num_threads(2)
    (whole,) = pool.attend(kernels, [(0, 0, length)], window)
    assert error(whole, pool.expected(0, window)) < ROUNDED[dtype]
    for end in (511, 512, 513, 1024, 1025, length):
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            (alone,) = pool.attend(kernels, [(0, end - 1, end)], window)
            assert torch.equal(alone, whole[end - 1 : end]), (end, threads)
            parts = [(1, 299, 300), (0, end - 5, end), (1, 0, 40)]
            _, several, _ = pool.attend(kernels, parts, window)
            assert torch.equal(several, whole[end - 5 : end]), (end, threads)


def test_attention_does_not_depend_on_block_size(kernels: Kernels, dtype: torch.dtype) -> None:
    found = []
    for block_size in (1, 8, 16, 100):
        pool = Pool(dtype, [150], 64, block_size)
        found += pool.attend(kernels, [(0, 0, 150)], None)
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dim", [2, 24, 64, 80])
def test_rotation_and_write_equal_fp64(
    kernels: Kernels, dtype: torch.dtype, dim: int, norm: bool
) -> None:
    heads, kv_heads, tokens, block_size = 3, 2, 5, 4
    qkv = random(tokens, heads + 2 * kv_heads, dim, dtype=dtype)
    before = qkv.clone().double()
    positions = torch.tensor([3, 4, 5, 0, 70])
    slots = torch.tensor([3, 4, 5, 8, 14])
    cos, sin = kernels.angles(inverse_frequencies(RopeSpec(), dim), positions, 1.0)
    weights = [random(dim, dtype=dtype, seed=i) for i in (1, 2)]
    pool = torch.full((4, 2, 2, block_size, kv_heads, dim), math.nan, dtype=dtype)
    layer = LayerArgs(
        q_norm=weights[0].data_ptr() if norm else 0, k_norm=weights[1].data_ptr() if norm else 0
    )
    step = StepArgs(
        tokens=tokens,
        slots=slots.data_ptr(),
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        kv=pool.data_ptr(),
        block_stride=pool.stride(0),
        block_size=block_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        eps=1e-6,
        qkv=qkv.data_ptr(),
        dtype=DTYPES[dtype],
        threads=1,
    )
    kernels.table.rope_write(layer, step, 1)
    q, k, v = before.split([heads, kv_heads, kv_heads], 1)
    if norm:
        q, k = (
            x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
            for x, weight in ((q, weights[0]), (k, weights[1]))
        )
    turn = cos.double()[:, None], sin.double()[:, None]
    assert error(qkv[:, :heads], rotate(q, *turn)) < ROUNDED[dtype]
    written = pool[slots // block_size, 1, :, slots % block_size]
    assert error(written[:, 0], rotate(k, *turn)) < ROUNDED[dtype]
    assert torch.equal(written[:, 1], qkv[:, heads + kv_heads :])
    assert torch.equal(written[:, 1].double(), v)
    assert pool.isfinite().sum() == 2 * tokens * kv_heads * dim  # nothing else was touched


# Choice


def spec(**fields: object) -> ModelSpec:
    usual: dict[str, object] = {
        "architecture": "LlamaForCausalLM",
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_layers": 1,
        "num_heads": 1,
        "num_kv_heads": 1,
        "head_dim": 8,
        "max_position": 8,
        "rms_norm_eps": 1e-6,
        "rope": RopeSpec(),
        "qk_norm": False,
        "qkv_bias": False,
        "o_bias": False,
        "mlp_bias": False,
        "sliding_window": (None,),
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    return ModelSpec(**(usual | fields))  # type: ignore[arg-type]


def test_kernels_are_here_where_they_can_be_built() -> None:
    """So that a broken build is a failure, and not a suite that skips itself."""
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler here")
    assert "portable" in available()


def test_the_best_instruction_set_is_chosen() -> None:
    if not available():
        pytest.skip("no kernels here")
    found = choose_kernels("auto", spec(), "bfloat16", "cpu")
    assert found is not None
    assert found.isa == available()[0]
    assert found.numerics == f"exact-v2-{found.isa}"
    assert choose_kernels("torch", spec(), "bfloat16", "cpu") is None


@pytest.mark.parametrize(
    ("fields", "dtype", "device", "message"),
    [
        ({}, "float16", "cpu", "float16"),
        ({}, "bfloat16", "cuda", "engine.device is cuda"),
        ({"head_dim": 512}, "bfloat16", "cpu", "head sizes"),
    ],
)
def test_what_the_kernels_cannot_do_runs_on_torch(
    fields: dict[str, object], dtype: str, device: str, message: str
) -> None:
    assert choose_kernels("auto", spec(**fields), dtype, device) is None
    with pytest.raises(ConfigError, match=message):
        choose_kernels("native", spec(**fields), dtype, device)


@pytest.mark.parametrize("content", [None, b"not a library"])
def test_without_a_library_torch_serves(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "_kernels.so"
    if content is not None:
        library.write_bytes(content)
    monkeypatch.setattr("baton.model.native._LIBRARY", library)
    find_kernels.cache_clear()
    try:
        assert choose_kernels("auto", spec(), "bfloat16", "cpu") is None
        with pytest.raises(ConfigError, match="not installed" if content is None else "loaded"):
            choose_kernels("native", spec(), "bfloat16", "cpu")
    finally:
        find_kernels.cache_clear()
