"""What is known of one request at the gateway, and what its workers are told.

`Life` is `handoff.RequestTable`'s record of one choice of a request. The table alone writes it;
whoever drives the table may read it at any time, also after the end. The instructions are plain
values: a driver turns them into messages, in order.
"""

from __future__ import annotations

import enum

import msgspec

from baton.core.router import Placement
from baton.errors import ServeError, WireError
from baton.types import FinishReason, Lend, Request, Sealed


class Phase(enum.Enum):
    """Where a request is; `handoff` draws the ways between."""

    WAITING = enum.auto()  # lost, and nobody can take it now
    BORROWING = enum.auto()  # placed; a lender was asked for the beginning of the prompt
    FIRST = enum.auto()  # the leg that computes the prompt: alone, or until the handoff
    SECOND = enum.auto()  # the leg that took over
    ENDED = enum.auto()


class HandoffPolicy(msgspec.Struct, frozen=True):
    """What the table may decide by itself. Durations in seconds.

    lease_ttl_s: of every lease; each is renewed every third of it. borrow_wait_s: for how long a
    request waits for a lender's answer; a busy one answers between two steps. max_retries: how
    often a request that was lost is placed again. max_crashes: how many steps that failed, and
    took their worker with them, it may have been in. max_wait_s: for how long one that was lost
    waits for a worker that can take it; its deadline may come before.
    """

    lease_ttl_s: float
    borrow_wait_s: float = 0.25
    fetch_early: bool = True
    max_retries: int = 3
    max_crashes: int = 1
    max_wait_s: float = 60.0


class Submit(msgspec.Struct, frozen=True):
    """Run one leg. `request.deadline_s` is what is left now."""

    worker_id: str
    request: Request


class Withdraw(msgspec.Struct, frozen=True):
    """Stop one attempt, wherever it is; no error if it is over."""

    worker_id: str
    request_id: str
    choice: int
    attempt: int


class Ask(msgspec.Struct, frozen=True):
    """Lend what the store holds; the answer is a `Sealed`."""

    worker_id: str
    lend: Lend


class Offer(msgspec.Struct, frozen=True):
    """These blocks can be fetched, and will be wanted."""

    worker_id: str
    sealed: Sealed


class Renew(msgspec.Struct, frozen=True):
    """Start the time to live of these leases anew."""

    worker_id: str
    grant_ids: tuple[str, ...]


class Release(msgspec.Struct, frozen=True):
    """End a lease; again is no error."""

    worker_id: str
    grant_id: str


Instruction = Submit | Withdraw | Ask | Offer | Renew | Release


class Life:
    """One choice of one request, from its first placement to its end. To be read only.

    request: as the client's side gave it; attempt 0, nothing emitted. tokens: what was passed on.
    worker_id: who has the present leg (in `BORROWING`, who will; in `WAITING`, nobody). attempt:
    0 for the first placement. keys: of the full blocks of prompt and tokens, as far as they were
    worked out. received, first_token_at, ended_at: instants of the caller's clock, in seconds.
    num_early_blocks: blocks that had arrived early when the first token came. num_cached: prefix
    hit of the first attempt, in tokens. finish and error are set at the end.
    """

    __slots__ = (
        "attempt",
        "drew",
        "ended_at",
        "error",
        "finish",
        "first_token_at",
        "grant",
        "keys",
        "loan",
        "loss",
        "num_cached",
        "num_crashes",
        "num_early_blocks",
        "num_landed",
        "num_placed_keys",
        "phase",
        "placement",
        "received",
        "request",
        "tokens",
        "worker_id",
    )  # fmt: skip

    def __init__(self, request: Request, now: float) -> None:
        self.request = request
        self.received = now
        self.phase = Phase.WAITING
        self.attempt = 0
        self.placement: Placement | None = None
        self.worker_id: str | None = None
        self.tokens: list[int] = []
        self.keys: list[bytes] = []
        self.num_placed_keys = 0  # keys of the present attempt's beginning
        self.grant: tuple[str, str] | None = None  # (worker, grant id): to read the prompt's blocks
        self.loan: tuple[str, str] | None = None  # to read what a lender has of them
        self.drew = False  # the present attempt has brought a token
        self.num_landed = 0
        self.num_crashes = 0
        self.loss: ServeError | None = None  # why it waits to be placed again
        self.num_cached = 0
        self.num_early_blocks = 0
        self.first_token_at: float | None = None
        self.ended_at: float | None = None
        self.finish: FinishReason | None = None
        self.error: WireError | None = None

    @property
    def key(self) -> tuple[str, int]:
        return (self.request.id, self.request.choice)

    @property
    def took_over(self) -> bool:
        """Whether the present leg began with a handoff."""
        return self.phase is Phase.SECOND

    @property
    def deadline(self) -> float | None:
        """Instant at which the request must have ended."""
        left = self.request.deadline_s
        return None if left is None else self.received + left
