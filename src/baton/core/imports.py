"""The taking half of a handoff: verified blocks out of a peer's store, into the pool.

    order ──▶ FETCHING ──results──▶ the longest verified prefix counts as computed
                  └──abort──▶ blocks stay referenced until the fetch is acknowledged

What could not be fetched or did not verify is recomputed, and a counter named
`fallback_import_<reason>` is raised: a wrong block is never used.
"""

from __future__ import annotations

from collections import Counter

from baton.core.block_pool import BlockPool
from baton.core.limits import SchedulerConfig
from baton.core.plan import ImportOrder, WantedBlock
from baton.core.sequence import Sequence, SequenceId, Status

READ_WINDOW = 5 / 12
"""Share of a lease's time to live within which a fetch must end.

The gateway renews every third of the time to live, so two thirds are left whenever a fetch
starts; readers stop a quarter before the end: 2/3 - 1/4.
"""

OK = "ok"


class ImportTable:
    """Fetches of one worker that are under way; pure, owned by the scheduler."""

    def __init__(self, config: SchedulerConfig, pool: BlockPool, counters: Counter[str]) -> None:
        self._config = config
        self._pool = pool
        self._counters = counters
        self._orders: dict[SequenceId, tuple[Sequence, ImportOrder]] = {}

    def __len__(self) -> int:
        return len(self._orders)

    def usable(self, seq: Sequence) -> bool:
        """Whether the handoff of `seq` can be used here; if not, the reason is counted."""
        handoff = seq.request.handoff
        if handoff is None or seq.num_preemptions:
            return False
        num_blocks = self._config.num_blocks_for(handoff.num_tokens)
        if handoff.kv_format != self._config.kv_format:
            reason = "format"
        elif handoff.num_tokens != seq.num_tokens - 1 or any(
            len(part) != num_blocks for part in (handoff.keys, handoff.digests, handoff.frames)
        ):
            reason = "length"
        elif (handoff.request_id, handoff.choice) != seq.id[:2]:
            reason = "request"
        else:
            if list(handoff.keys) == seq.handoff_keys(handoff.num_tokens, handoff.attempt):
                return True
            reason = "key"
        self._counters[f"fallback_import_{reason}"] += 1
        return False

    def order(self, seq: Sequence, num_hits: int, now: float) -> ImportOrder:
        """Ask for the blocks of `seq` from `num_hits` on; takes the transfer's references."""
        handoff = seq.request.handoff
        assert handoff is not None
        wanted = tuple(
            WantedBlock(i, seq.blocks[i], handoff.keys[i], handoff.frames[i], handoff.digests[i])
            for i in range(num_hits, len(handoff.keys))
        )
        self._pool.acquire(want.block for want in wanted)
        deadline = now + handoff.grant.ttl_s * READ_WINDOW
        order = ImportOrder(seq.id, handoff.grant, wanted, deadline)
        self._orders[seq.id] = (seq, order)
        return order

    def finish(self, seq_id: SequenceId, results: tuple[str, ...]) -> tuple[Sequence, int]:
        """A fetch was acknowledged, with a word a block: `ok`, or why it may not be used.

        Returns the sequence and how many blocks, from the first wanted one on, verified. The
        transfer's references are dropped; those of the sequence, if it still lives, remain.
        """
        seq, order = self._orders.pop(seq_id)
        self._pool.release([want.block for want in order.wanted])
        if seq.status is not Status.IMPORTING:
            return seq, 0  # it ended meanwhile, and nothing falls back
        num_verified = 0
        for result in results:
            if result != OK:
                self._counters[f"fallback_import_{result}"] += 1
                break
            num_verified += 1
        self._counters["imported_blocks"] += num_verified
        return seq, num_verified

    def num_wanted(self, seq_id: SequenceId) -> int | None:
        """Blocks of the fetch under way for a sequence; None if there is none."""
        return len(self._orders[seq_id][1].wanted) if seq_id in self._orders else None

    def blocks_in_transfer(self) -> list[int]:
        return [want.block for _, order in self._orders.values() for want in order.wanted]
