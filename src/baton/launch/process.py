"""One child process: started in a session of its own, its output passed on, its end told."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Final

from baton.launch import pdeathsig
from baton.launch.console import Console

KEPT_LINES: Final = 20
MAX_LINE_BYTES: Final = 16 << 10
_LAST_OUTPUT_S: Final = 0.5


class Child:
    """A program that may be started again and again under one name.

    A session of its own keeps a terminal's Ctrl-C from it: the supervisor alone decides in which
    order processes stop. The kernel kills it if the supervisor dies.

    Args:
        environment: variables in addition to ours.
        descriptors: of ours, which the program finds open under the same numbers.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        console: Console,
        *,
        environment: Mapping[str, str] | None = None,
        descriptors: Collection[int] = (),
    ) -> None:
        self.name = name
        self.last_lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._command = command
        self._console = console
        self._environment = environment or {}
        self._descriptors = descriptors
        self._process: asyncio.subprocess.Process | None = None

    async def run(self) -> int:
        """Start the program and wait for its end; negative codes are signals.

        Nothing of its process group is left when this returns.

        Raises:
            OSError: it cannot be started.
        """
        self.last_lines.clear()
        guard = (sys.executable, "-I", "-S", str(Path(pdeathsig.__file__)), str(os.getpid()))
        # A pipe of our own: with asyncio's, wait() would also wait for whoever inherited it.
        read_end, write_end = os.pipe()
        output = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(output), os.fdopen(read_end, "rb")
        )
        reading = asyncio.create_task(self._pass_on(output))
        try:
            self._process = await asyncio.create_subprocess_exec(
                *guard,
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=write_end,
                stderr=write_end,
                start_new_session=True,
                env={**os.environ, **self._environment},
                pass_fds=tuple(self._descriptors),
            )
            os.close(write_end)
            write_end = -1
            return await self._process.wait()
        finally:
            if write_end >= 0:
                os.close(write_end)
            self.kill()  # what it may have started itself, too
            self._process = None
            await asyncio.wait({reading}, timeout=_LAST_OUTPUT_S)
            reading.cancel()
            transport.close()

    def terminate(self) -> None:
        """Ask the program to stop (SIGTERM); no error if it does not run."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the program and its process group; no error if it does not run."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def _pass_on(self, output: asyncio.StreamReader) -> None:
        rest = b""
        while data := await output.read(1 << 16):
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > MAX_LINE_BYTES:
                lines.append(rest)
                rest = b""
            for line in lines:
                self._line(line)
        if rest:
            self._line(rest)

    def _line(self, data: bytes) -> None:
        text = data[:MAX_LINE_BYTES].decode(errors="replace").rstrip("\r")
        self.last_lines.append(text)
        self._console.child_line(self.name, text)


def describe_exit(code: int) -> str:
    """`exit code 1`, `signal SIGKILL`."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"
