"""Blocks that a sequence takes out of stores, its own worker's or a peer's, into the pool.

    order ──▶ FETCHING ──results of all orders──▶ the longest verified prefix counts as computed
                  └──abort, overdue──▶ blocks stay referenced until the fetches are acknowledged

For each block after those that the pool has, there is one source, the first of: this worker's own
store, the commit record of a handoff, a prefix that a peer lends. The first block without one ends
the list. What could not be fetched or did not verify is recomputed, and a counter named
`fallback_import_<reason>` is raised: a wrong block is never used. Blocks of a handoff that are
unlike ours are fetched under their own keys, and become ours on the way (`recut`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from baton.core.block_pool import BlockPool
from baton.core.codec_choice import RAW
from baton.core.keys import handoff_keys, root_key
from baton.core.limits import SchedulerConfig
from baton.core.plan import ImportOrder, Recut, WantedBlock
from baton.core.recut import recut
from baton.core.sequence import Sequence, SequenceId, Status
from baton.core.store_index import StoreIndex
from baton.core.unlike import can_take, is_like
from baton.types import Grant, Handoff, Sealed

READ_WINDOW = 5 / 12
"""Share of a lease's time to live within which a fetch must end.

The gateway renews every third of the time to live, so two thirds are left whenever a fetch
starts; readers stop a quarter before the end: 2/3 - 1/4.
"""

OK = "ok"
CORRUPT = "corrupt"
OVERDUE = "overdue"

Sources = dict[tuple[Grant | None, str], list[WantedBlock]]
"""What to fetch from whom, and in which codec; None is this worker's own store."""


@dataclass(slots=True)
class _Import:
    """What one sequence waits for: blocks from `first` on; results by index as they come.

    `own` are the indices of blocks that come from this worker's store.
    """

    seq: Sequence
    first: int
    num_orders: int
    own: frozenset[int]
    results: dict[int, str] = field(default_factory=dict)


