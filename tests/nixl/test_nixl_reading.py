"""What comes of each block when both ends live: the right bytes, or the right reason."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import nixl_ends as ends
import numpy as np
import pytest
import xxhash
from nixl_ends import KV_FORMAT, NUM_BLOCKS, Writer, expected, fetch
from nixl_writer import frame, key

from baton.fabric.arena import FRAME_HEADERS, Geometry
from baton.fabric.nixl import NixlTransport, sections
from baton.fabric.nixl.door import Doors
from baton.fabric.nixl.serving import AWAKE_S
from baton.fabric.nixl.staging import NUM_PAGES, Banks
from baton.fabric.transport import ReadResult, Wanted
from baton.types import KvFormat


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Writer]:
    made = Writer(tmp_path_factory.mktemp("dir") / "run")
    yield made
    made.close()
    assert made.process.returncode == 0


@pytest.fixture
def doors(writer: Writer, tmp_path_factory: pytest.TempPathFactory) -> Doors:
    return Doors(Path(writer.runtime_dir))


@pytest.fixture
def transport(doors: Doors) -> Iterator[NixlTransport]:
    made = NixlTransport(doors, KV_FORMAT)
    yield made
    assert made.quarantined_bytes == 0
    made.close()


@pytest.fixture(autouse=True)
def no_descriptor_is_left(writer: Writer) -> Iterator[None]:
    NixlTransport(Doors(Path("/nowhere")), KV_FORMAT).close()  # what NIXL opens once and for all
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("num_blocks", [1, 2, 6, 7, 13, 25, NUM_BLOCKS])
def test_scattered_blocks(writer: Writer, transport: NixlTransport, num_blocks: int) -> None:
    for _ in range(3):
        fetched = fetch(transport, writer, num_blocks=num_blocks)
        assert fetched.results == [ReadResult.OK] * num_blocks
        assert fetched.num_right == num_blocks


def test_nothing_is_fetched_of_nothing(writer: Writer, transport: NixlTransport) -> None:
    assert transport.fetch(writer.hello.grant, [], time.monotonic() + 5) == []


def test_blocks_over_tcp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doors: Doors) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    writer = Writer(tmp_path / "run")
    transport = NixlTransport(Doors(tmp_path / "run"), KV_FORMAT)
    for _ in range(3):
        assert fetch(transport, writer).num_right == NUM_BLOCKS
        time.sleep(2 * AWAKE_S)  # the serving process has gone to sleep
    transport.close()
    writer.close()


def test_one_result_for_each_block_in_order(writer: Writer, transport: NixlTransport) -> None:
    digest = writer.hello.digests[5]
    place = frame(5, NUM_BLOCKS)
    cases = [
        (key(5), place, digest, 300_000, "ok"),
        (key(6), place, digest, 300_000, "missing"),
        (key(5), frame(6, NUM_BLOCKS), digest, 300_000, "missing"),
        (key(5)[1:], place, digest, 300_000, "missing"),
        (key(5) + b"k", place, digest, 300_000, "missing"),
        (bytes(32), place, digest, 300_000, "missing"),
        (key(5), place, b"d" * 16, 300_000, "corrupt"),
        (key(5), place, b"", 300_000, "corrupt"),
        (key(5), place, digest, 299_999, "wrong_size"),
        (key(5), place, digest, 300_001, "wrong_size"),
        (key(5), place, digest, 0, "wrong_size"),
        (key(5), -1, digest, 300_000, "out_of_range"),
        (key(5), NUM_BLOCKS, digest, 300_000, "out_of_range"),
        (key(5), 1 << 70, digest, 300_000, "out_of_range"),
        (key(5), place, digest, 300_000, "ok"),
    ]
    random.Random(0).shuffle(cases)
    places = [bytearray(size) for _, _, _, size, _ in cases]
    wanted = [Wanted(*case[:3], place) for case, place in zip(cases, places, strict=True)]
    results = transport.fetch(writer.hello.grant, wanted, time.monotonic() + 5)
    assert results == [result for *_, result in cases]
    for result, block in zip(results, places, strict=True):
        assert (bytes(block) == expected(5, 1)) == (result in ("ok", "corrupt"))


def test_sections_hold_what_their_pages_hold(
    writer: Writer, transport: NixlTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sections, "SECTION_BYTES", 3 * 303_104)
    assert fetch(transport, writer).num_right == NUM_BLOCKS


def test_a_section_has_no_more_pages_than_there_is_room() -> None:
    geometry = Geometry(1, 1 << 20, 4096, b"")
    frames = random.Random(0).sample(range(1 << 20), 5000)
    wanted = [Wanted(key(at), frame, b"", bytearray(1)) for at, frame in enumerate(frames)]
    seen: list[int] = []
    for section in sections.sections(geometry, wanted, [None] * len(wanted)):
        assert len(section.pages) <= NUM_PAGES and section.pages[0] == 0
        for index, at, place in zip(section.indices, section.frames, section.places, strict=True):
            page, offset = divmod(geometry.header_at(frames[index]), 4096)
            assert frames[index] == at
            assert section.pages[place // 64] == page and place % 64 == offset // 64
        seen += section.indices
    assert sorted(seen) == list(range(5000))


def test_a_frame_that_was_reused_meanwhile_is_missing() -> None:
    """Whether its bytes were still right or not; and what was not copied keeps its reason."""
    geometry = Geometry(1, 4, 4096, b"")
    banks = Banks(4096)
    blocks = [os.urandom(4096) for _ in range(4)]
    banks._bytes[: 4 * 4096] = np.frombuffer(b"".join(blocks), np.uint8)
    headers = np.zeros(4, FRAME_HEADERS)
    headers["generation"], headers["num_bytes"] = 2, [4096, 4096, 4096, 5]
    wanted = [
        Wanted(bytes(32), turn, xxhash.xxh3_128_digest(block), bytearray(4096))
        for turn, block in enumerate(blocks)
    ]
    wanted[2] = msgspec.structs.replace(wanted[2], digest=bytes(16))
    (section,) = sections.sections(geometry, wanted, [None] * 4)
    for changed, found in (
        ([], ["ok", "ok", "corrupt", "wrong_size"]),
        ([1, 2, 3], ["ok", "missing", "missing", "wrong_size"]),
    ):
        landing = sections.Landing(section, wanted, headers)
        landing.take_out(geometry, banks, 0, slice(0, 4))
        landing.after = headers.copy()
        landing.after["generation"][changed] = 4
        results: list[ReadResult | None] = [None] * 4
        landing.finish(results)
        assert results == found
    assert wanted[0].destination == blocks[0] and not any(wanted[3].destination)


@pytest.mark.parametrize(
    ("change", "expected_result"),
    [
        ({"tenant": "other"}, "refused"),
        ({"grant_id": "other"}, "refused"),
        ({"mac": bytes(32)}, "refused"),
        ({"epoch": 2}, "stale_epoch"),
        ({"source": "p1"}, "unreachable"),
        ({"source": "../p0"}, "refused"),
        ({"source": ""}, "refused"),
        ({"tenant": "t" * (16 << 10)}, "unreachable"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_grant_reads_nothing(
    writer: Writer, transport: NixlTransport, change: dict[str, object], expected_result: str
) -> None:
    grant = msgspec.structs.replace(writer.hello.grant, **change)
    block = bytearray(KV_FORMAT.block_bytes)
    wanted = [Wanted(key(0), frame(0, NUM_BLOCKS), writer.hello.digests[0], block)]
    assert transport.fetch(grant, wanted, time.monotonic() + 5) == [expected_result]
    assert not any(block)
    assert fetch(transport, writer).num_right == NUM_BLOCKS


@pytest.mark.parametrize(
    "kv_format",
    [
        msgspec.structs.replace(KV_FORMAT, dtype="bfloat16"),
        msgspec.structs.replace(KV_FORMAT, block_bytes=600_000),
    ],
    ids=["dtype", "length"],
)
def test_another_kv_format_is_not_read(writer: Writer, doors: Doors, kv_format: KvFormat) -> None:
    other = NixlTransport(doors, kv_format)
    assert fetch(other, writer).results == [ReadResult.WRONG_FORMAT] * NUM_BLOCKS
    other.close()


def test_a_deadline_that_has_passed(writer: Writer, transport: NixlTransport) -> None:
    fetched = fetch(transport, writer, seconds=-1.0)
    assert fetched.results == [ReadResult.TIMED_OUT] * NUM_BLOCKS
    assert fetched.num_right == 0 and transport.num_reads == 0


def test_a_flipped_bit_and_a_reused_frame(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run")
    transport = NixlTransport(Doors(tmp_path / "run"), KV_FORMAT)
    assert fetch(transport, writer).num_right == NUM_BLOCKS
    writer.tell("flip 1")
    writer.tell("reuse 2")
    results = fetch(transport, writer).results
    assert [results[-1 - block] for block in range(4)] == ["ok", "corrupt", "missing", "ok"]
    assert results.count(ReadResult.OK) == NUM_BLOCKS - 2
    transport.close()
    writer.close()


def test_a_frame_rewritten_all_the_time_is_never_read_wrong(tmp_path: Path) -> None:
    """Frame 3 gets wrong bytes, under the very key that is asked for, and right ones, in turns.

    `fetch` asserts that what is OK is right.
    """
    writer = Writer(tmp_path / "run")
    transport = NixlTransport(Doors(tmp_path / "run"), KV_FORMAT)
    seen = set()
    for _ in range(20):  # rounds; on a busy machine the two may miss each other in some
        writer.begin("churn 3")
        for _ in range(100):
            seen.add(fetch(transport, writer, num_blocks=4).results[0])
        assert writer.read_line() == "done"
        if seen > {ReadResult.OK}:
            break
    assert seen > {ReadResult.OK}, "writer and reader never met"
    assert fetch(transport, writer).num_right == NUM_BLOCKS
    transport.close()
    writer.close()


def test_the_other_end_is_cleaned_away(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == [tmp_path / "run" / "p0.nixl.sock"]
    writer.close()
    assert writer.process.returncode == 0
    assert list((tmp_path / "run").iterdir()) == []
    assert ends.state_of(writer.hello.serving_pid) in "ZX"
