"""What a worker of the twin tells the gateway: the news of one or several steps."""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.types import Alone, Handoff, Landed, Sealed, StageTimes, TokenDelta


class Tokens:
    """Successive tokens of one leg, from delta to delta, with the instants at which they came."""

    __slots__ = ("first", "last", "times")

    def __init__(self, delta: TokenDelta, times: list[float]) -> None:
        self.times = times
        self.first = self.last = delta

    def delta(self) -> TokenDelta:
        """All of them as one. A leg's tokens are all the same, so they need not be kept."""
        first, last = self.first, self.last
        if first is last:
            return first
        ids = (first.token_ids or last.token_ids)[:1]
        return TokenDelta(
            first.request_id,
            first.choice,
            first.attempt,
            first.first_index,
            ids * len(self.times),
            None,
            last.finish,
            last.error,
            first.num_cached,
        )


@dataclass(slots=True)
class Report:
    tokens: list[Tokens] = field(default_factory=list)
    sealed: list[Sealed] = field(default_factory=list)
    landed: list[Landed] = field(default_factory=list)
    handoffs: list[Handoff] = field(default_factory=list)
    times: list[StageTimes] = field(default_factory=list)
    alone: list[Alone] = field(default_factory=list)