class ImportTable:
    """Fetches for sequences of one worker that are under way; pure, owned by the scheduler."""

    def __init__(
        self, config: SchedulerConfig, pool: BlockPool, index: StoreIndex, counters: Counter[str]
    ) -> None:
        self._config = config
        self._pool = pool
        self._index = index
        self._counters = counters
        self._orders: dict[int, ImportOrder] = {}
        self._imports: dict[SequenceId, _Import] = {}
        self.given_up: set[int] = set()  # orders that nobody waits for any more

    def __len__(self) -> int:
        """Sequences whose blocks are being fetched, those that ended meanwhile included."""
        return len(self._imports)

    def __contains__(self, number: int) -> bool:
        return number in self._orders

    def order(self, seq: Sequence, num_hits: int, now: float, number: int) -> list[ImportOrder]:
        """Ask for the blocks of `seq` from `num_hits` on; takes the transfers' references.

        Nothing, if there is no source for the first of them. Orders are numbered from `number`.
        """
        orders: list[ImportOrder] = []
        for (grant, codec), wanted in self._sources(seq, num_hits).items():
            ttl_s = self._config.lease_ttl_s if grant is None else grant.ttl_s
            deadline = now + ttl_s * READ_WINDOW
            cut = self._recut(seq.request.handoff, grant, wanted)
            number_ = number + len(orders)
            order = ImportOrder(number_, seq.id, grant, tuple(wanted), deadline, codec, cut)
            orders.append(order)
            self._orders[order.number] = order
            self._pool.acquire(want.block for want in wanted)
        if orders:
            mine = [order.wanted for order in orders if order.grant is None]
            own = frozenset(want.index for wanted in mine for want in wanted)
            self._imports[seq.id] = _Import(seq, num_hits, len(orders), own)
        return orders

    def _sources(self, seq: Sequence, num_hits: int) -> Sources:
        """Where each block comes from, up to the first that is nowhere; holds its own."""
        covered = seq.num_tokens - 1  # the last token is always computed
        keys, own_keys = seq.full_keys(covered), seq.class_keys(covered)
        handoff = self._usable_handoff(seq)
        unlike = handoff is not None and not is_like(self._config, handoff)
        size = self._config.kv_format.block_size
        prefix = None if seq.num_preemptions else seq.request.prefix
        sources: Sources = {}
        wanted: list[WantedBlock] | None = None
        last: Grant | None = None  # whose blocks `wanted` are
        for i in range(num_hits, self._config.num_blocks_for(covered)):
            key, own_key = (keys[i], own_keys[i]) if i < len(keys) else (None, b"")
            grant: Grant | None = None
            entry = self._index.lookup(own_key) if key and self._config.prefix_cache else None
            if entry and entry.sealed and self._index.hold(own_key):
                place = (own_key, entry.frame, entry.digest)
            elif handoff is not None:
                grant = handoff.grant
                place = (b"", 0, b"")
                if not unlike:
                    place = (handoff.keys[i], handoff.frames[i], handoff.digests[i])
            elif prefix is not None and _has(prefix, i, key):
                grant, at = prefix.grant, i - prefix.first
                place = (prefix.keys[at], prefix.frames[at], prefix.digests[at])
            else:
                break
            if wanted is None or grant is not last:
                last, codec = grant, RAW if grant is None else seq.codec
                wanted = sources.setdefault((grant, codec), [])
            wanted.append(WantedBlock(i, seq.blocks[i], *place, min(size, covered - i * size)))
        return sources

    def _recut(
        self, handoff: Handoff | None, grant: Grant | None, wanted: list[WantedBlock]
    ) -> Recut | None:
        """How the blocks that come under `grant` become ours; None if they are like ours."""
        if handoff is None or grant is not handoff.grant or is_like(self._config, handoff):
            return None
        return recut(handoff, self._config.kv_format, [want.index for want in wanted])

    def _usable_handoff(self, seq: Sequence) -> Handoff | None:
        """The handoff of `seq`, if it can be used here; if not, the reason is counted."""
        handoff = seq.request.handoff
        if handoff is None or seq.num_preemptions:
            return None
        if not can_take(self._config, handoff):
            reason = "format"
        elif handoff.num_tokens != seq.num_tokens - 1 or any(
            len(part) != -(-handoff.num_tokens // handoff.kv_format.block_size)
            for part in (handoff.keys, handoff.digests, handoff.frames)
        ):
            reason = "length"
        elif (handoff.request_id, handoff.choice) != seq.id[:2]:
            reason = "request"
        elif list(handoff.keys) != self._expected_keys(seq, handoff):
            reason = "key"
        else:
            return handoff
        self._counters[f"fallback_import_{reason}"] += 1
        return None

    def _expected_keys(self, seq: Sequence, handoff: Handoff) -> list[bytes]:
        """The keys that the blocks of the sequence have at the worker that hands it off."""
        if is_like(self._config, handoff):
            return seq.handoff_keys(handoff.num_tokens, handoff.attempt)
        root = root_key(self._config.fingerprint, handoff.numerics, seq.request.salt)
        tokens = seq.token_ids[: handoff.num_tokens]
        size = handoff.kv_format.block_size
        return handoff_keys(root, tokens, size, *seq.id[:2], handoff.attempt)

    def finish(self, number: int, results: tuple[str, ...]) -> tuple[Sequence, int] | None:
        """A fetch was acknowledged, with a word a block: `ok`, or why it may not be used.

        At the last one of a sequence that still waits: that sequence, and how many blocks, from
        the first wanted one on, verified. The transfer's references are dropped; those of the
        sequence, if it still lives, remain.
        """
        order = self._orders.pop(number)
        assert order.seq_id is not None
        self._pool.release([want.block for want in order.wanted])
        if order.grant is None:
            self._unhold(order, results)
        if number in self.given_up:
            self.given_up.discard(number)
            return None
        if order.codec != RAW:
            self._counters[f"lossy_blocks_{order.codec}"] += results.count(OK)
        if order.recut is not None:
            self._counters["converted_blocks"] += results.count(OK)
        waiting = self._imports[order.seq_id]
        waiting.results.update(zip((want.index for want in order.wanted), results, strict=True))
        waiting.num_orders -= 1
        if waiting.num_orders:
            return None
        del self._imports[order.seq_id]
        if waiting.seq.status is not Status.IMPORTING:
            return None  # it ended meanwhile, and nothing falls back
        num_verified = 0
        for i in range(waiting.first, waiting.first + len(waiting.results)):
            if waiting.results[i] != OK:
                self._counters[f"fallback_import_{waiting.results[i]}"] += 1
                break
            num_verified += 1
            self._counters["restored_blocks" if i in waiting.own else "imported_blocks"] += 1
        return waiting.seq, num_verified

    def give_up(self, number: int) -> Sequence | None:
        """A fetch does not end: nothing may come of it, nor of what its sequence waits for beside.

        Returns that sequence, if it still waits. It must have other blocks from now on: those that
        it has may be written to at any time. To be called while the fetch is awaited.
        """
        seq_id = self._orders[number].seq_id
        assert seq_id is not None
        seq = self._imports.pop(seq_id).seq
        self.given_up.update(n for n, order in self._orders.items() if order.seq_id == seq_id)
        self._counters[f"fallback_import_{OVERDUE}"] += 1
        return seq if seq.status is Status.IMPORTING else None

    def _unhold(self, order: ImportOrder, results: tuple[str, ...]) -> None:
        for want, result in zip(order.wanted, results, strict=True):
            entry = self._index.lookup(want.key)
            if result == CORRUPT and entry is not None and entry.sealed:
                self._index.fail(want.key)  # it must answer nobody else
            self._index.unhold(want.key)

    def is_awaited(self, number: int) -> bool:
        """Whether a fetch is under way, and something may come of it."""
        return number in self._orders and number not in self.given_up

    def order_of(self, number: int) -> ImportOrder:
        """The fetch of that number, which is under way."""
        return self._orders[number]

    def num_wanted(self, number: int) -> int | None:
        """Blocks of a fetch under way; None if there is none of that number."""
        return len(self._orders[number].wanted) if number in self._orders else None

    def blocks_in_transfer(self) -> list[int]:
        return [want.block for order in self._orders.values() for want in order.wanted]


def _has(sealed: Sealed, index: int, key: bytes | None) -> bool:
    """Whether the block at `index` of a prompt is among those, under this key."""
    at = index - sealed.first
    return 0 <= at < len(sealed.keys) and sealed.keys[at] == key
