"""How Baton's processes write their logs: one line an event, `key=value`, to stderr."""

from __future__ import annotations

import logging

FORMAT = "%(asctime)s %(levelname)s {process} %(name)s %(message)s"


def setup_logging(level: str, process: str) -> None:
    """Send this process's log to stderr, each line with the name of the process."""
    logging.basicConfig(
        level=level.upper(), format=FORMAT.format(process=process), datefmt="%H:%M:%S", force=True
    )
    # Their INFO is one line a request, which is ours to write.
    for noisy in ("httpx", "httpcore", "asyncio", "uvicorn.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
