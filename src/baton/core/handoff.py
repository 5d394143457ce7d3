"""The gateway's half of every request's life, from placement to the terminal delta.

                        ┌────────── a worker joins ──────────┐
                        ▼                                    │
    add ──────────▶ placed ──▶ BORROWING ──lent, late──▶ FIRST ──Handoff──▶ SECOND
                        │                                ▲   │                 │
                        └──────── no lender ─────────────┘   └──── finish ─────┴──▶ ENDED
    its worker is lost, or refuses because it drains: placed again, with a higher attempt and what
    was emitted; nobody can take it: WAITING for a worker to join, for `max_wait_s` at most;
    budget or deadline used up: ENDED with a typed error. `abandon` ends it from anywhere.

FIRST is a prompt to be handed off, or a whole request on one worker; blocks that are sealed in the
first case are offered to the decode worker, which may fetch them early. Handoffs are passed on when
they arrive, not when the client reads: a slow client holds no lease. Only the present leg's worker
and the present attempt are believed, each token once and in order; anything else is counted as
stale, and what it holds is let go.

The table owns every lease: it renews while somebody may still read, and releases a prompt's when
the decode worker has shown its first token, a lender's when the prompt is computed, and all at
whatever end comes first.

No clock, no sockets: `now` is any clock that does not go back, in seconds, the same in every call.
A driver calls a method, carries out what `take` then returns, and calls `tick` at
`next_deadline`, or later. Messages of a worker must be those of the start that joined last.
"""

from __future__ import annotations

import heapq
from collections import Counter

import msgspec

from baton.core.keys import chain, root_key
from baton.core.life import (
    Ask,
    HandoffPolicy,
    Instruction,
    Life,
    Offer,
    Phase,
    Release,
    Renew,
    Submit,
    Withdraw,
)
from baton.core.router import Router, WorkerInfo
from baton.errors import (
    DeadlineExceeded,
    Internal,
    ServeError,
    Unavailable,
    WorkerLost,
    from_wire,
)
from baton.types import FinishReason, Handoff, Landed, Lend, Request, Sealed, StageTimes, TokenDelta

COUNTERS = ("lenders_late", "stale_messages", "placed_again", "retries_exhausted")
"""Running totals, there from the start; `baton_gateway_events_total` tells what they mean."""


class Outcome(msgspec.Struct):
    """What one or more calls brought: for the workers, and for the clients.

    instructions: in order; of one worker they must arrive in this order. deltas: in order; one
    with `finish` is its choice's last.
    """

    instructions: list[Instruction] = []
    deltas: list[TokenDelta] = []


class Content(msgspec.Struct, frozen=True):
    """What all workers agree on, and their blocks' keys depend on (see `keys.root_key`)."""

    fingerprint: bytes
    numerics: str
    block_size: int


class RequestTable:
    """All living requests of one gateway. Pure; every call is deterministic in its arguments.

    The table alone calls the router's `join`, `leave`, `place`, `timed`, `kept`, `prefilled` and
    `finished`; so a `LoggedRouter` writes a complete log of it.
    """

    def __init__(self, router: Router, policy: HandoffPolicy) -> None:
        self.counters: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
        self._router = router
        self._policy = policy
        self._content: Content | None = None
        self._lives: dict[tuple[str, int], Life] = {}
        self._waiting: dict[tuple[str, int], Life] = {}
        self._workers: dict[str, WorkerInfo] = {}
        self._held: dict[str, dict[str, None]] = {}  # grant ids, by the worker that minted them
        self._renew_at: float | None = None
        self._timers: list[tuple[float, int, Life, int, Phase]] = []
        self._num_timers = 0
        self._outcome = Outcome()

    def __len__(self) -> int:
        """Requests that have not ended."""
        return len(self._lives)

    # Workers --------------------------------------------------------------------------------

    def join(self, info: WorkerInfo, content: Content, now: float) -> None:
        """A worker, of a new start, can take requests. `content` is the same for all of them.

        Requests that wait for a worker are placed.
        """
        raise NotImplementedError

    def drain(self, worker_id: str) -> None:
        """Nothing more is placed on this worker; its legs go on."""
        raise NotImplementedError

    def lose(self, worker_id: str, now: float, *, crashed: bool = False) -> None:
        """A worker is gone, and its leases with it: its legs are placed again, or end.

        crashed: a step of its own failed, so any of its requests may be the cause.
        """
        raise NotImplementedError

    # Requests -------------------------------------------------------------------------------

    def add(self, request: Request, now: float) -> Life:
        """Place one choice of a request; its (id, choice) is new.

        Raises:
            Unavailable: no worker can take it now; nothing has changed.
        """
        raise NotImplementedError

    def abandon(self, request_id: str, choice: int, now: float) -> None:
        """Nobody reads any more: free the work wherever it is. Idempotent; brings no delta."""
        raise NotImplementedError

    def refuse(self, request_id: str, choice: int, error: ServeError, now: float) -> None:
        """An instruction of this request could not be carried out: it ends with `error`."""
        raise NotImplementedError

    def give_up(self, request_id: str, choice: int, now: float) -> None:
        """The present leg is believed to be stuck: place the request again, as if it were lost."""
        raise NotImplementedError

    # What workers say -----------------------------------------------------------------------

    def sealed(self, worker_id: str, sealed: Sealed, now: float) -> None:
        """Blocks may be read: of the prompt that is being computed, or lent to compute it."""
        raise NotImplementedError

    def landed(self, landed: Landed) -> None:
        """Blocks have arrived early."""
        raise NotImplementedError

    def timed(self, worker_id: str, times: StageTimes) -> Life | None:
        """A leg has ended. Returns whose it was; None if it is not the present one's."""
        raise NotImplementedError

    def delivered(self, worker_id: str, delta: TokenDelta, now: float) -> None:
        """Tokens, or the end. To be called after `timed` and before `handed_off` of one report."""
        raise NotImplementedError

    def handed_off(self, worker_id: str, handoff: Handoff, now: float) -> None:
        """The commit record: the decode worker takes over."""
        raise NotImplementedError

    # Time and outcome -----------------------------------------------------------------------

    def next_deadline(self) -> float | None:
        """When `tick` has something to do even if no news comes; None: nothing is awaited."""
        raise NotImplementedError

    def tick(self, now: float) -> None:
        """Do what is due: begin without a lender, renew leases, end what waited too long."""
        raise NotImplementedError

    def take(self) -> Outcome:
        """What the calls since the last `take` brought."""
        outcome, self._outcome = self._outcome, Outcome()
        return outcome
