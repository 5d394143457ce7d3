"""Blocks on their way into a worker's pool, whoever wants them.

    a prompt is admitted ──order──▶ ImportTable ────┐
    a peer has sealed some ──offer──▶ EarlyFetches ─┴─▶ orders ──start──▶ fabric ──end──▶ the pool

A sequence whose blocks are being fetched early when it arrives is detained (`ARRIVING`) until
these fetches have ended: it finds them as prefix hits, and would else ask for them twice.

Transports keep their deadlines. Should one not, as by a read that never returns, the fetch is given
up `OVERDUE_AFTER_S` later: what waited for it is recomputed, into other blocks. Those that it was
to fill stay with it until it ends after all, for it may write to them at any time; they are lost to
the pool meanwhile, and that is all.
"""

from __future__ import annotations

import heapq
from collections import Counter

import msgspec

from baton.core.block_pool import BlockPool
from baton.core.codec_choice import RAW
from baton.core.early import EarlyFetches
from baton.core.imports import OK, ImportTable
from baton.core.limits import SchedulerConfig
from baton.core.links import LinkTable
from baton.core.plan import ImportOrder
from baton.core.sequence import Sequence, SequenceId, Status
from baton.core.store_index import StoreIndex
from baton.core.unlike import is_like, origin
from baton.types import Landed, Sealed

OVERDUE_AFTER_S = 3.0
"""After a fetch's deadline; on a busy machine its answer may come late by some of it."""


class Ended(msgspec.Struct, frozen=True):
    """What the end of a fetch brought.

    landed: blocks that came early. arrived: sequences that are detained no more. importer: the
    sequence that has waited for its blocks, of which `num_verified` may be used.
    """

    landed: Landed | None = None
    arrived: tuple[Sequence, ...] = ()
    importer: Sequence | None = None
    num_verified: int = 0


class Fetches:
    """All fetches of one worker, and the sequences that they detain; owned by the scheduler."""

    def __init__(
        self, config: SchedulerConfig, pool: BlockPool, index: StoreIndex, counters: Counter[str]
    ) -> None:
        self._config = config
        self.imports = ImportTable(config, pool, index, counters)
        self.early = EarlyFetches(config, pool, counters)
        self.links = LinkTable(config)
        self.arriving: dict[SequenceId, Sequence] = {}
        self.orders: list[ImportOrder] = []
        self._num_ordered = 0
        self._limits: list[tuple[float, int]] = []  # a heap: instants, and numbers of fetches

    def __len__(self) -> int:
        """Sequences that import, and early fetches under way."""
        return len(self.imports) + len(self.early)

    def detain(self, seq: Sequence) -> bool:
        """A new sequence: whether it must wait for what is fetched early. Chooses its codec."""
        handoff = seq.request.handoff
        if handoff is None:
            return False
        seq.origin = origin(self._config, handoff)
        if is_like(self._config, handoff):  # no codec was measured for another form
            seq.codec = self.links.codec(seq.id, handoff.grant.source)
        if not self._awaits(seq):
            return False
        seq.status = Status.ARRIVING
        self.arriving[seq.id] = seq
        return True

    def forget(self, seq_id: SequenceId) -> None:
        """A sequence has ended; its fetches go on until they are acknowledged."""
        self.arriving.pop(seq_id, None)

    def offer(self, sealed: Sealed, num_spare: int, now: float) -> None:
        """Fetch what a peer has sealed and is not here, into at most `num_spare` blocks."""
        seq_id = (sealed.request_id, sealed.choice, sealed.attempt)
        codec = RAW  # none was measured for another form
        if sealed.recast is None:
            codec = self.links.codec(seq_id, sealed.grant.source)
        order = self.early.offer(sealed, codec, num_spare, now, self._num_ordered)
        if order is not None:
            self._num_ordered += 1
            self.orders.append(order)

    def order(self, seq: Sequence, now: float) -> bool:
        """Ask for the blocks that an admitted sequence lacks; False if nobody has the first one."""
        if seq.num_computed >= seq.num_tokens - 1:
            return False
        orders = self.imports.order(seq, seq.num_published, now, self._num_ordered)
        self._num_ordered += len(orders)
        self.orders += orders
        return bool(orders)

    def start(self) -> tuple[ImportOrder, ...]:
        """What was ordered since the last call."""
        orders, self.orders = tuple(self.orders), []
        for order in orders:
            heapq.heappush(self._limits, (order.deadline + OVERDUE_AFTER_S, order.number))
        return orders

    def next_limit(self) -> float | None:
        """When a fetch will have to be given up; None if none is awaited."""
        while self._limits and not self._table(self._limits[0][1]).is_awaited(self._limits[0][1]):
            heapq.heappop(self._limits)
        return self._limits[0][0] if self._limits else None

    def give_up(self, now: float) -> list[Sequence]:
        """Fetches that should have ended are awaited no more; returns whoever waited for them.

        Those that import (`IMPORTING`) must get other blocks, those that arrive need none yet.
        """
        released: list[Sequence] = []
        while (limit := self.next_limit()) is not None and limit <= now:
            number = heapq.heappop(self._limits)[1]
            if number in self.early:
                self.early.give_up(number)
                released += self._arrived()
            elif (seq := self.imports.give_up(number)) is not None:
                released.append(seq)
        return released

    def num_wanted(self, number: int) -> int | None:
        """Blocks of a fetch under way; None if there is none of that number."""
        return self._table(number).num_wanted(number)

    def end(self, number: int, results: tuple[str, ...], elapsed_s: float) -> Ended:
        """A fetch was acknowledged, with a word a block."""
        table = self._table(number)
        order = table.order_of(number)
        is_awaited = table.is_awaited(number)
        if is_awaited and order.recut is None and all(result == OK for result in results):
            self.links.observe(order.grant, order.codec, len(results), elapsed_s)
        if isinstance(table, EarlyFetches):
            landed = table.finish(number, results)
            return Ended(landed, self._arrived())
        done = table.finish(number, results)
        return Ended() if done is None else Ended(importer=done[0], num_verified=done[1])

    @property
    def num_given_up(self) -> int:
        """Fetches that were given up and have not ended."""
        return len(self.imports.given_up) + len(self.early.given_up)

    def blocks_in_transfer(self) -> list[int]:
        """The references that fetches hold, one entry each."""
        return [*self.imports.blocks_in_transfer(), *self.early.blocks_in_transfer()]

    def _table(self, number: int) -> EarlyFetches | ImportTable:
        return self.early if number in self.early else self.imports

    def _arrived(self) -> tuple[Sequence, ...]:
        """Those that were detained and need not be any more."""
        arrived = tuple(seq for seq in self.arriving.values() if not self._awaits(seq))
        for seq in arrived:
            del self.arriving[seq.id]
        return arrived

    def _awaits(self, seq: Sequence) -> bool:
        return self.early.awaits(seq.class_keys(seq.num_tokens - 1))
