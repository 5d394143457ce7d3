"""How Baton's processes write their logs: one line an event, `key=value`, to stderr."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import BinaryIO

from baton.errors import ConfigError

FORMAT = "%(asctime)s %(levelname)s {process} %(name)s %(message)s"


def setup_logging(level: str, process: str) -> None:
    """Send this process's log to stderr, each line with the name of the process."""
    logging.basicConfig(
        level=level.upper(), format=FORMAT.format(process=process), datefmt="%H:%M:%S", force=True
    )
    # Their INFO is one line a request, which is ours to write.
    for noisy in ("httpx", "httpcore", "asyncio", "uvicorn.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def open_decision_log(directory: str | None, process: str) -> BinaryIO | None:
    """A new decision log of this process in `directory`; None if none is asked for.

    Raises:
        ConfigError: it cannot be written there.
    """
    if directory is None:
        return None
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        return (Path(directory) / f"{process}-{os.getpid()}.log").open("wb")
    except OSError as error:
        raise ConfigError(f"log.decision_log: cannot write to {directory}: {error}") from error
