from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from queue import Empty, SimpleQueue

import msgspec
import numpy as np
import pytest
from tcp_ends import until

from baton.core.plan import Piece, Recut, SourceBlock
from baton.fabric import thread
from baton.fabric.arena import Arena, MappedArena
from baton.fabric.thread import (
    Done,
    ExportDone,
    ExportJob,
    Fabric,
    FabricFailed,
    FetchDone,
    FetchJob,
)
from baton.fabric.transport import ReadResult, Wanted
from baton.types import Grant, KvFormat

GRANT = Grant("g", "p0", 1, "t", 30.0, b"mac")
KEY = b"k" * 32


class FakeTransport:
    """Answers OK; fails, or waits, when told so."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.opened: list[str] = []
        self.formats: list[KvFormat | None] = []
        self.closed: SimpleQueue[float] = SimpleQueue()

    def open(self, source: str, kv_format: KvFormat | None) -> FakeTransport:
        self.opened.append(source)
        self.formats.append(kv_format)
        return self

    def fetch(
        self, grant: Grant, wanted: Sequence[Wanted], deadline: float, codec: str = "raw"
    ) -> list[ReadResult]:
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        return [ReadResult.OK for _ in wanted]

    def close(self) -> None:
        self.closed.put(time.monotonic())


class Fixture:
    def __init__(self) -> None:
        self.arena = Arena.create(2, 4096, 1, KvFormat(16, "float32", 1, 1, 8, 4096))
        self.transport = FakeTransport()
        self.inbox: SimpleQueue[Done] = SimpleQueue()
        self.thread = Fabric(self.arena, self.transport.open, self.inbox.put)

    def fetch(self, tag: object, num_blocks: int = 1, source: str = "p0") -> None:
        wanted = tuple(Wanted(KEY, 0, b"", bytearray(8)) for _ in range(num_blocks))
        grant = msgspec.structs.replace(GRANT, source=source)
        self.thread.fetch(FetchJob(tag, grant, wanted, time.monotonic() + 5))

    def answer(self) -> Done:
        return self.inbox.get(timeout=5)


@pytest.fixture
def fabric() -> Iterator[Fixture]:
    made = Fixture()
    yield made
    made.transport.gate.set()
    made.thread.stop()
    made.arena.close()


def test_an_export_is_readable_when_it_is_answered(fabric: Fixture) -> None:
    fabric.thread.export(ExportJob(("seq", 3), 1, KEY, b"x" * 4000))
    done = fabric.answer()
    assert isinstance(done, ExportDone)
    assert (done.tag, done.frame, done.key) == (("seq", 3), 1, KEY)
    assert done.elapsed_s >= 0
    mapped = MappedArena(fabric.arena.fd, 1)
    destination = bytearray(4000)
    assert mapped.read(1, KEY, done.digest, destination) is ReadResult.OK
    assert destination == b"x" * 4000
    mapped.close()


def test_an_export_may_be_got_at_on_the_fabric_thread(fabric: Fixture) -> None:
    threads: list[str] = []

    def source() -> bytes:
        threads.append(threading.current_thread().name)
        return b"y" * 4000

    fabric.thread.export(ExportJob("a", 1, KEY, source))
    done = fabric.answer()
    assert isinstance(done, ExportDone)
    assert threads == ["baton-copier"]
    assert fabric.arena.write(0, KEY, b"y" * 4000) == done.digest


def test_what_came_whole_is_landed_before_the_answer(
    fabric: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = [ReadResult.OK, ReadResult.CORRUPT, ReadResult.OK]
    monkeypatch.setattr(fabric.transport, "fetch", lambda *_: results)
    landed: list[tuple[int, bool]] = []

    def land(index: int) -> None:
        landed.append((index, fabric.inbox.empty()))

    wanted = tuple(Wanted(KEY, 0, b"", bytearray(8)) for _ in results)
    fabric.thread.fetch(FetchJob("a", GRANT, wanted, time.monotonic() + 5, land))
    done = fabric.answer()
    assert isinstance(done, FetchDone)
    assert done.results == tuple(results)
    assert landed == [(0, True), (2, True)]


def test_a_fetch_gives_one_result_for_each_block(fabric: Fixture) -> None:
    fabric.fetch("a", num_blocks=3)
    done = fabric.answer()
    assert isinstance(done, FetchDone)
    assert (done.tag, done.results) == ("a", (ReadResult.OK,) * 3)


def test_answers_of_one_thread_come_in_the_order_of_submission(fabric: Fixture) -> None:
    for n in range(20):
        if n % 2:
            fabric.fetch(n)
        else:
            fabric.thread.export(ExportJob(n, 0, KEY, b"x"))
    tags = [fabric.answer().tag for _ in range(20)]
    assert [tag for tag in tags if tag % 2] == list(range(1, 20, 2))
    assert [tag for tag in tags if not tag % 2] == list(range(0, 20, 2))


def test_a_slow_peer_delays_neither_exports_nor_other_peers() -> None:
    arena = Arena.create(1, 8, 1, KvFormat(16, "float32", 1, 1, 8, 8))
    inbox: SimpleQueue[Done] = SimpleQueue()
    slow, quick = FakeTransport(), FakeTransport()
    slow.gate.clear()
    sources = {"p0": slow, "p1": quick}
    fabric = Fabric(arena, lambda source, _: sources[source], inbox.put)
    for tag, grant in (("slow", GRANT), ("quick", msgspec.structs.replace(GRANT, source="p1"))):
        fabric.fetch(FetchJob(tag, grant, (), time.monotonic() + 5))
    assert inbox.get(timeout=5).tag == "quick"
    fabric.export(ExportJob("export", 0, KEY, b"x"))
    assert inbox.get(timeout=5).tag == "export"
    slow.gate.set()
    assert inbox.get(timeout=5).tag == "slow"
    fabric.stop()
    arena.close()


def test_our_own_store_is_read_without_a_grant(fabric: Fixture) -> None:
    fabric.thread.export(ExportJob("a", 1, KEY, b"z" * 64))
    done = fabric.answer()
    assert isinstance(done, ExportDone)
    there, gone = bytearray(64), bytearray(64)
    wanted = (Wanted(KEY, 1, done.digest, there), Wanted(KEY, 0, done.digest, gone))
    fabric.thread.fetch(FetchJob("b", None, wanted, time.monotonic() + 5))
    assert fabric.answer().results == (ReadResult.OK, ReadResult.MISSING)  # type: ignore[union-attr]
    assert there == b"z" * 64
    assert not fabric.transport.opened


def test_a_transport_that_cannot_be_opened_is_an_answer(
    fabric: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere(source: str, kv_format: KvFormat | None) -> FakeTransport:
        raise KeyError(source)

    monkeypatch.setattr(fabric.thread, "_open_transport", nowhere)
    fabric.fetch("a")
    assert fabric.answer() == FabricFailed("a", "KeyError: 'p0'")


def test_too_many_peers_are_refused(fabric: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread, "MAX_FETCHERS", 2)
    for source in ("p0", "p1", "p2", "p1"):
        fabric.fetch(source, source=source)
    answers = {(done.tag, done.results[0]) for done in (fabric.answer() for _ in range(4))}  # type: ignore[union-attr]
    assert answers == {("p0", "ok"), ("p1", "ok"), ("p2", "unreachable")}


def test_an_exception_is_an_answer_and_the_thread_goes_on(fabric: Fixture) -> None:
    fabric.transport.error = ZeroDivisionError("boom")
    fabric.fetch("a")
    fabric.thread.export(ExportJob("b", 7, KEY, b"x"))  # no such frame
    fabric.thread.export(ExportJob("c", 0, KEY, object()))  # type: ignore[arg-type]
    failures = [fabric.answer() for _ in range(3)]
    assert all(isinstance(failure, FabricFailed) for failure in failures)
    assert {failure.tag for failure in failures} == {"a", "b", "c"}
    assert FabricFailed("a", "ZeroDivisionError: boom") in failures
    fabric.transport.error = None
    fabric.fetch("d")
    assert fabric.answer().tag == "d"


def test_stop_answers_what_was_submitted_and_then_refuses(fabric: Fixture) -> None:
    fabric.transport.gate.clear()
    for n in range(5):
        fabric.fetch(n)
    threading.Timer(0.1, fabric.transport.gate.set).start()
    fabric.thread.stop()
    fabric.thread.stop()
    assert fabric.inbox.qsize() == 5
    assert not any(thread.name.startswith("baton-") for thread in threading.enumerate())
    with pytest.raises(RuntimeError):
        fabric.fetch("late")


def test_nothing_is_taken_while_stopping(fabric: Fixture) -> None:
    fabric.transport.gate.clear()
    fabric.fetch("a")
    stopper = threading.Thread(target=fabric.thread.stop)
    stopper.start()
    until(lambda: fabric.thread._stopping)
    with pytest.raises(RuntimeError):
        fabric.fetch("would never be answered")
    fabric.transport.gate.set()
    stopper.join()
    assert fabric.inbox.qsize() == 1


def test_idle_threads_sleep(fabric: Fixture) -> None:
    fabric.fetch("a")
    fabric.answer()
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.05


def test_after_a_while_without_jobs_a_transport_is_closed_and_later_opened_again(
    fabric: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thread, "REST_AFTER_S", 0.1)
    for tag in ("a", "b"):
        fabric.fetch(tag)
        assert fabric.answer().tag == tag
        answered = time.monotonic()
        assert fabric.transport.closed.get(timeout=5) >= answered + 0.05
    with pytest.raises(Empty):
        fabric.transport.closed.get(timeout=0.3)
    assert fabric.transport.opened == ["p0", "p0"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_inbox_that_fails_is_noticed_by_the_next_submission() -> None:
    arena = Arena.create(1, 8, 1, KvFormat(16, "float32", 1, 1, 8, 8))

    def fail(done: Done) -> None:
        raise RuntimeError("the engine is gone")

    fabric = Fabric(arena, FakeTransport().open, fail)
    fabric.export(ExportJob("a", 0, KEY, b"x"))
    fabric._copier.join()
    with pytest.raises(RuntimeError, match="died"):
        fabric.export(ExportJob("b", 0, KEY, b"x"))
    fabric.stop()
    arena.close()


def test_blocks_of_another_format_come_by_a_transport_of_that_format(
    fabric: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two source blocks make three of ours; the second does not come. What came is landed."""
    theirs = KvFormat(3, "float32", 1, 1, 1, 24)
    ours = msgspec.structs.replace(theirs, block_size=2, block_bytes=16)
    pieces = (
        (Piece(0, 0, 0, 2), Piece(2, 1, 0, 1)),
        (Piece(0, 1, 1, 1), Piece(1, 2, 0, 2)),
    )
    blocks = tuple(SourceBlock(bytes([n]), n, b"", parts) for n, parts in enumerate(pieces))

    def fetch(grant: Grant, wanted: Sequence[Wanted], *_: object) -> list[ReadResult]:
        for want in wanted:
            into = np.frombuffer(want.destination, np.uint8)
            assert into.size == theirs.block_bytes
            into[:] = range(24)
        return [ReadResult.OK, ReadResult.MISSING][: len(wanted)]

    monkeypatch.setattr(fabric.transport, "fetch", fetch)
    landed: list[int] = []
    wanted = tuple(Wanted(b"", 0, b"", bytearray(16)) for _ in range(3))
    recut = Recut(theirs, ours, blocks)
    deadline = time.monotonic() + 5
    fabric.thread.fetch(FetchJob("a", GRANT, wanted, deadline, landed.append, recut=recut))
    done = fabric.answer()
    assert isinstance(done, FetchDone)
    assert done.results == (ReadResult.OK, ReadResult.MISSING, ReadResult.MISSING)
    assert landed == [0]
    assert wanted[0].destination == bytes([*range(8), *range(12, 20)])
    assert fabric.transport.formats == [theirs]
    fabric.fetch("b")  # a block like ours, of the same peer: another transport
    fabric.answer()
    assert fabric.transport.formats == [theirs, None]


