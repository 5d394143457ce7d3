"""What it takes a worker to tell a gateway of its steps, for `baton profile`.

The engine's thread is not alone in its process: for each step the event loop encodes a report and
writes it to the gateway's stream, on the worker's own cores. Steps of a small model take little
longer than that. So the real server tells of them here, on an event loop in a thread of its own,
and a second process reads along in the gateway's place:

    python -m baton.worker.telling RUNTIME_DIR
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import uvloop

from baton.engine.engine import Emitted
from baton.errors import BatonError
from baton.rpc.auth import create_secret, read_secret
from baton.rpc.client import WorkerLink
from baton.rpc.messages import Hello, Instructions
from baton.rpc.server import WorkerServer
from baton.types import KvFormat, Role, WorkerLoad

READER = "profile"
START_TIMEOUT_S = 30.0
SETTLE_S = 0.05
_TASKS = Path("/proc/self/task")


class Telling:
    """Tells one reader of every step. `told` and `cpu_s` are for the engine's thread."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, secret: bytes, others: frozenset[str]
    ) -> None:
        self.server = WorkerServer(_hello, self, secret)
        self.is_read = threading.Event()
        self._loop = loop
        self._others = others  # threads that do something else

    def told(self, emitted: Emitted) -> None:
        """A step ended; to be called as a worker's engine calls its `emit`."""
        self._loop.call_soon_threadsafe(self._tell, emitted)

    def cpu_s(self) -> float:
        """CPU seconds that telling has taken so far, in all threads that it has."""
        asyncio.run_coroutine_threadsafe(asyncio.sleep(SETTLE_S), self._loop).result()
        spent_ns = 0
        for task in set(os.listdir(_TASKS)) - self._others:
            with contextlib.suppress(FileNotFoundError):  # it has just ended
                spent_ns += int((_TASKS / task / "schedstat").read_text().split()[0])
        return spent_ns / 1e9

    def _tell(self, emitted: Emitted) -> None:
        update = emitted.update
        self.server.report(
            READER,
            load=emitted.load,
            deltas=tuple(update.deltas),
            times=tuple(update.times),
            counters=emitted.counters,
            step=emitted.step,
        )

    # `rpc.server.WorkerHandler` ---------------------------------------------------------------

    def opened(self, gateway_id: str, epoch: int, resumed: bool) -> None:
        self.server.report(gateway_id, load=WorkerLoad())
        self.is_read.set()

    def instructions(self, gateway_id: str, instructions: Instructions) -> None: ...

    def lost(self, gateway_id: str) -> None: ...

    def forgotten(self, gateway_id: str) -> None: ...


@contextlib.contextmanager
def telling() -> Iterator[Telling]:
    """A server that is read from.

    Raises:
        BatonError: its reader does not come, or the kernel does not count what it takes.
    """
    if not Path("/proc/self/schedstat").exists():
        raise BatonError(
            "this kernel does not count the CPU time of threads (no /proc/self/schedstat), "
            "so a profile would be too fast: measure on one that does"
        )
    others = frozenset(os.listdir(_TASKS))
    with tempfile.TemporaryDirectory(prefix="baton-profile-") as name, uvloop_thread() as loop:
        secret = create_secret(Path(name))
        made = Telling(loop, secret, others)
        _on(loop, made.server.start(f"unix:{name}/{READER}.sock"))
        words = (sys.executable, "-m", "baton.worker.telling", name)
        reader = subprocess.Popen(words, stdin=subprocess.PIPE)  # noqa: S603
        try:
            if not made.is_read.wait(START_TIMEOUT_S):
                raise BatonError("the process that reads reports did not start: try again")
            yield made
        finally:
            reader.communicate()  # its input ends, and so does it
            _on(loop, made.server.stop(0.0))


@contextlib.contextmanager
def uvloop_thread() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop that runs in a thread of its own."""
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="telling")
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def _on(loop: asyncio.AbstractEventLoop, doing: object) -> None:
    asyncio.run_coroutine_threadsafe(doing, loop).result(START_TIMEOUT_S)  # type: ignore[arg-type]


def _hello() -> Hello:
    return Hello(
        worker_id=READER, role=Role.UNIFIED, epoch=1, model="", fingerprint=bytes(32), numerics="",
        kv_format=KvFormat(16, "float32", 1, 1, 1, 64), num_blocks=1, max_model_len=1,
        max_num_seqs=1, max_num_batched_tokens=1, vocab_size=1, device="cpu", dtype="float32",
    )  # fmt: skip


async def _read(runtime_dir: Path) -> None:
    """Read until standard input ends."""
    address, secret = f"unix:{runtime_dir}/{READER}.sock", read_secret(runtime_dir)
    link = WorkerLink(
        address, READER, 1, secret, lambda hello: None, lambda report: None, lambda reason: None
    )
    link.start()
    await asyncio.to_thread(sys.stdin.buffer.read)
    await link.close()


if __name__ == "__main__":
    with contextlib.suppress(OSError):
        # On any core: those of the worker are for the worker.
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    uvloop.run(_read(Path(sys.argv[1])))
