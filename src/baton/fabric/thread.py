"""The fabric's threads: they copy and digest beside the engine, in calls that release the GIL.

    engine ──ExportJob, FetchJob of our own store──▶ copier ──▶ arena
           ──FetchJob of a peer's store────────────▶ one fetcher a peer ──▶ its transport

The engine thread submits jobs and gets exactly one answer for each by `on_done`, which is called
on a thread of the fabric and must only pass the answer on (`inbox.put`). Jobs of one thread run
one at a time in the order of submission, so a peer that is slow delays nothing but its own blocks.
Blocks and frames that a job names belong to it until its answer: a KV block that is being
imported, or exported, may be freed only then.

A transport that does not return at its deadline is beyond help here: its thread may write to the
blocks of that job as long as it lives, so they stay its own, and what is asked of that peer
meanwhile is `unreachable` at once. Who waited for it is the scheduler's business (`core.fetches`).
The copier has no peer to wait for; whether it gets on, the worker's pulse tells.

Threads sleep when there is nothing to do. A fetcher that has slept for `REST_AFTER_S` closes its
transport and ends, so that an idle worker pins nobody's store. None is a daemon: the owner calls
`stop`, which waits for none that hangs.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from queue import Empty, SimpleQueue
from typing import Any, Final

import msgspec

from baton.core.fetches import OVERDUE_AFTER_S
from baton.core.plan import Recut
from baton.fabric.arena import Arena, MappedArena
from baton.fabric.recut import fetch_recut
from baton.fabric.transport import ReadableBlock, ReadResult, Transport, Wanted
from baton.types import Grant, KvFormat

logger = logging.getLogger(__name__)

REST_AFTER_S: Final = 2.0
MAX_FETCHERS: Final = 256
_LOOK_S: Final = 0.2
"""Between two looks at a thread that is to end, and may hang."""


class ExportJob(msgspec.Struct, frozen=True, eq=False):
    """Copy a block from `source` into a frame of our own store. The answer carries `tag`.

    source: the block, or what is called on the fabric's thread to get at it (a copy off a GPU).
    """

    tag: Hashable
    frame: int
    key: bytes
    source: ReadableBlock | Callable[[], ReadableBlock]


class FetchJob(msgspec.Struct, frozen=True, eq=False):
    """Fetch blocks by `deadline` (instant of `time.monotonic()`); without a grant, from our store.

    land: called on the fabric's thread with the index of each block that came whole, before the
    answer (a copy onto a GPU). codec: how the blocks may travel; `raw` is exact. recut: what to
    fetch instead, and how `wanted` come of it; of those only the destinations count then.
    """

    tag: Hashable
    grant: Grant | None
    wanted: tuple[Wanted, ...]
    deadline: float
    land: Callable[[int], None] | None = None
    codec: str = "raw"
    recut: Recut | None = None

    @property
    def kv_format(self) -> KvFormat | None:
        """Of the source's blocks; None if it is ours."""
        return None if self.recut is None else self.recut.source


class ExportDone(msgspec.Struct, frozen=True):
    """The block is in its frame; the owner may `seal` it with this 16-byte digest."""

    tag: Hashable
    frame: int
    key: bytes
    digest: bytes
    elapsed_s: float


class FetchDone(msgspec.Struct, frozen=True):
    """One result for each block wanted, in order."""

    tag: Hashable
    results: tuple[ReadResult, ...]
    elapsed_s: float


class FabricFailed(msgspec.Struct, frozen=True):
    """A job raised what it should not have: nothing of it may be used. `error` is for the log."""

    tag: Hashable
    error: str


Fetch = Callable[[Any, Sequence[Wanted], float, str], list[ReadResult]]
_Source = tuple[str, KvFormat | None]
"""A peer, and the format of its blocks if that is not ours."""
Job = ExportJob | FetchJob
Done = ExportDone | FetchDone | FabricFailed


class _Queue:
    """The jobs of one thread; None ends it, after what was put before.

    num_put, num_done: jobs. late_at: when the job under way should have ended at the latest.
    """

    def __init__(self, name: str, run: Callable[[_Queue], None]) -> None:
        self.num_put = 0
        self.num_done = 0
        self.late_at = math.inf
        self.jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=run, args=(self,), name=name, daemon=False)
        self._thread.start()

    def put(self, job: Job) -> None:
        if not self._thread.is_alive():
            raise RuntimeError("a thread of the fabric has died")
        self.num_put += 1
        self.jobs.put(job)

    @property
    def hangs(self) -> bool:
        """Whether the job under way should have ended."""
        return time.monotonic() > self.late_at

    def end(self) -> None:
        self.jobs.put(None)

    def join(self) -> None:
        """Wait for the thread's end, unless it hangs."""
        while self._thread.is_alive() and not self.hangs:
            self._thread.join(_LOOK_S)


