"""Starts a program that the kernel kills when its parent dies, however the parent dies.

Run as a script: `python -I -S pdeathsig.py PARENT_PID PROGRAM [ARGUMENT …]`. The program replaces
this one, so its process id and command line are its own; the kernel remembers the setting across
`execve`. Linux only. It imports nothing of Baton, to start in a few milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel send SIGKILL to this process when process `parent_pid` ends.

    Raises:
        OSError: the kernel refused.
        ProcessLookupError: the parent is gone already.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    if os.getppid() != parent_pid:  # it died before the kernel was told
        raise ProcessLookupError(f"parent process {parent_pid} is gone")


def main(arguments: list[str]) -> None:
    parent_pid, *command = arguments
    die_with_parent(int(parent_pid))
    try:
        os.execvp(command[0], command)  # noqa: S606 - the supervisor's own command
    except OSError as error:
        sys.stderr.write(f"cannot run {command[0]}: {error.strerror}\n")
        sys.exit(127)


if __name__ == "__main__":
    main(sys.argv[1:])
