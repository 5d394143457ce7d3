"""What the gateway's half of a request's life brings: instructions and deltas, as plain values.

A driver turns instructions into messages, in order, and gives deltas to their clients.
"""

from __future__ import annotations

import msgspec

from baton.types import Lend, Request, Sealed, TokenDelta


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


class Proceed(msgspec.Struct, frozen=True):
    """This suspect may begin: what becomes of the worker from now on is its doing."""

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


Instruction = Submit | Withdraw | Proceed | Ask | Offer | Renew | Release


class Outcome(msgspec.Struct):
    """What one or more calls brought: for the workers, and for the clients.

    instructions: in order; of one worker they must arrive in this order. deltas: in order; one
    with `finish` is its choice's last. Legs that are submitted go on after the deltas.
    """

    instructions: list[Instruction] = []
    deltas: list[TokenDelta] = []
