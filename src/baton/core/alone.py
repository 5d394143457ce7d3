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

from baton.core.sequence import Sequence, SequenceId, Status
from baton.types import Alone

ALONE_TOKENS = 4
"""The token that was being drawn, one that may have been drawn ahead of it, and two more."""

_ACTIVE = (Status.RUNNING, Status.IMPORTING)


def has_got_on(num_drawn: int) -> bool:
    """Whether a suspect whose leg has brought `num_drawn` tokens is none any more."""
    return num_drawn >= ALONE_TOKENS


class Suspects(dict[SequenceId, Sequence]):
    """Those of one worker that have not ended and have not got on; pure, kept in its books."""

    def running(self) -> Sequence | None:
        """The one that has the next step to itself; those that have got on are taken out."""
        found = None
        for seq in list(self.values()):
            if has_got_on(seq.num_generated - len(seq.request.emitted)):
                del self[seq.id]
            elif seq.status is Status.RUNNING:
                found = seq
        return found

    def may_enter(self, seq: Sequence) -> bool:
        """Whether `seq` may be admitted: anyone may, but of suspects one at a time."""
        return seq.id not in self or not any(each.status in _ACTIVE for each in self.values())

    def ask(self, seq: Sequence) -> Alone | None:
        """What the gateway is to be told before the first of its steps; None if it was told."""
        if seq.leave is not None:
            return None
        seq.leave = False
        return Alone(*seq.id)

    def give_leave(self, seq_id: SequenceId) -> None:
        """The gateway knows that this one is alone now. Nothing, if it does not wait for that."""
        seq = self.get(seq_id)
        if seq is not None and seq.leave is False:
            seq.leave = True

    def give_way(self, seq: Sequence) -> Alone | None:
        """`seq` gives its blocks back. What is to be told if it was alone: others go on."""
        was_alone = seq.leave is not None and seq.id in self
        seq.leave = None
        return Alone(*seq.id, begins=False) if was_alone else None