def test_a_fetch_that_does_not_return_holds_up_nobody_else(
    fabric: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of that peer nothing more is asked, until it returns after all; nor does `stop` wait."""
    monkeypatch.setattr(thread, "OVERDUE_AFTER_S", 0.1)
    gate = threading.Event()
    results = [ReadResult.OK]

    def fetch(grant: Grant, *_: object) -> list[ReadResult]:
        assert grant.source != "p0" or gate.wait(10)
        return results

    monkeypatch.setattr(fabric.transport, "fetch", fetch)
    deadline = time.monotonic() + 0.1
    wanted = (Wanted(KEY, 0, b"", bytearray(8)),)
    fabric.thread.fetch(FetchJob("hangs", GRANT, wanted, deadline))
    fabric.thread.fetch(FetchJob("behind it", GRANT, wanted, deadline))
    assert not fabric.thread.hangs
    until(lambda: fabric.thread.hangs)
    assert time.monotonic() >= deadline + 0.1
    fabric.fetch("refused")
    refused = fabric.answer()
    assert isinstance(refused, FetchDone)
    assert (refused.tag, refused.results) == ("refused", (ReadResult.UNREACHABLE,))
    fabric.fetch("of another", source="p1")
    assert fabric.answer().tag == "of another"
    before = time.monotonic()
    fabric.thread.stop()
    assert time.monotonic() - before < 5, "it waits for one that hangs"
    assert fabric.inbox.empty()
    gate.set()
    assert [fabric.answer().tag for _ in range(2)] == ["hangs", "behind it"]
    until(lambda: not any(each.name == "baton-fetch-p0" for each in threading.enumerate()))


def test_the_copier_tells_how_far_it_is(fabric: Fixture) -> None:
    gate = threading.Event()

    def source() -> bytes:
        assert gate.wait(10)
        return b"x"

    assert fabric.thread.copied() == (0, False)
    fabric.thread.export(ExportJob("a", 0, KEY, b"x"))
    fabric.answer()
    assert fabric.thread.copied() == (1, False)
    fabric.thread.export(ExportJob("b", 0, KEY, source))
    fabric.thread.fetch(FetchJob("c", None, (), time.monotonic() + 5))
    assert fabric.thread.copied() == (1, True)
    gate.set()
    fabric.answer()
    fabric.answer()
    assert fabric.thread.copied() == (3, False)


def test_stop_does_not_wait_for_a_fetch_that_comes_to_hang_meanwhile(
    fabric: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thread, "OVERDUE_AFTER_S", 0.1)
    fabric.transport.gate.clear()
    fabric.thread.fetch(FetchJob("hangs", GRANT, (), time.monotonic() + 0.3))
    stopped = time.monotonic()
    fabric.thread.stop()
    assert 0.3 < time.monotonic() - stopped < 5
    assert fabric.inbox.empty()
    fabric.transport.gate.set()
    assert fabric.answer().tag == "hangs"
