"""The worker process: signals, logging, exit code.

SIGTERM, SIGINT   drain: finish what runs, take nothing new, exit 0
a second one      exit 1 at once
an engine error   exit 1; the supervisor restarts, the gateway ends or re-places the requests
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from pathlib import Path

import uvloop

from baton.config import Config
from baton.observe.logs import open_decision_log, setup_logging
from baton.observe.progress import loading_progress
from baton.types import Role
from baton.worker.worker import Worker

logger = logging.getLogger(__name__)


def run(
    config: Config,
    role: Role,
    worker_id: str,
    runtime_dir: Path,
    gateways: list[str],
    weights_fd: int | None = None,
) -> int:
    """Run one worker until it is drained or fails; returns the exit code.

    `weights_fd`, the memfd in which this host's workers share packed weights, is closed.

    Raises:
        ConfigError, ModelError: it cannot start.
    """
    setup_logging(config.log.level, worker_id)
    logger.info("loading role=%s model=%s", role, config.model.path)
    decisions = open_decision_log(config.log.decision_log, worker_id)
    sink = decisions.write if decisions else None
    with loading_progress(f"{worker_id}: loading weights") as progress:
        worker = Worker(
            config,
            role,
            worker_id,
            runtime_dir,
            gateways,
            weights_fd=weights_fd,
            progress=progress,
            decision_sink=sink,
        )
    if weights_fd is not None:
        os.close(weights_fd)  # what it holds stays mapped
    code = uvloop.run(_serve(worker))
    if code == 0:
        worker.close()
    if decisions is not None:
        decisions.close()
    logging.shutdown()
    # The engine's and the fabric's threads may be stuck in whatever broke: do not wait for them.
    if code != 0 or worker.hangs:
        os._exit(code)
    return code


async def _serve(worker: Worker) -> int:
    loop = asyncio.get_running_loop()
    heard = 0

    def stop() -> None:
        nonlocal heard
        heard += 1
        if heard == 1:
            worker.drain()
        else:
            worker.end(1)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    return await worker.run()
