from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from queue import Empty, SimpleQueue

import pytest

from baton.fabric import thread
from baton.fabric.arena import Arena, MappedArena
from baton.fabric.thread import (
    Done,
    ExportDone,
    ExportJob,
    FabricFailed,
    FabricThread,
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
        self.forgotten: list[str] = []
        self.rests: SimpleQueue[float] = SimpleQueue()

    def fetch(self, grant: Grant, wanted: Sequence[Wanted], deadline: float) -> list[ReadResult]:
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        return [ReadResult.OK for _ in wanted]

    def forget(self, source: str) -> None:
        if self.error is not None:
            raise self.error
        self.forgotten.append(source)

    def rest(self) -> None:
        self.rests.put(time.monotonic())

    def close(self) -> None: ...


class Fixture:
    def __init__(self) -> None:
        self.arena = Arena.create(2, 4096, 1, KvFormat(16, "float32", 1, 1, 8, 4096))
        self.transport = FakeTransport()
        self.inbox: SimpleQueue[Done] = SimpleQueue()
        self.thread = FabricThread(self.arena, self.transport, self.inbox.put)

    def fetch(self, tag: object, num_blocks: int = 1) -> None:
        wanted = tuple(Wanted(KEY, 0, b"", bytearray(8)) for _ in range(num_blocks))
        self.thread.fetch(FetchJob(tag, GRANT, wanted, time.monotonic() + 5))

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
    assert threads == ["baton-fabric"]
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


def test_answers_come_in_the_order_of_submission(fabric: Fixture) -> None:
    for n in range(20):
        if n % 2:
            fabric.fetch(n)
        else:
            fabric.thread.export(ExportJob(n, 0, KEY, b"x"))
    assert [fabric.answer().tag for _ in range(20)] == list(range(20))


def test_an_exception_is_an_answer_and_the_thread_goes_on(fabric: Fixture) -> None:
    fabric.transport.error = ZeroDivisionError("boom")
    fabric.fetch("a")
    fabric.thread.export(ExportJob("b", 7, KEY, b"x"))  # no such frame
    fabric.thread.export(ExportJob("c", 0, KEY, object()))  # type: ignore[arg-type]
    fabric.thread.forget("p0")
    failures = [fabric.answer() for _ in range(3)]
    assert all(isinstance(failure, FabricFailed) for failure in failures)
    assert [failure.tag for failure in failures] == ["a", "b", "c"]
    assert failures[0] == FabricFailed("a", "ZeroDivisionError: boom")
    fabric.transport.error = None
    fabric.thread.forget("p1")
    fabric.fetch("d")
    assert fabric.answer().tag == "d"
    assert fabric.transport.forgotten == ["p1"]


def test_stop_answers_what_was_submitted_and_then_refuses(fabric: Fixture) -> None:
    fabric.transport.gate.clear()
    for n in range(5):
        fabric.fetch(n)
    threading.Timer(0.1, fabric.transport.gate.set).start()
    fabric.thread.stop()
    fabric.thread.stop()
    assert fabric.inbox.qsize() == 5
    assert not any(thread.name == "baton-fabric" for thread in threading.enumerate())
    with pytest.raises(RuntimeError):
        fabric.fetch("late")


def test_nothing_is_taken_while_stopping(fabric: Fixture) -> None:
    fabric.transport.gate.clear()
    fabric.fetch("a")
    stopper = threading.Thread(target=fabric.thread.stop)
    stopper.start()
    time.sleep(0.1)
    with pytest.raises(RuntimeError):
        fabric.fetch("would never be answered")
    fabric.transport.gate.set()
    stopper.join()
    assert fabric.inbox.qsize() == 1


def test_an_idle_thread_sleeps(fabric: Fixture) -> None:
    fabric.fetch("a")
    fabric.answer()
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.05


def test_after_a_while_without_jobs_the_transport_rests_once(
    fabric: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thread, "REST_AFTER_S", 0.1)
    for tag in ("a", "b"):  # it goes on after a rest, and rests again
        fabric.fetch(tag)
        assert fabric.answer().tag == tag
        answered = time.monotonic()
        assert fabric.transport.rests.get(timeout=5) >= answered + 0.05
    with pytest.raises(Empty):
        fabric.transport.rests.get(timeout=0.3)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_inbox_that_fails_is_noticed_by_the_next_submission() -> None:
    arena = Arena.create(1, 8, 1, KvFormat(16, "float32", 1, 1, 8, 8))

    def fail(done: Done) -> None:
        raise RuntimeError("the engine is gone")

    thread = FabricThread(arena, FakeTransport(), fail)
    thread.export(ExportJob("a", 0, KEY, b"x"))
    thread._thread.join(5)
    with pytest.raises(RuntimeError, match="stopped"):
        thread.export(ExportJob("b", 0, KEY, b"x"))
    thread.stop()
    arena.close()
