"""The fabric thread: copies and digests beside the engine, in calls that release the GIL.

The engine thread submits jobs and gets exactly one answer for each by `on_done`, which is called
on the fabric thread and must only pass the answer on (`inbox.put`). Jobs run one at a time in the
order of submission. Blocks and frames that a job names belong to it until its answer: a KV block
that is being imported, or exported, may be freed only then.

The thread sleeps when there is nothing to do; once it has slept for `REST_AFTER_S` it has the
transport give up the peers' memory that it keeps mapped, so that an idle worker pins nobody's
store. It is no daemon: the owner calls `stop`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable
from queue import Empty, SimpleQueue
from typing import Final

import msgspec

from baton.fabric.arena import Arena
from baton.fabric.transport import ReadableBlock, ReadResult, Transport, Wanted
from baton.types import Grant

logger = logging.getLogger(__name__)

REST_AFTER_S: Final = 2.0


class ExportJob(msgspec.Struct, frozen=True, eq=False):
    """Copy a block from `source` into a frame of our own store. The answer carries `tag`.

    source: the block, or what is called on the fabric thread to get at it (a copy off a GPU).
    """

    tag: Hashable
    frame: int
    key: bytes
    source: ReadableBlock | Callable[[], ReadableBlock]


class FetchJob(msgspec.Struct, frozen=True, eq=False):
    """Fetch blocks from another worker's store by `deadline` (instant of `time.monotonic()`).

    land: called on the fabric thread with the index of each block that came whole, before the
    answer (a copy onto a GPU).
    """

    tag: Hashable
    grant: Grant
    wanted: tuple[Wanted, ...]
    deadline: float
    land: Callable[[int], None] | None = None


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


Job = ExportJob | FetchJob
Done = ExportDone | FetchDone | FabricFailed


class _Forget(msgspec.Struct, frozen=True):
    source: str


class FabricThread:
    """One thread that serves one worker's exports and imports.

    Owns nothing: arena and transport are closed by whoever made them, after `stop`.
    """

    def __init__(self, arena: Arena, transport: Transport, on_done: Callable[[Done], None]) -> None:
        self._arena = arena
        self._transport = transport
        self._on_done = on_done
        self._jobs: SimpleQueue[Job | _Forget | None] = SimpleQueue()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="baton-fabric", daemon=False)
        self._thread.start()

    def export(self, job: ExportJob) -> None:
        self._submit(job)

    def fetch(self, job: FetchJob) -> None:
        self._submit(job)

    def forget(self, source: str) -> None:
        """Let the transport drop what it keeps of a worker that is gone. Has no answer."""
        self._submit(_Forget(source))

    def stop(self) -> None:
        """Answer every job submitted so far, then end the thread. Idempotent."""
        if not self._stopping:
            self._stopping = True
            self._jobs.put(None)
        self._thread.join()

    def _submit(self, job: Job | _Forget) -> None:
        if self._stopping or not self._thread.is_alive():
            raise RuntimeError("the fabric thread has stopped")
        self._jobs.put(job)

    def _run(self) -> None:
        resting = True
        while True:
            try:
                job = self._jobs.get(timeout=None if resting else REST_AFTER_S)
            except Empty:
                resting = True
                self._transport.rest()
                continue
            resting = False
            if job is None:
                return
            if isinstance(job, _Forget):
                self._forget(job.source)
            else:
                # An exception out of on_done ends the thread loudly (threading.excepthook), and
                # the next submission raises: an answer that was lost must not go unnoticed.
                self._on_done(self._perform(job))

    def _perform(self, job: Job) -> Done:
        started = time.monotonic()
        try:
            if isinstance(job, ExportJob):
                source = job.source() if callable(job.source) else job.source
                digest = self._arena.write(job.frame, job.key, source)
                elapsed_s = time.monotonic() - started
                return ExportDone(job.tag, job.frame, job.key, digest, elapsed_s)
            results = self._transport.fetch(job.grant, job.wanted, job.deadline)
            if job.land is not None:
                for index, result in enumerate(results):
                    if result is ReadResult.OK:
                        job.land(index)
            return FetchDone(job.tag, tuple(results), time.monotonic() - started)
        except Exception as error:
            logger.exception("fabric job failed tag=%r", job.tag)
            return FabricFailed(job.tag, f"{type(error).__name__}: {error}")

    def _forget(self, source: str) -> None:
        try:
            self._transport.forget(source)
        except Exception:
            logger.exception("cannot forget source=%r", source)
