"""Who may have been the cause when a worker is lost: what the gateway's books say.

    with last words    what it names was in the step that failed
    without a word     a suspect that was alone: it was that one (`alone`); if there was none, any
                       leg that it had may have been, so all are suspects, and none is convicted

So a request ends by this only if it was in two such steps for certain, or in one after it may have
been in another; and what stood still beside a suspect counts for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from baton.core.instructions import Proceed
from baton.core.life import LEGS, Life
from baton.core.sequence import SequenceId

Living = Mapping[tuple[str, int], Life]


def blame(living: Living, suspects: Sequence[SequenceId]) -> None:
    """These were in it, by a worker's own word; also by attempts that were given up before."""
    for request_id, choice, attempt in suspects:
        if (life := living.get((request_id, choice))) is not None:
            life.blame(attempt)


def blame_without_a_word(living: Living, worker_id: str) -> None:
    """A worker was ended from one moment to the next."""
    legs = [life for life in living.values() if life.worker_id == worker_id and life.phase in LEGS]
    alone = [life for life in legs if life.is_alone]
    for life in alone:
        life.blame(life.attempt)
    if not alone:
        for life in legs:
            life.suspect()


def leave(life: Life, worker_id: str, begins: bool) -> list[Proceed]:
    """A suspect is about to be alone on its worker, and may; or others go on beside it."""
    life.is_alone = begins
    return [Proceed(worker_id, *life.key, life.attempt)] if begins else []