class Fabric:
    """The threads of one worker's exports and imports.

    Owns the transports that it opens; `open_transport` is called with a peer's worker id, and the
    format of its blocks if that is not ours, on the thread that will use what it returns, and may
    be called again after a rest. The arena is closed by whoever made it, after `stop`.
    """

    def __init__(
        self,
        arena: Arena,
        open_transport: Callable[[str, KvFormat | None], Transport],
        on_done: Callable[[Done], None],
    ) -> None:
        self._arena = arena
        self._own = MappedArena(arena.fd, arena.geometry.epoch)
        self._open_transport = open_transport
        self._on_done = on_done
        self._stopping = False
        self._copier = _Queue("baton-copier", self._copy)
        self._lock = threading.Lock()  # over the fetchers, which leave by themselves
        self._fetchers: dict[_Source, _Queue] = {}

    def export(self, job: ExportJob) -> None:
        """Copy a block into our store."""
        self._check()
        self._copier.put(job)

    def fetch(self, job: FetchJob) -> None:
        """Fetch blocks from a peer's store, or from our own."""
        self._check()
        if job.grant is None:
            self._copier.put(job)
            return
        problem = self._fetch_from(job, job.grant.source)
        if problem is not None:
            logger.error("%s source=%s", problem, job.grant.source)
            self._on_done(FetchDone(job.tag, (ReadResult.UNREACHABLE,) * len(job.wanted), 0.0))

    def _fetch_from(self, job: FetchJob, name: str) -> str | None:
        """Give a job to the fetcher of its source; returns why that cannot be."""
        source = (name, job.kv_format)
        with self._lock:
            fetcher = self._fetchers.get(source)
            if fetcher is None and len(self._fetchers) < MAX_FETCHERS:
                fetcher = _Queue(f"baton-fetch-{name}", lambda queue: self._fetch(source, queue))
                self._fetchers[source] = fetcher
            if fetcher is None:
                return f"more than {MAX_FETCHERS} peers at once"
            if fetcher.hangs:
                return "a fetch has not returned at its deadline, so nothing more is asked for"
            fetcher.put(job)
            return None

    def copied(self) -> tuple[int, bool]:
        """How many jobs the copier has done, and whether there are more. Any thread may ask."""
        num_done = self._copier.num_done
        return num_done, num_done != self._copier.num_put

    @property
    def hangs(self) -> bool:
        """Whether a fetch has not returned at its deadline. Any thread may ask."""
        with self._lock:
            return any(fetcher.hangs for fetcher in self._fetchers.values())

    def stop(self) -> None:
        """Answer every job submitted so far, but those of threads that hang. Idempotent."""
        self._stopping = True
        with self._lock:
            queues = [self._copier, *self._fetchers.values()]
        for queue in queues:
            queue.end()
        for queue in queues:
            queue.join()
        self._own.close()

    def _check(self) -> None:
        if self._stopping:
            raise RuntimeError("the fabric has stopped")

    # An exception out of on_done ends a thread loudly (threading.excepthook), and the next
    # submission raises: an answer that was lost must not go unnoticed.

    def _copy(self, queue: _Queue) -> None:
        while (job := queue.jobs.get()) is not None:
            done = self._answer(job, self._read_own)
            queue.num_done += 1
            self._on_done(done)

    def _fetch(self, source: _Source, queue: _Queue) -> None:
        opened: list[Transport] = []

        def fetch(*args: Any) -> list[ReadResult]:
            if not opened:
                opened.append(self._open_transport(*source))
            return opened[0].fetch(*args)

        try:
            while True:
                try:
                    job = queue.jobs.get(timeout=REST_AFTER_S)
                except Empty:
                    with self._lock:
                        if queue.jobs.empty():
                            del self._fetchers[source]
                            return
                    continue
                if job is None:
                    return
                assert isinstance(job, FetchJob)
                queue.late_at = job.deadline + OVERDUE_AFTER_S
                done = self._answer(job, fetch)
                queue.late_at = math.inf
                self._on_done(done)
        finally:
            for transport in opened:
                transport.close()

    def _answer(self, job: Job, fetch: Fetch) -> Done:
        started = time.monotonic()
        try:
            if isinstance(job, ExportJob):
                source = job.source() if callable(job.source) else job.source
                digest = self._arena.write(job.frame, job.key, source)
                elapsed_s = time.monotonic() - started
                return ExportDone(job.tag, job.frame, job.key, digest, elapsed_s)
            results = self._results(job, fetch)
            if job.land is not None:
                for index, result in enumerate(results):
                    if result is ReadResult.OK:
                        job.land(index)
            return FetchDone(job.tag, tuple(results), time.monotonic() - started)
        except Exception as error:
            logger.exception("fabric job failed tag=%r", job.tag)
            return FabricFailed(job.tag, f"{type(error).__name__}: {error}")

    def _results(self, job: FetchJob, fetch: Fetch) -> list[ReadResult]:
        def of(wanted: Sequence[Wanted]) -> list[ReadResult]:
            return fetch(job.grant, wanted, job.deadline, job.codec)

        if job.recut is None:
            return of(job.wanted)
        return fetch_recut(job.recut, [want.destination for want in job.wanted], of)

    def _read_own(
        self, grant: Grant | None, wanted: Sequence[Wanted], deadline: float, codec: str
    ) -> list[ReadResult]:
        return self._own.read_all(wanted)
