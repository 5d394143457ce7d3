"""The giving half of a handoff: blocks out of the pool, into the store, under one grant.

    OPEN ──close(num_tokens)──▶ SEALING ──last digest──▶ COMMITTED   (a `Handoff` leaves)
      │ tell: sealed so far       │
      └────────abandon────────────┴──▶ gone, holds and lease dropped
    a copy that failed: FAILED, and the sequence ends with a typed error

Full blocks are told of as they are sealed, from the first on and each once, so that a reader may
fetch them early; the grant is minted with the first of them. What is sealed between two calls of
`take_news` is told in one piece, since a fetch of many blocks costs a reader little more than a
fetch of one; and what is committed meanwhile is told by the commit record alone. That is made when
every block is sealed and not before. Until then the export holds its keys in the store; from then
on the grant's lease does.

Blocks of sequences that are not handed off go to the store as well, if they are to be kept and
there is a frame for them: nobody waits for those.

`ExportTable` owns all exports of one worker, together with its store index and lease table.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from baton.core.block_pool import BlockPool
from baton.core.lease import LeaseTable
from baton.core.limits import SchedulerConfig
from baton.core.plan import ExportOrder
from baton.core.sequence import Sequence, SequenceId
from baton.core.store_index import StoreFull, StoreIndex
from baton.types import Grant, Handoff, Lend, Sealed


class ExportState(enum.Enum):
    OPEN = enum.auto()
    SEALING = enum.auto()
    FAILED = enum.auto()


@dataclass(slots=True)
class _Part:
    key: bytes
    frame: int
    digest: bytes | None = None


@dataclass(slots=True)
class _Export:
    seq: Sequence
    credits: int
    state: ExportState = ExportState.OPEN
    num_tokens: int = 0
    num_unsealed: int = 0
    num_told: int = 0
    num_covered: int = 0  # parts that the present grant's lease holds
    grant: Grant | None = None
    parts: list[_Part] = field(default_factory=list)


class ExportTable:
    """Exports of one worker, with its store index and leases; pure, owned by the scheduler."""

    def __init__(
        self, config: SchedulerConfig, pool: BlockPool, index: StoreIndex, leases: LeaseTable
    ) -> None:
        self.index = index
        self.leases = leases
        self._config = config
        self._pool = pool
        self._copying: dict[bytes, int] = {}
        self._exports: dict[SequenceId, _Export] = {}
        self._waiting: dict[bytes, list[tuple[_Export, _Part]]] = {}
        self._news: dict[SequenceId, int] = {}  # the first block that was noted and not told yet
        self._num_grants = 0

    def __len__(self) -> int:
        return len(self._exports)

    @property
    def num_sealing(self) -> int:
        """Exports that wait for nothing but their last copies."""
        return sum(export.state is ExportState.SEALING for export in self._exports.values())

    @property
    def num_copying(self) -> int:
        return len(self._copying)

    @property
    def num_awaited(self) -> int:
        """Copies under way that a handoff waits for."""
        return len(self._waiting)

    def is_copying(self, key: bytes) -> bool:
        return key in self._copying

    def blocks_in_transfer(self) -> list[int]:
        return list(self._copying.values())

    def open(self, seq: Sequence) -> bool:
        """Reserve frames for all tokens of `seq`; False, and nothing taken, when there are none.

        A preempted sequence comes back to the export that it had.
        """
        if seq.id in self._exports:
            return True
        num_blocks = self._config.num_blocks_for(seq.num_tokens)
        if not self.index.reserve(num_blocks):
            return False
        self._exports[seq.id] = _Export(seq, credits=num_blocks)
        return True

    def export_full_blocks(self, seq: Sequence) -> list[ExportOrder]:
        """Give every block that is full by now, and was not given before, to the store."""
        export = self._exports[seq.id]
        keys = seq.full_keys(seq.num_computed)
        orders = [self._begin(export, i, keys[i]) for i in range(len(export.parts), len(keys))]
        return [order for order in orders if order is not None]

    def close(self, seq: Sequence) -> list[ExportOrder]:
        """Everything is computed: give the partial last block, if any, and await the copies."""
        export = self._exports[seq.id]
        export.state = ExportState.SEALING
        export.num_tokens = seq.num_computed
        if seq.num_computed % seq.block_size == 0:
            return []
        index = seq.num_computed // seq.block_size
        tail_key = seq.handoff_keys(seq.num_computed, seq.request.attempt)[-1]
        order = self._begin(export, index, tail_key)
        return [order] if order is not None else []

    def _begin(self, export: _Export, number: int, key: bytes) -> ExportOrder | None:
        """None when the store has, or is getting, that content already."""
        index = self.index
        begun = index.begin(key)
        export.credits -= 1
        held = index.hold(key)
        assert held, "a key that was just begun can be held"
        entry = None if begun.write else index.lookup(key)
        part = _Part(key, begun.frame, entry.digest or None if entry else None)
        if part.digest is None:
            export.num_unsealed += 1
            self._waiting.setdefault(key, []).append((export, part))
        export.parts.append(part)
        return self._copy(export.seq, number, begun.frame, key) if begun.write else None

    def sealed(self, key: bytes, digest: bytes | None) -> list[Sequence]:
        """A copy ended, with its digest or (None) badly. Returns the sequences it concerned."""
        self._pool.release([self._copying.pop(key)])
        if digest is None:
            self.index.fail(key)
        else:
            self.index.seal(key, digest)
        concerned = []
        for export, part in self._waiting.pop(key, ()):
            if self._exports.get(export.seq.id) is not export:
                continue  # abandoned
            concerned.append(export.seq)
            if digest is None:
                export.state = ExportState.FAILED
            else:
                part.digest = digest
                export.num_unsealed -= 1
        return concerned

    def failed(self, seq_id: SequenceId) -> bool:
        return self._exports[seq_id].state is ExportState.FAILED

    def keep(self, seq: Sequence) -> list[ExportOrder]:
        """Give the full blocks of `seq` that were not given before, as far as there is room."""
        keys = seq.class_keys(seq.num_computed)
        orders = []
        for i in range(seq.num_kept, len(keys)):
            try:
                begun = self.index.begin(keys[i], reserved=False)
            except StoreFull:
                break  # the rest would be of no use without this one
            if begun.write:
                orders.append(self._copy(seq, i, begun.frame, keys[i]))
        seq.num_kept = len(keys)
        return orders

    def _copy(self, seq: Sequence, index: int, frame: int, key: bytes) -> ExportOrder:
        block = seq.blocks[index]
        self._pool.acquire([block])
        self._copying[key] = block
        return ExportOrder(seq.id, index, block, frame, key)

    def note(self, seq_id: SequenceId, now: float) -> None:
        """Open to readers the full blocks that are sealed, up to the first that is not."""
        export = self._exports.get(seq_id)
        if export is None:
            return
        parts, first = export.parts, export.num_told
        last, told = min(len(parts), export.seq.num_computed // export.seq.block_size), first
        while told < last and parts[told].digest:
            told += 1
        if told > first:
            export.num_told = told
            self._grant(export, told, now)
            self._news.setdefault(seq_id, first)

    def take_news(self) -> list[Sealed]:
        """What was noted since the last call, a piece for each prompt."""
        if not self._news:
            return []
        news, self._news = self._news, {}
        return [self._piece(seq_id, first) for seq_id, first in news.items()]

    def _piece(self, seq_id: SequenceId, first: int) -> Sealed:
        export = self._exports[seq_id]
        assert export.grant is not None, "it was minted when the first block was noted"
        told = export.parts[first : export.num_told]
        return Sealed(
            *seq_id,
            export.grant,
            first,
            tuple([part.key for part in told]),
            tuple([part.digest for part in told if part.digest]),
            tuple([part.frame for part in told]),
        )

    def _grant(self, export: _Export, num_parts: int, now: float) -> Grant:
        """The right to read the first parts of an export; a new one if the lease has run out."""
        grant = export.grant
        if grant is None or grant.grant_id not in self.leases:
            request = export.seq.request
            grant = self._mint(request.id, request.choice, request.attempt, request.tenant, now)
            export.grant = grant
            export.num_covered = 0
        for part in export.parts[export.num_covered : num_parts]:
            covered = self.leases.cover(grant.grant_id, part.key)
            assert covered, "a key that the export holds can be covered"
        export.num_covered = max(export.num_covered, num_parts)
        return grant

    def _mint(self, request_id: str, choice: int, attempt: int, tenant: str, now: float) -> Grant:
        self._num_grants += 1  # so that no id comes twice, whatever ids the requests have
        grant_id = f"{request_id}.{choice}.{attempt}.{self._num_grants}"
        return self.leases.mint(grant_id, tenant, self._config.lease_ttl_s, now)

    def lend(self, ask: Lend, now: float) -> Sealed:
        """Open to a reader the leading ones of the blocks it asks for that are sealed here."""
        grant = self._mint(ask.request_id, ask.choice, ask.attempt, ask.tenant, now)
        lent = []
        for key in ask.keys:
            entry = self.index.lookup(key)
            if entry is None or not entry.sealed or not self.leases.cover(grant.grant_id, key):
                break
            lent.append(entry)
        return Sealed(
            ask.request_id,
            ask.choice,
            ask.attempt,
            grant,
            ask.first,
            ask.keys[: len(lent)],
            tuple(entry.digest for entry in lent),
            tuple(entry.frame for entry in lent),
        )

    def commit(self, seq_id: SequenceId, now: float) -> Handoff | None:
        """The commit record, once every block is sealed; else None. Ends the export."""
        export = self._exports[seq_id]
        if export.state is not ExportState.SEALING or export.num_unsealed:
            return None
        request = export.seq.request
        grant = self._grant(export, len(export.parts), now)
        self._drop(seq_id)
        return Handoff(
            request_id=request.id,
            choice=request.choice,
            attempt=request.attempt,
            grant=grant,
            num_tokens=export.num_tokens,
            kv_format=self._config.kv_format,
            numerics=self._config.numerics,
            keys=tuple(part.key for part in export.parts),
            digests=tuple(part.digest for part in export.parts if part.digest is not None),
            frames=tuple(part.frame for part in export.parts),
        )

    def abandon(self, seq_id: SequenceId) -> None:
        """Forget the export, if there is one; what is being copied is dropped when it arrives."""
        export = self._exports.get(seq_id)
        if export is not None:
            self._drop(seq_id)
            if export.grant is not None:
                self.leases.release(export.grant.grant_id)

    def _drop(self, seq_id: SequenceId) -> None:
        export = self._exports.pop(seq_id)
        self._news.pop(seq_id, None)
        self.index.unreserve(export.credits)
        for part in export.parts:
            self.index.unhold(part.key)
