"""Wire codecs: lengths, error bounds, what unused slots and odd numbers do, and equal bytes of all
bodies."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.fabric import codec, codec_native
from baton.fabric.codec import CODECS, codecs_for
from baton.fabric.codec_layout import Body, Name, layout_of
from baton.fabric.codec_numpy import NumpyBody
from baton.types import KvFormat

LOSSY: list[Name] = ["fp8", "int8", "int4"]
DTYPES = ["bfloat16", "float32"]
BODIES = ["numpy", *codec_native.ISAS]


def make_format(
    layers: int = 2, tokens: int = 16, heads: int = 2, dim: int = 32, dtype: str = "bfloat16"
) -> KvFormat:
    size = layers * 2 * tokens * heads * dim * (4 if dtype == "float32" else 2)
    return KvFormat(tokens, dtype, layers, heads, dim, size)


def to_block(x: np.ndarray[Any, Any], fmt: KvFormat) -> np.ndarray[Any, Any]:
    """Floats as a block's bytes; those of bf16 must be cut already."""
    bits = np.ascontiguousarray(x, np.float32).reshape(-1).view(np.uint32)
    return (bits if fmt.dtype == "float32" else (bits >> 16).astype(np.uint16)).view(np.uint8)


def to_floats(block: np.ndarray[Any, Any], fmt: KvFormat) -> np.ndarray[Any, Any]:
    """Elements as fp64 [layers, 2, tokens, heads, dim]."""
    if fmt.dtype == "float32":
        x = block.view(np.float32)
    else:
        x = (block.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    shape = (fmt.num_layers, 2, fmt.block_size, fmt.num_kv_heads, fmt.head_dim)
    return x.reshape(shape).astype(np.float64)


def random_block(fmt: KvFormat, seed: int = 0, kind: str = "normal") -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    count = 2 * fmt.num_layers * fmt.block_size * fmt.num_kv_heads * fmt.head_dim
    if kind == "normal":  # channels of different size, as those of keys are
        x = rng.standard_normal((count // fmt.head_dim, fmt.head_dim), np.float32)
        x *= np.exp(rng.normal(size=fmt.head_dim)).astype(np.float32)
        return to_block(x.ravel(), fmt)
    bits = rng.integers(0, 1 << 32, count, dtype=np.uint32)  # all kinds of NaN among them
    if kind == "tiny":  # around the least scales, 2^-126 to 2^-84 and denormals
        bits = bits & 0x807FFFFF | rng.integers(0, 44, count, dtype=np.uint32) << 23
    elif kind == "huge":  # around the greatest that counts
        bits = bits & 0x807FFFFF | rng.integers(240, 256, count, dtype=np.uint32) << 23
    return to_block(bits.view(np.float32), fmt)


def body_named(name: str) -> Body:
    if name == "numpy":
        return NumpyBody()
    found = codec_native.find(name)
    if found is None:
        pytest.skip(f"no {name} codecs here")
    return found


@pytest.fixture(params=BODIES)
def body(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Body:
    """Each body in turn, as what the codecs run on."""
    found = body_named(request.param)
    monkeypatch.setattr(codec, "body", lambda: found)
    return found


def encode(
    name: str, fmt: KvFormat, block: np.ndarray[Any, Any], num_tokens: int | None = None
) -> np.ndarray[Any, Any]:
    encoded = np.full(CODECS[name].encoded_bytes(fmt), 0xAA, np.uint8)
    assert CODECS[name].encode(fmt, block, encoded, num_tokens) == encoded.size
    return encoded


def decode(name: str, fmt: KvFormat, encoded: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    block = np.full(fmt.block_bytes, 0xAA, np.uint8)
    CODECS[name].decode(fmt, encoded, block)
    return block


def test_the_codecs_are_these() -> None:
    assert list(CODECS) == ["raw", "fp8", "int8", "int4"]
    assert all(codec.name == name for name, codec in CODECS.items())


@pytest.mark.parametrize(
    ("name", "num_bytes"),
    [
        # 3 layers, 16 tokens, 2 heads of 33: 6,336 elements; 66 channels, 32 heads of tokens.
        ("raw", 6336 * 2),
        ("fp8", 3 * 2 * 2 * 2 + 6336),
        ("int8", 3 * 2 * (66 + 32) + 6336),
        ("int4", 3 * 2 * 2 * (66 + 32) + 3 * 2 * 16 * 2 * 17),
    ],
)
def test_lengths(name: str, num_bytes: int) -> None:
    assert CODECS[name].encoded_bytes(make_format(3, 16, 2, 33)) == num_bytes


@settings(max_examples=150, deadline=None)
@given(
    fmt=st.builds(
        make_format,
        st.integers(1, 3),
        st.integers(1, 20),
        st.integers(1, 9),
        st.sampled_from([32, 64, 96, 128, 512]) | st.integers(1, 140),
        st.sampled_from(DTYPES),
    ),
    share=st.floats(0, 1),
    seed=st.integers(0, 1 << 32),
    kind=st.sampled_from(["normal", "any bits", "tiny", "huge"]),
    name=st.sampled_from(LOSSY),
)
@pytest.mark.parametrize("isa", codec_native.ISAS)
def test_every_body_writes_the_same_bytes(
    isa: str, fmt: KvFormat, share: float, seed: int, kind: str, name: Name
) -> None:
    native, plain = body_named(isa), NumpyBody()
    layout, used = layout_of(fmt, name), round(share * fmt.block_size)
    block = random_block(fmt, seed, kind)
    encoded = [np.full(layout.num_bytes, fill, np.uint8) for fill in (1, 2)]
    decoded = [np.full(fmt.block_bytes, fill, np.uint8) for fill in (1, 2)]
    for each, to, back in zip((native, plain), encoded, decoded, strict=True):
        each.encode(name, layout, used, block, to)
        each.decode(name, layout, to, back)
    assert np.array_equal(*encoded)
    assert np.array_equal(*decoded)
    assert np.isfinite(to_floats(decoded[0], fmt)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("offset", [0, -30.1])
def test_errors_are_within_what_the_layout_allows(
    body: Body, name: str, dtype: str, offset: float
) -> None:
    fmt = make_format(3, 16, 5, 48, dtype)
    block = to_block(to_floats(random_block(fmt), fmt) + offset, fmt)
    x = to_floats(block, fmt)
    y = to_floats(decode(name, fmt, encode(name, fmt, block)), fmt)
    error = np.abs(x - y)
    # Rounding what is decoded: half a unit in the last of 8 (24) places, and a little for the rest.
    rounding = np.abs(y) * (2.0**-8 if dtype == "bfloat16" else 2.0**-24)
    up = 1 + 2.0**-7  # scales are rounded up to bf16
    bound = np.empty_like(x)
    if name == "fp8":
        most = np.abs(x).max(axis=(2, 4), keepdims=True)
        # Half of e4m3's last place, of which a denormal has the unit 2^-9 times the scale.
        bound[:] = np.maximum(np.abs(x) * 2.0**-4, most / 224 * 2.0**-10)
    else:
        for part, axis in ((0, 1), (1, 3)):
            own = x[:, part]
            if name == "int8":
                step = np.abs(own).max(axis=axis, keepdims=True) / 127 * up
            else:
                low, high = own.min(axis=axis, keepdims=True), own.max(axis=axis, keepdims=True)
                step = (high - low + np.abs(low) * 2.0**-7) / 15 * up
            bound[:, part] = step / 2 * (1 + 1e-4)
        bound += rounding
    assert (error <= bound).all(), (error / bound).max()
    # And they are not idle: the bound is nearly met somewhere.
    assert (error / bound).max() > 0.7 or offset


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 16])
def test_unused_slots_may_hold_anything(body: Body, name: str, num_tokens: int) -> None:
    fmt = make_format()
    clean = random_block(fmt)
    x = to_floats(clean, fmt)
    for garbage in (np.nan, np.inf, 1e30, -3.4e38, 1e-40):
        x[:, :, num_tokens:] = garbage
        dirty = to_block(x, fmt)
        encoded = encode(name, fmt, dirty, num_tokens)
        assert np.array_equal(encoded, encode(name, fmt, clean, num_tokens))
        y = to_floats(decode(name, fmt, encoded), fmt)
        assert np.isfinite(y).all()
        assert np.abs(y[:, :, :num_tokens]).sum() > 0 or num_tokens == 0


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, 2.0**120, -3e38])
def test_what_is_not_finite_spoils_nothing_else(body: Body, name: str, odd: float) -> None:
    fmt = make_format()
    x = to_floats(random_block(fmt), fmt)
    places = [(0, 0, 3, 1, 5), (1, 1, 15, 0, 31)]
    for place in places:
        x[place] = 0
    without = to_floats(decode(name, fmt, encode(name, fmt, to_block(x, fmt))), fmt)
    for place in places:
        x[place] = odd
    y = to_floats(decode(name, fmt, encode(name, fmt, to_block(x, fmt))), fmt)
    assert np.isfinite(y).all()
    for place in places:
        # int4's code 0 is the group's least element.
        assert y[place] == without[place] == 0 if name != "int4" else y[place] <= 0
        y[place] = without[place] = 0
    # Zero lies within every group's range here, so nothing else may change.
    assert np.array_equal(y, without)


def test_an_outlier_is_felt_in_its_own_group_only(body: Body) -> None:
    fmt = make_format()
    block = random_block(fmt)
    x = to_floats(block, fmt)
    x[0, 0, 2, 1, 9] = x[1, 1, 4, 0, 7] = 1000.0
    groups: dict[str, list[tuple[Any, ...]]] = {
        "fp8": [(0, 0, slice(None), 1), (1, 1, slice(None), 0)],
        "int8": [(0, 0, slice(None), 1, 9), (1, 1, 4, 0)],
        "int4": [(0, 0, slice(None), 1, 9), (1, 1, 4, 0)],
    }
    for name in LOSSY:
        before = to_floats(decode(name, fmt, encode(name, fmt, block)), fmt)
        after = to_floats(decode(name, fmt, encode(name, fmt, to_block(x, fmt))), fmt)
        elsewhere = np.ones(x.shape, bool)
        for group in groups[name]:
            elsewhere[group] = False
            assert not np.array_equal(before[group], after[group])
        assert np.array_equal(before[elsewhere], after[elsewhere])


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_and_next_to_zero_and_constants(body: Body, dtype: str) -> None:
    fmt = make_format(1, 4, 1, 8, dtype)
    for value, name in itertools.product((0.0, -0.0, 1e-40, -1e-31, 2.0**-91), LOSSY):
        if name == "int4" and value == 2.0**-91:
            continue  # a group's least element is kept from 2^-100 on
        x = np.full(2 * 4 * 8, value)
        assert not to_floats(decode(name, fmt, encode(name, fmt, to_block(x, fmt))), fmt).any()
    for value in (1.0, -3.140625, 2.0**-80, 2.0**100):  # all are bf16
        block = to_block(np.full(2 * 4 * 8, value), fmt)
        assert np.array_equal(decode("int4", fmt, encode("int4", fmt, block)), block)


def test_e4m3_is_what_it_is(body: Body) -> None:
    """Its 126 positive numbers, by the definition, come back as they are; between them, nearest."""
    sizes = [
        (m / 8 if e == 0 else 1 + m / 8) * 2.0 ** (max(e, 1) - 7)
        for e in range(16)
        for m in range(8)
    ][:127]  # the last is the code of a NaN, elsewhere
    fmt = make_format(1, 1, 1, 256)
    values = np.array([*sizes, *(-size for size in sizes), 448, -448])
    x = np.stack([values, values * 2.0**20])  # K and V
    block = to_block(x, fmt)
    encoded = encode("fp8", fmt, block)
    assert np.array_equal(decode("fp8", fmt, encoded), block)
    assert encoded[4 : 4 + 127].tolist() == list(range(127))
    middles = np.array([(a + b) / 2 for a, b in itertools.pairwise(sizes)])
    even = np.array([b if i % 2 else a for i, (a, b) in enumerate(itertools.pairwise(sizes))])
    x = np.zeros((2, 256))
    x[:, :126], x[:, 126] = middles, 448
    y = to_floats(decode("fp8", fmt, encode("fp8", fmt, to_block(x, fmt))), fmt)
    assert y[0, 0, 0, 0, :126].tolist() == even.tolist()


def test_decoding_takes_any_bytes(body: Body) -> None:
    fmt = make_format(1, 5, 3, 17)
    rng = np.random.default_rng(0)
    for name, fill in itertools.product(LOSSY, (0x00, 0x7F, 0x80, 0xFF, None)):
        size = CODECS[name].encoded_bytes(fmt)
        noise = rng.integers(0, 256, size, dtype=np.uint8)
        decode(name, fmt, noise if fill is None else np.full(size, fill, np.uint8))


def test_nothing_beyond_the_encoded_bytes_is_touched_and_buffers_may_start_anywhere(
    body: Body,
) -> None:
    fmt = make_format(2, 7, 3, 33)
    block = random_block(fmt)
    for name in CODECS:
        size = CODECS[name].encoded_bytes(fmt)
        expected = encode(name, fmt, block)
        for shift in (1, 2, 3):
            source = np.zeros(block.size + 8, np.uint8)[shift : shift + block.size]
            source[:] = block
            room = np.full(size + 70, 0x55, np.uint8)
            written = CODECS[name].encode(fmt, source, room[shift:])
            assert written == size
            assert np.array_equal(room[shift : shift + size], expected)
            assert (room[:shift] == 0x55).all() and (room[shift + size :] == 0x55).all()
            back = np.full(block.size + 70, 0x55, np.uint8)
            target = back[shift : shift + block.size]
            CODECS[name].decode(fmt, room[shift : shift + size], target)
            assert np.array_equal(target, decode(name, fmt, expected))
            assert (back[:shift] == 0x55).all() and (back[shift + block.size :] == 0x55).all()


def test_any_buffer_will_do(body: Body) -> None:
    fmt = make_format()
    block = random_block(fmt)
    for name in CODECS:
        encoded = encode(name, fmt, block)
        for source in (block.tobytes(), bytearray(block), memoryview(block)):
            assert np.array_equal(encode(name, fmt, source), encoded)
        target = bytearray(block.size)
        CODECS[name].decode(fmt, encoded, target)
        assert bytes(target) == decode(name, fmt, encoded).tobytes()


def test_raw_keeps_every_bit() -> None:
    fmt = make_format()
    block = random_block(fmt, kind="any bits")
    assert np.array_equal(decode("raw", fmt, encode("raw", fmt, block)), block)


@pytest.mark.parametrize("name", CODECS)
def test_wrong_lengths_are_refused(body: Body, name: str) -> None:
    fmt = make_format()
    own = CODECS[name]
    block, encoded = random_block(fmt), encode(name, fmt, random_block(fmt))
    for wrong in (block[:-1], block[:-2], np.append(block, block[:2]), block[:0]):
        with pytest.raises(ValueError, match="bytes"):
            own.encode(fmt, wrong, encoded)
        with pytest.raises(ValueError, match="bytes"):
            own.decode(fmt, encoded, wrong.copy())
    with pytest.raises(ValueError, match="room"):
        own.encode(fmt, block, encoded[:-1])
    for wrong in (encoded[:-1], np.append(encoded, encoded[:1]), encoded[:0]):
        with pytest.raises(ValueError, match="bytes"):
            own.decode(fmt, wrong, block.copy())
    for num_tokens in (-1, 17):
        with pytest.raises(ValueError, match="slots"):
            own.encode(fmt, block, encoded, num_tokens)
    kept = block.tobytes(), encoded.tobytes()
    with pytest.raises(ValueError, match="read-only"):
        own.encode(fmt, np.roll(block, 2), np.frombuffer(kept[1], np.uint8))
    with pytest.raises(ValueError, match="read-only"):
        own.decode(fmt, np.roll(encoded, 2), memoryview(kept[0]))
    assert kept == (block.tobytes(), encoded.tobytes())
    with pytest.raises(ValueError, match="contiguous"):
        own.encode(fmt, np.append(block, block)[::2], encoded)


def test_blocks_that_cannot_be_taken() -> None:
    half = KvFormat(16, "float16", 2, 2, 32, 8192)
    assert list(codecs_for(half)) == ["raw"]
    assert list(codecs_for(make_format(dim=513))) == ["raw"]
    assert list(codecs_for(make_format(dim=512))) == list(CODECS)
    with pytest.raises(ValueError, match="float16"):
        CODECS["int8"].encoded_bytes(half)
    with pytest.raises(ValueError, match="no block"):
        CODECS["raw"].encoded_bytes(KvFormat(16, "int8", 2, 2, 32, 8192))


@pytest.mark.parametrize("broken", ["missing", "damaged", "another version"])
def test_without_the_library_numpy_serves_and_the_log_says_so(
    broken: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if broken == "another version":
        if codec_native.best() is None:
            pytest.skip("no codecs here")
        monkeypatch.setattr(codec_native, "VERSION", 999)
    else:
        file = tmp_path / "_codec.so"
        if broken == "damaged":
            file.write_bytes(b"not a library")
        monkeypatch.setattr(codec_native, "_LIBRARY", file)
    codec_native.find.cache_clear()
    try:
        with caplog.at_level(logging.INFO):
            assert codec.body.__wrapped__().name == "numpy"
    finally:
        codec_native.find.cache_clear()
    assert "codecs run in Python, slowly" in caplog.text
