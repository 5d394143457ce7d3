"""Which prompt goes next: the one with the least work left, but nobody is passed for ever.

Prompts, running or waiting, are ranked by

    PASSING * (tokens left to compute) + (tokens of prompts admitted before it came)

and the smallest goes first. So a short prompt passes a long one at the end of a chunk, and the
long one keeps its blocks meanwhile. The second term is its age, told by a clock that counts the
work of others instead of seconds, so that the rule is the same on any machine: the clock moves on
by the tokens of each sequence that is admitted, whether they are then computed, found in the
cache or fetched. A sequence with n tokens left is passed only by those that come before another
PASSING * n tokens have been admitted; whoever comes later ranks behind it, however short. As the
head of the queue waits for blocks and frames without being passed, big ones are not starved by
small ones either.

What was preempted goes before all that was not, in the order in which it came: its client has
begun to read.

Shortest remaining time first has the least mean waiting time there is (Schrage, 1968).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from baton.core.sequence import Sequence, SequenceId

PASSING = 4
"""How many times its own work, in tokens of others admitted meanwhile, a prompt is passed for."""

Rank = tuple[bool, int, int]


def rank(seq: Sequence) -> Rank:
    """Smaller goes first; ties go to whoever came first.

    Of a sequence that arrives with its KV ready elsewhere, one token is left. What the prefix
    cache will spare is known only at admission, and not counted before.
    """
    if seq.num_preemptions:
        return (False, 0, seq.order)
    fetched = not seq.blocks and seq.request.handoff is not None
    remaining = 1 if fetched else seq.num_unscheduled
    return (True, PASSING * remaining + seq.admitted_before, seq.order)


class PromptQueue:
    """Sequences that wait for admission, in order of rank; it cannot change while they wait."""

    def __init__(self) -> None:
        self._ranked: list[tuple[Rank, Sequence]] = []
        self._ranks: dict[SequenceId, Rank] = {}

    def __len__(self) -> int:
        return len(self._ranked)

    def __iter__(self) -> Iterator[Sequence]:
        return (seq for _, seq in self._ranked)

    def __contains__(self, seq_id: SequenceId) -> bool:
        return seq_id in self._ranks

    @property
    def head(self) -> Sequence:
        return self._ranked[0][1]

    def add(self, seq: Sequence) -> None:
        entry = (rank(seq), seq)
        self._ranks[seq.id] = entry[0]
        insort(self._ranked, entry, key=_rank_of)

    def discard(self, seq_id: SequenceId) -> None:
        """Take a sequence out, if it is in."""
        found = self._ranks.pop(seq_id, None)
        if found is not None:
            del self._ranked[bisect_left(self._ranked, found, key=_rank_of)]


def _rank_of(entry: tuple[Rank, Sequence]) -> Rank:
    return entry[0]
