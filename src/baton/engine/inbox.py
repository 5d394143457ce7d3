"""What may be put into an engine's inbox, besides the fabric's answers."""

from __future__ import annotations

from queue import SimpleQueue

import msgspec

from baton.core.sequence import SequenceId
from baton.fabric.thread import Done
from baton.types import Lend as LendAsk
from baton.types import Request, Sealed


class Submit(msgspec.Struct, frozen=True):
    request: Request


class Abort(msgspec.Struct, frozen=True):
    seq_id: SequenceId


class Proceed(msgspec.Struct, frozen=True):
    """The gateway knows that this suspect is alone."""

    seq_id: SequenceId


class Offer(msgspec.Struct, frozen=True):
    sealed: Sealed


class Lend(msgspec.Struct, frozen=True):
    ask: LendAsk


class Wire(msgspec.Struct, frozen=True):
    """Blocks of `source` come over a network."""

    source: str


class Renew(msgspec.Struct, frozen=True):
    grant_ids: tuple[str, ...]


class Release(msgspec.Struct, frozen=True):
    grant_ids: tuple[str, ...]


class Drain(msgspec.Struct, frozen=True):
    """Finish what was accepted, refuse what comes."""


class Stop(msgspec.Struct, frozen=True):
    """End the loop after this turn."""


Message = Submit | Abort | Proceed | Offer | Wire | Lend | Renew | Release | Drain | Stop | Done
Inbox = SimpleQueue[Message]
