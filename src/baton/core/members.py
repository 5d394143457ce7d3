"""The workers that take requests, and by whose keys requests are placed.

Workers of one key class have the same keys, and the same blocks, for the same tokens. Where there
are several classes, prompts are told apart by the keys of a worker that computes prompts.

One that stands still takes none and is not among them, but it will hear what it is told.
"""

from __future__ import annotations

from baton.core.life import Content
from baton.core.router import WorkerInfo
from baton.types import Role

_ROLES = (Role.PREFILL, Role.UNIFIED, Role.DECODE)
"""Those that compute prompts come first."""


class Members:
    """Workers by id, with the content of their keys; pure, owned by the request table.

    reference: content and key class of the worker by whose keys requests are placed; when all have
    gone, still that of the last one, and None before the first.
    """

    def __init__(self) -> None:
        self.reference: tuple[Content, str] | None = None
        self._infos: dict[str, WorkerInfo] = {}
        self._contents: dict[str, Content] = {}
        self._frozen: dict[str, tuple[WorkerInfo, Content]] = {}

    def __len__(self) -> int:
        return len(self._infos)

    def __contains__(self, worker_id: str | None) -> bool:
        return worker_id in self._infos

    def add(self, info: WorkerInfo, content: Content) -> None:
        self._frozen.pop(info.worker_id, None)
        self._infos[info.worker_id] = info
        self._contents[info.worker_id] = content
        self._refer()

    def remove(self, worker_id: str) -> None:
        """Idempotent."""
        self._frozen.pop(worker_id, None)
        self._infos.pop(worker_id, None)
        self._contents.pop(worker_id, None)
        self._refer()

    def freeze(self, worker_id: str) -> None:
        """One that is there stands still."""
        frozen = self._infos[worker_id], self._contents[worker_id]
        self.remove(worker_id)
        self._frozen[worker_id] = frozen

    def frozen(self, worker_id: str) -> tuple[WorkerInfo, Content] | None:
        """What it was added with; None if it does not stand still."""
        return self._frozen.get(worker_id)

    def hears(self, worker_id: str | None) -> bool:
        """Whether it is there, or stands still."""
        return worker_id in self._infos or worker_id in self._frozen

    def info(self, worker_id: str | None) -> WorkerInfo | None:
        """None if it is not there."""
        return self._infos.get(worker_id or "")

    def content(self, worker_id: str) -> Content:
        """What its keys depend on; it is there."""
        return self._contents[worker_id]

    def are_alike(self, *worker_ids: str) -> bool:
        """Whether all are there, and blocks go from one to the other under the same keys."""
        classes = {info.key_class if info else None for info in map(self.info, worker_ids)}
        return None not in classes and len(classes) == 1

    def _refer(self) -> None:
        first = min(self._infos.values(), key=_order, default=None)
        if first is not None:
            self.reference = self._contents[first.worker_id], first.key_class


def _order(info: WorkerInfo) -> tuple[int, str]:
    return _ROLES.index(info.role), info.worker_id
