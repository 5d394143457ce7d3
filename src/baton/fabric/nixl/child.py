"""The serving process as its worker sees it: started, heard of, fed, started again.

starting ──registered──► serving ──its output ends──► ended ──after a pause──► starting
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import time
from typing import Final

import msgspec

from baton.fabric.descriptors import LENGTH
from baton.fabric.nixl.wire import MAX_REPLY_BYTES, Registered, decode_registered

logger = logging.getLogger(__name__)

FIRST_PAUSE_S: Final = 0.05
MAX_PAUSE_S: Final = 5.0
STEADY_S: Final = 30.0
"""A process that served for so long has earned a quick start when it ends."""
STOP_TIMEOUT_S: Final = 2.0


class Child:
    """One serving process after another for the arena behind `descriptor`; used by one thread.

    num_starts counts them, the first included.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self.registered: Registered | None = None
        self.num_starts = 0
        self.restart_at: float | None = None
        self._descriptor = descriptor
        self._name = name
        self._pause_s = FIRST_PAUSE_S
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._heard = bytearray()

    def start(self) -> int:
        """Start a process; returns the descriptor to wait at, then call `hear`."""
        self.num_starts += 1
        self._started_at = time.monotonic()
        self._heard = bytearray()
        self.restart_at = None
        module = f"{__package__}.serving"
        name = f"{self._name}-{self.num_starts}"
        self._process = subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-m", module, str(self._descriptor), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(self._descriptor,),
            bufsize=0,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        os.set_blocking(self._process.stdout.fileno(), False)
        return self._process.stdout.fileno()

    def hear(self) -> bool:
        """Take what the process has said. False when it has ended: forget its descriptor first,
        then call `bury`."""
        assert self._process is not None and self._process.stdout is not None
        try:
            data = os.read(self._process.stdout.fileno(), MAX_REPLY_BYTES)
        except BlockingIOError:
            return True
        if not data:
            return False
        self._heard += data
        try:
            if len(self._heard) >= LENGTH.size:
                end = LENGTH.size + int(LENGTH.unpack_from(self._heard)[0])
                if len(self._heard) == end:
                    self.registered = decode_registered(bytes(self._heard[LENGTH.size :]))
        except msgspec.DecodeError as error:
            logger.error("the NIXL serving process does not make sense error=%s", error)
            self._process.kill()
        return True

    def bury(self) -> None:
        """The process has closed its output: wait for its end, and say when to start another."""
        code = self._end()
        if time.monotonic() - self._started_at > STEADY_S:
            self._pause_s = FIRST_PAUSE_S
        self.restart_at = time.monotonic() + self._pause_s
        logger.warning("the NIXL serving process ended code=%d restart_s=%s", code, self._pause_s)
        self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)

    def feed(self) -> None:
        """Have the process make progress for a while."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(b"\0")  # a full pipe is food enough: returns None

    def stop(self) -> None:
        """End the process. Idempotent."""
        if self._process is not None:
            self._end()

    def _end(self) -> int:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        self.registered = None
        self._process = None
        process.stdin.close()
        try:
            code = process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        process.stdout.close()
        return code
