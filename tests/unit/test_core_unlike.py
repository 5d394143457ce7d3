"""What of two workers' KV can be converted, and what is refused."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from sim_engine import SimWorker, make_config, make_request, run_alone

from baton.core.recut import recut
from baton.core.unlike import End, can_take, is_like, misfit, origin
from baton.types import Handoff, KvFormat

OURS = End(b"w" * 32, "cpu-exact-v1-float32", KvFormat(16, "float32", 2, 4, 8, 16 * 512))


def other(fmt: dict[str, Any] | None = None, **end: Any) -> End:
    kv_format = msgspec.structs.replace(OURS.kv_format, **(fmt or {}))
    return msgspec.structs.replace(OURS, kv_format=kv_format, **end)


@pytest.mark.parametrize(
    ("theirs", "field", "values"),
    [
        (other(fingerprint=b"v" * 32), "fingerprint", ("76767676", "77777777")),
        (other({"num_layers": 3}), "kv_format.num_layers", ("3", "2")),
        (other({"num_kv_heads": 2}), "kv_format.num_kv_heads", ("2", "4")),
        (other({"head_dim": 16}), "kv_format.head_dim", ("16", "8")),
        (other({"tensor_parallel": 2}), "kv_format.tensor_parallel", ("2", "1")),
        (other({"codec": "int8"}), "kv_format.codec", ("int8", "raw")),
        (other({"dtype": "float64"}), "kv_format.dtype", ("float64", "float32")),
        (other({"block_size": 0}), "kv_format.block_size", ("0", "16")),
        (other({"block_size": -16}), "kv_format.block_size", ("-16", "16")),
        (other({"block_size": 1 << 40}), "kv_format.block_size", (str(1 << 40), "16")),
        (other({"block_bytes": 1 << 40}), "kv_format.block_bytes", (str(1 << 40), "8192")),
        (other({"block_size": 32}), "kv_format.block_bytes", ("8192 for 32", "8192 for 16")),
        (other(numerics="cpu-torch-float32"), "numerics", ("torch", "exact")),
        (other(numerics="cpu-exact-v2-float32"), "numerics", ("v2", "v1")),
    ],
)
def test_what_cannot_be_converted_is_named(
    theirs: End, field: str, values: tuple[str, str]
) -> None:
    found = misfit(theirs, OURS)
    assert found is not None
    assert found.field == field
    assert values[0] in found.theirs
    assert values[1] in found.ours


@pytest.mark.parametrize(
    "theirs",
    [
        OURS,
        other({"block_size": 24, "block_bytes": 24 * 512}),
        other({"block_size": 1024, "block_bytes": 1024 * 512}),
        other({"dtype": "bfloat16", "block_bytes": 16 * 256}, numerics="cpu-exact-v1-bfloat16"),
        other({"dtype": "float16", "block_size": 1, "block_bytes": 256}, numerics="cpu-torch-x"),
        other(numerics="cuda-torch-float32"),
    ],
)
def test_what_can_be_converted_may_join(theirs: End) -> None:
    assert misfit(theirs, OURS) is None
    assert misfit(OURS, theirs) is None


def _handoff(numerics: str = "exact", **fmt: Any) -> Handoff:
    worker = SimWorker(make_config())
    (client,) = run_alone(worker, [make_request("a", (1, 2, 3, 4, 5), 4, hand_off=True)])
    assert client.handoff is not None
    kv_format = msgspec.structs.replace(client.handoff.kv_format, **fmt)
    return msgspec.structs.replace(client.handoff, kv_format=kv_format, numerics=numerics)


def test_only_the_same_bits_keep_the_class() -> None:
    config = make_config()
    like, cut, foreign = _handoff(), _handoff(block_size=3, block_bytes=72), _handoff("gpu-x")
    strange = _handoff(num_layers=2)
    assert [is_like(config, each) for each in (like, cut, foreign, strange)] == [
        True, False, False, False,
    ]  # fmt: skip
    assert [can_take(config, each) for each in (like, cut, foreign, strange)] == [
        True, True, True, False,
    ]  # fmt: skip
    assert origin(config, like) == origin(config, cut) == origin(config, strange) == ""
    assert "gpu-x" in origin(config, foreign)
    assert origin(config, _handoff("gpu-y")) != origin(config, foreign)


def test_pieces_of_an_uneven_cut() -> None:
    """The picture of `core.recut`."""
    handoff = msgspec.structs.replace(
        _handoff(block_size=6, block_bytes=144), num_tokens=14, keys=(b"a", b"b", b"c")
    )
    target = msgspec.structs.replace(handoff.kv_format, block_size=4, block_bytes=96)
    cut = recut(handoff, target, [0, 1, 2, 3])
    found = {
        block.key: [(p.start, p.turn, p.slot, p.num_tokens) for p in block.pieces]
        for block in cut.blocks
    }
    assert found == {
        b"a": [(0, 0, 0, 4), (4, 1, 0, 2)],
        b"b": [(0, 1, 2, 2), (2, 2, 0, 4)],
        b"c": [(0, 3, 0, 2)],
    }
    # Only what is missing is asked for.
    assert [block.key for block in recut(handoff, target, [1]).blocks] == [b"a", b"b"]
    assert [block.key for block in recut(handoff, target, [3]).blocks] == [b"c"]
