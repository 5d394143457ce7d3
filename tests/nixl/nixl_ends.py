"""Both ends of the nixl transport in tests: a store in another process, and fetching from it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import msgspec
from nixl_writer import Hello, Task, content, frame, key

import baton
from baton.fabric.nixl import NixlTransport
from baton.fabric.transport import ReadResult, Wanted
from baton.types import KvFormat

# A length that is no whole number of pages, and blocks for several banks.
KV_FORMAT = KvFormat(16, "float32", 2, 2, 8, 300_000)
NUM_BLOCKS = 40
SOURCE_DIR = Path(baton.__file__).parents[1]
TESTS_DIR = Path(__file__).parent


class Writer:
    """A store in a process of its own. environment: more of it, for NIXL there; host: see `Task`;
    prefix: of its command."""

    def __init__(
        self,
        runtime_dir: Path,
        epoch: int = 1,
        source: str = "p0",
        environment: dict[str, str] | None = None,
        host: str = "",
        prefix: tuple[str, ...] = (),
    ) -> None:
        self.epoch = epoch
        self.runtime_dir = runtime_dir
        task = Task(str(runtime_dir), source, epoch, NUM_BLOCKS, KV_FORMAT, host)
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "nixl_writer", msgspec.json.encode(task).decode()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": f"{SOURCE_DIR}:{TESTS_DIR}"} | (environment or {}),
            text=True,
        )
        self.hello = msgspec.json.decode(self.read_line(), type=Hello)

    @property
    def serving_pid(self) -> int | None:
        """The serving process that there is now."""
        return children_of(self.process.pid)[-1] if children_of(self.process.pid) else None

    def read_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, line: str) -> None:
        self.begin(line)
        assert self.read_line() == "done"

    def begin(self, line: str) -> None:
        assert self.process.stdin is not None
        print(line, file=self.process.stdin, flush=True)

    def kill(self) -> None:
        """The worker; its serving process ends with it."""
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        """The worker and its serving process."""
        for pid in (self.process.pid, *children_of(self.process.pid)):
            os.kill(pid, signal.SIGSTOP)
            wait_until(lambda pid=pid: state_of(pid) in "Tt")

    def thaw(self) -> None:
        for pid in (*children_of(self.process.pid), self.process.pid):
            os.kill(pid, signal.SIGCONT)

    def kill_all(self) -> None:
        """As when the host goes down."""
        for pid in children_of(self.process.pid):
            os.kill(pid, signal.SIGKILL)
        self.kill()

    def close(self) -> None:
        children = children_of(self.process.pid)
        for pid in (self.process.pid, self.hello.serving_pid, *children):
            if state_of(pid) in "Tt":
                os.kill(pid, signal.SIGCONT)
        self.process.communicate("stop\n" if self.process.poll() is None else None, timeout=10)
        for pid in (self.hello.serving_pid, *children):
            wait_until(lambda pid=pid: state_of(pid) in "ZX")


class Fetched(NamedTuple):
    results: list[ReadResult]
    num_right: int
    elapsed_s: float


def fetch(
    transport: NixlTransport, writer: Writer, seconds: float = 10.0, num_blocks: int = NUM_BLOCKS
) -> Fetched:
    """Fetch the first blocks, last one first; `num_right` counts blocks whose bytes are right."""
    blocks = list(reversed(range(num_blocks)))
    places = {block: bytearray(KV_FORMAT.block_bytes) for block in blocks}
    wanted = [
        Wanted(key(block), frame(block, NUM_BLOCKS), writer.hello.digests[block], places[block])
        for block in blocks
    ]
    started = time.monotonic()
    results = transport.fetch(writer.hello.grant, wanted, started + seconds)
    elapsed_s = time.monotonic() - started
    right = [place == expected(block, writer.epoch) for block, place in places.items()]
    for result, is_right in zip(results, right, strict=True):
        assert is_right or result is not ReadResult.OK
    return Fetched(results, sum(right), elapsed_s)


_expected: dict[tuple[int, int], bytes] = {}


def expected(block: int, epoch: int) -> bytes:
    if (block, epoch) not in _expected:
        _expected[block, epoch] = content(block, epoch, KV_FORMAT.block_bytes)
    return _expected[block, epoch]


def children_of(pid: int) -> list[int]:
    """Living children of a process, oldest first."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == pid and state not in "ZX":
            found.append(int(path.parent.name))
    return sorted(found)


def state_of(pid: int) -> str:
    """The kernel's letter for what the process is doing; X if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def wait_until(condition: object, seconds: float = 10.0) -> None:
    assert callable(condition)
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.002)
