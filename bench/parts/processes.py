"""Processes that a measurement starts: their CPU time, and their end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

BENCH_DIR = Path(__file__).parent.parent


@contextlib.contextmanager
def running(*arguments: str, stdout: int | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """`python ARGUMENTS…` until the block ends; then SIGTERM, and SIGKILL for the stubborn."""
    paths = [str(BENCH_DIR), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=stdout,
        stderr=stdout,
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def cpu_s(pid: int) -> float:
    """CPU seconds of all threads of a process so far, from its own kernel clock (ns steps)."""
    return time.clock_gettime((~pid << 3) | 2)


def wait_until(
    condition: Callable[[], bool], process: subprocess.Popen[bytes], timeout_s: float = 120.0
) -> None:
    """Wait until `condition`, which `process` is to bring about.

    Raises:
        RuntimeError: `process` ended, or time is up.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended with code {process.returncode}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"{process.args!r} is not ready after {timeout_s:g} s")
        time.sleep(0.05)
