"""The decision logs of a directory: which of them tells of a request, and of its workers."""

from __future__ import annotations

from pathlib import Path

from baton.core import decision_log as log
from baton.errors import BatonError, ConfigError
from baton.planner.explain.facts import Facts, read_facts
from baton.planner.explain.history import History, Key, read_history

HEAD_BYTES = 1 << 16
"""Of a file, that surely hold its header."""


class Logs:
    """What is in a directory, by its headers.

    Raises:
        ConfigError: it cannot be read, or holds no gateway's log.
        BadLog: a file in it is no decision log of this version.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._gateways: list[Path] = []
        self._workers: dict[tuple[str, int], Path] = {}
        try:
            files = sorted(directory.glob("*.log")) if directory.is_dir() else []
            for file in files:
                with file.open("rb") as opened:
                    if head := opened.read(HEAD_BYTES):
                        self._sort(file, head)
        except OSError as error:
            raise ConfigError(f"cannot read {error.filename}: {error.strerror}") from None
        if not self._gateways:
            raise ConfigError(
                f"{directory} holds no decision log of a gateway: serve with --decision-log DIR, "
                "and give that directory"
            )

    def _sort(self, file: Path, head: bytes) -> None:
        try:
            header, _ = log.read(head)
        except log.BadLog as error:
            raise log.BadLog(f"{file}: {error}") from None
        if isinstance(header, log.RouterHeader):
            self._gateways.append(file)
        else:
            self._workers[header.worker_id, header.epoch] = file

    def history(self, wanted: Key) -> History:
        """What the gateway that placed the request tells.

        Raises:
            BadLog: a gateway's log is damaged.
            BatonError: none knows it, or its log begins too late.
        """
        for file in self._gateways:
            try:
                history = read_history(file.read_bytes(), wanted)
            except log.BadLog as error:
                raise log.BadLog(f"{file}: {error}") from None
            if history is not None:
                return history
        number = f", choice {wanted[1]}" if wanted[1] else ""
        raise BatonError(
            f"no gateway's log in {self._directory} knows request {wanted[0]}{number}: look at the "
            "id of the answer; what a running gateway placed last may not be written yet, and "
            "what it refused at the door was never placed"
        )

    def facts(self, history: History) -> dict[str, Facts]:
        """What the workers of that time tell, by id.

        Raises:
            BadLog: a log is not there, is of another start, or cannot be replayed.
        """
        return {
            name: self._facts(name, info.epoch) for name, info in sorted(history.workers.items())
        }

    def _facts(self, name: str, epoch: int) -> Facts:
        file = self._workers.get((name, epoch))
        if file is None:
            if any(name == known for known, _ in self._workers):
                raise log.BadLog(
                    f"the logs of {name} are of other starts than the one that was there: keep "
                    "those of all starts together"
                )
            raise log.BadLog(f"there is no log of {name}: keep those of all processes together")
        try:
            header, records = log.read(file.read_bytes())
            assert isinstance(header, log.WorkerHeader)
            return read_facts(header, records)
        except log.BadLog as error:
            raise log.BadLog(f"{file}: {error}") from None
