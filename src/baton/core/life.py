"""What is known of one request at the gateway.

`Life` is `handoff.RequestTable`'s record of one choice of a request. The table, with its parts
`lives` and `placing`, alone writes it; whoever drives the table may read it at any time, also after
the end.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from baton.core.alone import has_got_on
from baton.core.keys import ExtendKeys, extend_chain, root_key
from baton.core.router import Placement
from baton.errors import ServeError, WireError
from baton.types import FinishReason, Handoff, KvFormat, Request, Sealed

if TYPE_CHECKING:
    from baton.core.offers import Offers


class Phase(enum.Enum):
    """Where a request is; `handoff` draws the ways between."""

    WAITING = enum.auto()  # lost, and nobody can take it now
    BORROWING = enum.auto()  # placed; a lender was asked for the beginning of the prompt
    FIRST = enum.auto()  # the leg that computes the prompt: alone, or until the handoff
    SECOND = enum.auto()  # the leg that took over
    ENDED = enum.auto()


LEGS = (Phase.FIRST, Phase.SECOND)
"""Phases in which a worker has been given a leg."""


class HandoffPolicy(msgspec.Struct, frozen=True):
    """What the table may decide by itself. Durations in seconds.

    lease_ttl_s: of every lease; each is renewed every third of it. borrow_wait_s: for how long a
    request waits for a lender's answer; a busy one answers between two steps. max_retries: how
    often a request that was lost is placed again. max_crashes: how many steps that failed, and
    took their worker with them, it may have been in; one that then gets on alone begins to count
    anew (`core.alone`). max_wait_s: for how long one that was lost
    waits for a worker that can take it; its deadline may come before.
    """

    lease_ttl_s: float
    borrow_wait_s: float = 0.25
    fetch_early: bool = True
    max_retries: int = 3
    max_crashes: int = 1
    max_wait_s: float = 60.0


class Content(msgspec.Struct, frozen=True):
    """What the keys of a worker's blocks depend on (see `keys.root_key`); their form, if known."""

    fingerprint: bytes
    numerics: str
    block_size: int
    kv_format: KvFormat | None = None


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
        "blamed",
        "content",
        "drew",
        "ended_at",
        "error",
        "finish",
        "first_token_at",
        "grant",
        "is_alone",
        "key",
        "key_class",
        "keys",
        "leg_start",
        "loan",
        "loss",
        "num_cached",
        "num_crashes",
        "num_early_blocks",
        "num_landed",
        "num_placed_keys",
        "offers",
        "phase",
        "placement",
        "received",
        "request",
        "tokens",
        "worker_id",
    )  # fmt: skip

    def __init__(self, request: Request, now: float) -> None:
        self.request = request
        self.key = (request.id, request.choice)
        self.received = now
        self.phase = Phase.WAITING
        self.attempt = 0
        self.placement: Placement | None = None
        self.worker_id: str | None = None
        self.tokens: list[int] = []
        self.keys: list[bytes] = []
        self.content: Content | None = None  # whose keys they are
        self.key_class = ""  # of the present attempt's keys
        self.num_placed_keys = 0  # keys of the present attempt's beginning
        self.grant: tuple[str, str] | None = None  # (worker, grant id): to read the prompt's blocks
        self.loan: tuple[str, str] | None = None  # to read what a lender has of them
        self.drew = False  # the present attempt has brought a token
        self.num_landed = 0
        self.num_crashes = 0  # steps that took their worker with them, since it got on alone
        self.blamed: set[int] = set()  # attempts that were in such steps
        self.offers: Offers | None = None  # of the present attempt, if they must be recast
        self.is_alone = False  # its worker makes no steps but those of the present leg
        self.leg_start = 0  # tokens that there were when the present leg began
        self.loss: ServeError | None = None  # why it waits to be placed again
        self.num_cached = 0
        self.num_early_blocks = 0
        self.first_token_at: float | None = None
        self.ended_at: float | None = None
        self.finish: FinishReason | None = None
        self.error: WireError | None = None

    @property
    def took_over(self) -> bool:
        """Whether the present leg began with a handoff."""
        return self.phase is Phase.SECOND

    @property
    def deadline(self) -> float | None:
        """Instant at which the request must have ended."""
        left = self.request.deadline_s
        return None if left is None else self.received + left

    def placed(self, placement: Placement, num_keys: int, key_class: str) -> None:
        """An attempt begins; `num_keys` full blocks are there at its beginning."""
        self.placement = placement
        self.worker_id = placement.prefill or placement.decode
        self.num_placed_keys = num_keys
        self.key_class = key_class
        self.drew = False
        self.num_landed = 0
        self.offers = None

    def borrows_from(self, worker_id: str) -> bool:
        """Whether it waits for this worker's answer."""
        placement = self.placement
        is_lender = placement is not None and placement.lender == worker_id
        return is_lender and self.phase is Phase.BORROWING

    def begin_leg(self, now: float, prefix: Sealed | None, handoff: Handoff | None) -> Request:
        """What the placed worker is to do next, reading what `prefix` or `handoff` name."""
        placement, deadline = self.placement, self.deadline
        assert placement is not None
        self.leg_start = len(self.tokens)
        self.is_alone = False
        return msgspec.structs.replace(
            self.request,
            attempt=self.attempt,
            emitted=tuple(self.tokens),
            hand_off=handoff is None and placement.prefill is not None,
            handoff=handoff,
            prefix=prefix,
            deadline_s=None if deadline is None else max(0.0, deadline - now),
            alone=self.num_crashes > 0,
        )

    def drew_first(self, num_cached: int, now: float) -> None:
        """The present attempt has its first token; `num_cached` is its prefix hit, in tokens."""
        self.drew = True
        if self.first_token_at is None:
            self.first_token_at = now
            self.num_cached = num_cached
            self.num_early_blocks = self.num_landed

    def blame(self, attempt: int) -> None:
        """This attempt was in a step that took its worker along. Said twice, it counts once."""
        self.num_crashes += attempt not in self.blamed
        self.blamed.add(attempt)

    def suspect(self) -> None:
        """It may have been in such a step. However often that is so, it is no more than that."""
        self.num_crashes = max(1, self.num_crashes)
        self.blamed.add(self.attempt)

    def take(self, token_ids: Sequence[int]) -> None:
        """Tokens of the present leg. A suspect that gets on alone is none any more."""
        self.tokens += token_ids
        if has_got_on(len(self.tokens) - self.leg_start):
            self.num_crashes, self.is_alone = 0, False
        elif token_ids and self.phase is Phase.FIRST and self.hands_off:
            self.is_alone = False  # only copies keep it there, and others go on

    @property
    def hands_off(self) -> bool:
        """Whether the prompt is computed on one worker, and the answer on another."""
        return self.placement is not None and self.placement.prefill is not None

    def end(self, finish: FinishReason, now: float) -> None:
        self.phase = Phase.ENDED
        self.finish = finish
        self.ended_at = now

    def extend_keys(
        self, content: Content, num_tokens: int, extend: ExtendKeys = extend_chain
    ) -> list[bytes]:
        """Keys of the full blocks of the first `num_tokens` tokens of prompt and answer, at least.

        Each is worked out once, unless the content is another one than before.
        """
        if content != self.content:
            self.content, self.keys = content, []
        keys, prompt, size = self.keys, self.request.prompt, content.block_size
        number = num_tokens // size
        if number > len(keys):
            tokens = prompt if num_tokens <= len(prompt) else (*prompt, *self.tokens)
            root = root_key(content.fingerprint, content.numerics, self.request.salt)
            extend(keys, root, tokens, size, number)
        return keys
