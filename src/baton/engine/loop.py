"""The engine thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from baton.engine.engine import Engine
from baton.engine.inbox import Message, Stop

logger = logging.getLogger(__name__)


class EngineLoop:
    """Steps an engine on a thread of its own; blocks when there is nothing to do.

    An exception inside a step ends the loop and is handed to `on_failed`, on the engine thread:
    whoever runs the process must end it. The engine is never used again.
    """

    def __init__(self, engine: Engine, on_failed: Callable[[BaseException], None]) -> None:
        self._engine = engine
        self._on_failed = on_failed
        self._thread = threading.Thread(target=self._run, name="baton-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, message: Message) -> None:
        """Tell the engine something; it hears it before its next step."""
        self._engine.inbox.put(message)

    def stop(self) -> None:
        """End the loop after the running step, and wait for that."""
        self.put(Stop())
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._engine.stopping:
                if not self._engine.step() and not self._engine.stopping:
                    self._engine.wait()
        except BaseException as error:  # the process ends with it, so nothing is swallowed
            logger.exception("engine failed")
            self._on_failed(error)
