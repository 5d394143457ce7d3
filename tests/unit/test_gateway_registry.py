"""Who may join: workers whose KV can be converted; others are told which field keeps them out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
from rpc_ends import hello

from baton.gateway import registry
from baton.gateway.registry import Registry
from baton.rpc.messages import Announce, Hello
from baton.types import Role

PREFILL = msgspec.structs.replace(
    hello(), worker_id="prefill-0", role=Role.PREFILL, numerics="cpu-exact-float32"
)
DECODE = msgspec.structs.replace(PREFILL, worker_id="decode-0", role=Role.DECODE)


class FakeLink:
    """A stream on which the test says Hello."""

    links: ClassVar[dict[str, FakeLink]] = {}

    def __init__(self, address: str, *_: object, **callbacks: Callable[..., None]) -> None:
        self.say_hello = callbacks["on_hello"]
        self.closed = False
        FakeLink.links[Path(address).stem] = self

    def start(self) -> None: ...

    def tell_peers(self, addresses: object) -> None: ...

    async def close(self) -> None:
        self.closed = True


@pytest.fixture
def joined() -> list[str]:
    return []


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, joined: list[str]) -> Iterator[Registry]:
    monkeypatch.setattr(registry, "WorkerLink", FakeLink)
    FakeLink.links.clear()
    yield Registry(
        "g",
        1,
        b"s" * 32,
        Path("/run/b"),
        {Role.PREFILL: 1, Role.DECODE: 1},
        on_join=lambda hello: joined.append(hello.worker_id),
        on_report=lambda worker_id, report: None,
        on_lost=lambda worker_id, reason: None,
    )


def announce(made: Registry, said: Hello) -> tuple[bool, str]:
    address = f"unix:/run/b/{said.worker_id}.sock"
    reply = made.announce(Announce(said.worker_id, address, said.role, said.epoch))
    return reply.accepted, reply.reason


def come(made: Registry, *hellos: Hello) -> None:
    """Each announces itself and says Hello, in turn."""

    async def run() -> None:
        for said in hellos:
            assert announce(made, said) == (True, "")
            FakeLink.links[said.worker_id].say_hello(said)
        await asyncio.sleep(0)

    asyncio.run(run())


def changed(**changes: Any) -> Hello:
    """DECODE with other fields; those of kv_format under their own names."""
    fmt = {n: changes.pop(n) for n in list(changes) if n in DECODE.kv_format.__struct_fields__}
    kv_format = msgspec.structs.replace(DECODE.kv_format, **fmt)
    return msgspec.structs.replace(DECODE, kv_format=kv_format, **changes)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (changed(model="x"), "its model is x, that of prefill-0 is m"),
        (changed(vocab_size=101), "its vocab_size is 101, that of prefill-0 is 100"),
        (changed(max_model_len=64), "its max_model_len is 64, that of prefill-0 is 128"),
        (
            changed(fingerprint=b"g" * 32),
            "its fingerprint is 6767676767676767, that of prefill-0 is 6666666666666666",
        ),
        (
            changed(numerics="cpu-torch-float32"),
            "its numerics is cpu-torch-float32, that of prefill-0 is cpu-exact-float32",
        ),
        (changed(num_layers=3), "its kv_format.num_layers is 3, that of prefill-0 is 2"),
        (changed(num_kv_heads=4), "its kv_format.num_kv_heads is 4, that of prefill-0 is 2"),
        (changed(head_dim=16), "its kv_format.head_dim is 16, that of prefill-0 is 8"),
        (changed(tensor_parallel=2), "its kv_format.tensor_parallel is 2, that of prefill-0 is 1"),
        (changed(codec="int8"), "its kv_format.codec is int8, that of prefill-0 is raw"),
        (changed(dtype="float8"), "its kv_format.dtype is float8, that of prefill-0 is float32"),
        (changed(block_size=0), "its kv_format.block_size is 0, that of prefill-0 is 16"),
        (changed(block_bytes=1), "its kv_format.block_bytes is 1 for 16 tokens of float32"),
    ],
)
def test_a_worker_that_cannot_serve_with_the_others_is_refused(
    made: Registry, joined: list[str], caplog: pytest.LogCaptureFixture, other: Hello, said: str
) -> None:
    come(made, PREFILL, other)
    assert joined == ["prefill-0"]
    assert made.hello_of("decode-0") is None
    assert FakeLink.links["decode-0"].closed
    assert any(said in record.getMessage() for record in caplog.records)
    # It hears of it when it comes again; started anew, with other settings, it may join.
    accepted, reason = announce(made, other)
    assert not accepted
    assert said in reason
    come(made, msgspec.structs.replace(DECODE, epoch=8))
    assert joined == ["prefill-0", "decode-0"]


@pytest.mark.parametrize(
    "other",
    [
        DECODE,
        changed(block_size=32, block_bytes=8192),
        msgspec.structs.replace(
            changed(block_size=24, block_bytes=24 * 128), numerics="cpu-exact-bfloat16",
            kv_format=msgspec.structs.replace(
                DECODE.kv_format, dtype="bfloat16", block_size=24, block_bytes=24 * 128
            ),
        ),
        changed(numerics="cuda-triton-float32", num_blocks=9, max_num_seqs=1),
    ],
)  # fmt: skip
def test_a_worker_whose_blocks_can_be_converted_may_join(
    made: Registry, joined: list[str], other: Hello
) -> None:
    come(made, PREFILL, other)
    assert joined == ["prefill-0", "decode-0"]


def test_every_member_is_asked(made: Registry, joined: list[str]) -> None:
    """The third goes with the second, whose device is another, and not with the first."""
    third = msgspec.structs.replace(PREFILL, worker_id="prefill-1", numerics="cpu-torch-float32")
    come(made, PREFILL, changed(numerics="cuda-triton-float32"), third)
    assert joined == ["prefill-0", "decode-0"]


def test_requests_go_by_the_keys_of_those_who_compute_prompts(made: Registry) -> None:
    come(made, changed(block_size=32, block_bytes=8192))
    assert made.hello() == made.hello_of("decode-0")
    come(made, PREFILL)
    assert made.hello() == made.hello_of("prefill-0")


def test_the_memory_of_refusals_is_bounded(made: Registry) -> None:
    come(made, PREFILL)
    for number in range(200):
        name = f"decode-{number}"
        come(made, msgspec.structs.replace(changed(num_layers=3), worker_id=name))
    assert len(made._refused) <= registry._MAX_REFUSED


def test_a_hello_that_is_not_what_was_announced_is_refused(
    made: Registry, joined: list[str]
) -> None:
    async def run() -> None:
        announce(made, DECODE)
        FakeLink.links["decode-0"].say_hello(msgspec.structs.replace(DECODE, epoch=9))

    asyncio.run(run())
    assert joined == []
