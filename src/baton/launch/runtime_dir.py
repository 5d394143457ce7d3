"""The private directory of one deployment: its sockets, secret and resolved configuration.

It is locked while its supervisor lives, so that a later one can tell what a killed one left.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from baton.errors import ConfigError

MAX_SOCKET_PATH: Final = 100  # bytes; the kernel's limit is 107
_LONGEST_NAME: Final = 32
_PREFIX: Final = "baton-"


@contextlib.contextmanager
def runtime_dir() -> Iterator[Path]:
    """A new directory (mode 0700), removed with all that is in it at the end.

    Under `$XDG_RUNTIME_DIR` or the directory for temporary files, whichever first gives socket
    paths of less than `MAX_SOCKET_PATH` bytes.

    Raises:
        ConfigError: neither can be used.
    """
    path = _create()
    lock = os.open(path / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _create() -> Path:
    reasons = []
    for parent in dict.fromkeys((os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp")):  # noqa: S108
        if not parent:
            continue
        try:
            _sweep(Path(parent))
            path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        except OSError as error:
            reasons.append(f"{parent}: {error.strerror}")
            continue
        if len(os.fsencode(path)) + 1 + _LONGEST_NAME < MAX_SOCKET_PATH:
            return path
        path.rmdir()
        reasons.append(f"{parent}: too long for the paths of sockets")
    raise ConfigError(f"no directory for sockets ({'; '.join(reasons)}): set XDG_RUNTIME_DIR")


def _sweep(parent: Path) -> None:
    """Remove directories of ours whose supervisor was killed: their lock is free."""
    for path in parent.glob(f"{_PREFIX}*"):
        try:
            if path.stat(follow_symlinks=False).st_uid != os.getuid():
                continue
            lock = os.open(path / "lock", os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            continue  # not a runtime directory, or not locked yet, or just gone
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            pass  # in use
        finally:
            os.close(lock)
