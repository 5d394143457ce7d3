"""What the scheduler asks of the engine in one step, and what comes back.

Structs without `gc` hold no object that could lead back to them: thousands of them live at a time,
and the collector need not look at any.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from baton.core.codec_choice import RAW
from baton.core.sequence import Sequence, SequenceId
from baton.errors import ServeError
from baton.types import (
    Alone,
    FinishReason,
    Grant,
    Handoff,
    KvFormat,
    Landed,
    SampledLogprobs,
    Sealed,
    StageTimes,
    TokenDelta,
)


class Chunk(msgspec.Struct, frozen=True, eq=False):
    """Compute KV for tokens [start, start + num_tokens) of `seq`; `samples` draws the next one.

    If the sequence has no token at `start` yet, it is the one that the step before draws for it;
    such a chunk has that token only.
    """

    seq: Sequence
    start: int
    num_tokens: int
    samples: bool

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


class WantedBlock(msgspec.Struct, frozen=True, gc=False):
    """A block to fetch from a store into pool block `block`; `index` is its place in the prompt.

    `num_tokens` of its slots are wanted: all but those of a partial last block. Key, frame and
    digest are empty where the order says how to recut.
    """

    index: int
    block: int
    key: bytes
    frame: int
    digest: bytes
    num_tokens: int


class Piece(msgspec.Struct, frozen=True, gc=False):
    """Slots [start, start + num_tokens) of a source's block, which go to slots from `slot` on of
    the block that the order wants as number `turn`."""

    start: int
    turn: int
    slot: int
    num_tokens: int


class SourceBlock(msgspec.Struct, frozen=True, gc=False):
    """A block of an unlike store, and what becomes of it."""

    key: bytes
    frame: int
    digest: bytes
    pieces: tuple[Piece, ...]


class Recut(msgspec.Struct, frozen=True, gc=False):
    """Fetch these blocks of format `source`; make of them the wanted ones, of format `target`."""

    source: KvFormat
    target: KvFormat
    blocks: tuple[SourceBlock, ...]


class ImportOrder(msgspec.Struct, frozen=True, gc=False):
    """Fetch blocks from a peer's store or, without a grant, from this worker's own.

    `number` names the order in its answer. `seq_id` is who waits for it; nobody does for blocks
    that are fetched early. `codec` is the form in which they may travel. With `recut` the source's
    blocks are unlike ours; there is one result for each wanted block all the same.
    """

    number: int
    seq_id: SequenceId | None
    grant: Grant | None
    wanted: tuple[WantedBlock, ...]
    deadline: float
    codec: str = RAW
    recut: Recut | None = None


class ExportOrder(msgspec.Struct, frozen=True, gc=False):
    """Copy pool block `block` into store frame `frame` and seal it under `key`."""

    seq_id: SequenceId
    index: int
    block: int
    frame: int
    key: bytes


class StepPlan(msgspec.Struct, frozen=True):
    step: int
    chunks: tuple[Chunk, ...]
    imports: tuple[ImportOrder, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum([chunk.num_tokens for chunk in self.chunks])


class StepOutput(msgspec.Struct, frozen=True):
    """One entry a chunk, in the plan's order: the tokens drawn (none where it does not sample)."""

    token_ids: list[list[int]]
    logprobs: list[SampledLogprobs | None]
    elapsed_s: float


@dataclass(slots=True)
class Update:
    """What a call into the scheduler brought for the outside."""

    deltas: list[TokenDelta] = field(default_factory=list)
    exports: list[ExportOrder] = field(default_factory=list)
    sealed: list[Sealed] = field(default_factory=list)
    landed: list[Landed] = field(default_factory=list)
    handoffs: list[Handoff] = field(default_factory=list)
    times: list[StageTimes] = field(default_factory=list)
    alone: list[Alone] = field(default_factory=list)


def error_delta(
    seq_id: SequenceId, first_index: int, error: ServeError, token_ids: tuple[int, ...] = ()
) -> TokenDelta:
    """The last word on a sequence that ends badly, with the tokens that were not told yet."""
    end = FinishReason.ERROR
    return TokenDelta(*seq_id, first_index, token_ids, finish=end, error=error.to_wire())


class Runner(Protocol):
    """Carries out step plans: the torch runner, the simulator's cost model, or a test's fake."""

    @property
    def depth(self) -> int:
        """Plans that may be submitted before the first of them is collected: 1 or 2."""

    @property
    def pending(self) -> int:
        """Plans submitted and not yet collected."""

    @property
    def progress(self) -> int:
        """Moves while plans are carried out, within a step too where the body can tell."""

    def submit(self, plan: StepPlan) -> None:
        """Begin to carry out `plan`. Its sequences are read now, and not later."""

    def collect(self) -> StepOutput:
        """Wait for the oldest submitted plan and return what it drew."""
