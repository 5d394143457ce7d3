"""Suspects: sequences that were, or may have been, in a step which took its worker along. Their
first steps are made without others, so that, if it happens again, one request has done it, and only
that one ends.

    waiting ──admitted, one at a time──▶ asks for leave ──given──▶ steps of its own
                    ▲                                                │   └──`ALONE_TOKENS` drawn──▶
                    └──────────── had to give its blocks back ───────┘             like any other

Others keep their blocks meanwhile and stand still for a prompt and a few tokens, which is short.
Were a suspect alone to its end, or were it to wait until nothing else runs, then a worker that
crashed with a full batch would serve its requests one after the other, each for a whole answer.

By then a suspect has computed its prompt and what it had emitted, and has drawn what was being
drawn when the step failed: it has got on, and counts as any other. What fails at a later token, in
whatever company, is bounded by the number of times that a request is placed again.

A step of its own is one beside which no other is in flight. Before the first of them the gateway is
told, and the step waits until it is known there: a worker that the kernel ends says nothing any
more, and a word that it has only sent may never arrive.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from baton.core.sequence import Sequence, SequenceId, Status
from baton.types import Alone

if TYPE_CHECKING:
    from baton.core.scheduler import Scheduler

ALONE_TOKENS = 4
"""The token that was being drawn, one that may have been drawn ahead of it, and two more."""

_ACTIVE = (Status.RUNNING, Status.IMPORTING)


def has_got_on(num_drawn: int) -> bool:
    """Whether a suspect whose leg has brought `num_drawn` tokens is none any more."""
    return num_drawn >= ALONE_TOKENS


def running(scheduler: Scheduler) -> Sequence | None:
    """The suspect that has the next step to itself; those that have got on are none any more."""
    suspects = scheduler._suspects
    found = None
    for seq in list(suspects.values()):
        if has_got_on(seq.num_generated - len(seq.request.emitted)):
            del suspects[seq.id]
        elif seq.status is Status.RUNNING:
            found = seq
    return found


def may_enter(scheduler: Scheduler, seq: Sequence) -> bool:
    """Whether `seq` may be admitted: anyone may, but of suspects one at a time."""
    suspects = scheduler._suspects
    return seq.id not in suspects or not any(s.status in _ACTIVE for s in suspects.values())


def plan(scheduler: Scheduler) -> bool:
    """Plan a step of the running suspect's own. Returns whether it is: others must wait.

    It is, but an empty one, as long as something else is in flight or leave is awaited; it is not
    if there is none, or if it has just had to give its blocks back.
    """
    seq = running(scheduler)
    if seq is None:
        return False
    if scheduler._in_flight.has_only(seq.id):
        if seq.leave is None:
            seq.leave = False
            scheduler._update.alone.append(Alone(*seq.id))
        elif seq.leave and scheduler._is_ready(seq) and scheduler._grow(seq):
            scheduler._plan(seq)
    return seq.status is Status.RUNNING


def give_leave(scheduler: Scheduler, seq_id: SequenceId) -> None:
    """The gateway knows that this suspect is alone now. Nothing, if it does not wait for that."""
    seq = scheduler._suspects.get(seq_id)
    if seq is not None and seq.leave is False:
        seq.leave = True


def gives_way(scheduler: Scheduler, seq: Sequence) -> None:
    """`seq` gives its blocks back: if it was alone, others go on beside it."""
    if seq.leave is not None and seq.id in scheduler._suspects:
        scheduler._update.alone.append(Alone(*seq.id, begins=False))
    seq.leave = None
