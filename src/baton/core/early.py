"""Blocks that are fetched before anyone here needs them.

    offer ──▶ FETCHING ──result──▶ a cached block of the pool, or nothing

A prefill worker tells of the blocks of a prompt as they are sealed. The decode worker that will
take the sequence over fetches them at once, into blocks of the pool that nobody waits for; what
verified is published under its key and is from then on a cached block like any other: the
sequence finds it as a prefix hit, and if room runs short it is evicted. Nothing is reserved, and a
fetch that fails costs nothing: the handoff asks for what is missing. Nor does one that does not
end: nobody waits for it any more, and its blocks are not used until it does (`given_up`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from baton.core.block_pool import BlockPool
from baton.core.codec_choice import RAW
from baton.core.imports import OK, OVERDUE, READ_WINDOW
from baton.core.keys import lossy_key
from baton.core.limits import SchedulerConfig
from baton.core.plan import ImportOrder, Recut, WantedBlock
from baton.core.recut import recut_sealed
from baton.core.unlike import can_take, origin
from baton.types import Landed, Recast, Sealed


class EarlyFetches:
    """Early fetches of one worker that are under way; pure, owned by the scheduler.

    Counters: `early_blocks` that arrived whole; `early_lost_<reason>`, blocks that did not.
    """

    def __init__(self, config: SchedulerConfig, pool: BlockPool, counters: Counter[str]) -> None:
        self._config = config
        self._pool = pool
        self._counters = counters
        self._orders: dict[int, ImportOrder] = {}
        self._offers: dict[int, Sealed] = {}
        self._keys: set[bytes] = set()
        self.given_up: set[int] = set()  # under way, but nothing may come of them

    def __len__(self) -> int:
        """Fetches that may still bring something."""
        return len(self._orders) - len(self.given_up)

    def __contains__(self, number: int) -> bool:
        return number in self._orders

    def offer(
        self, sealed: Sealed, codec: str, num_spare: int, now: float, number: int
    ) -> ImportOrder | None:
        """Fetch those of the offered blocks that are not here, into at most `num_spare` blocks."""
        if sealed.recast is not None:
            return self._offer_unlike(sealed, sealed.recast, num_spare, now, number)
        size = self._config.kv_format.block_size
        places = zip(sealed.keys, sealed.frames, sealed.digests, strict=False)
        under_way, pool = self._keys, self._pool
        missing = [
            (index, *place)
            for index, place in enumerate(places, sealed.first)
            if (key := place[0] if codec == RAW else _class_key(place[0], codec)) not in under_way
            and key not in pool
        ][: max(0, num_spare)]
        if not missing:
            return None
        blocks = pool.allocate(len(missing))
        wanted = tuple(
            [
                WantedBlock(index, block, key, frame, digest, size)
                for block, (index, key, frame, digest) in zip(blocks, missing, strict=True)
            ]
        )
        return self._order(sealed, now, number, wanted, codec)

    def _offer_unlike(
        self, sealed: Sealed, recast: Recast, num_spare: int, now: float, number: int
    ) -> ImportOrder | None:
        """The same, of blocks that become ours on the way. They come raw."""
        config, pool = self._config, self._pool
        is_whole = len(sealed.keys) == len(sealed.digests) == len(sealed.frames)
        if not is_whole or sealed.first < 0 or not can_take(config, recast):
            return None
        ours, theirs = config.kv_format.block_size, recast.kv_format.block_size
        kv_class = origin(config, recast)
        begin, end = sealed.first * theirs, (sealed.first + len(sealed.keys)) * theirs
        missing = [
            (index, key)
            for index, exact in enumerate(recast.keys, recast.first)
            if begin <= index * ours
            and (index + 1) * ours <= end
            and (key := lossy_key(exact, kv_class) if kv_class else exact) not in self._keys
            and key not in pool
        ][: max(0, num_spare)]
        if not missing:
            return None
        blocks = pool.allocate(len(missing))
        wanted = tuple(
            [
                WantedBlock(index, block, key, 0, b"", ours)
                for block, (index, key) in zip(blocks, missing, strict=True)
            ]
        )
        indices = [index for index, _ in missing]
        cut = recut_sealed(sealed, recast.kv_format, config.kv_format, indices)
        return self._order(sealed, now, number, wanted, RAW, cut)

    def _order(
        self,
        sealed: Sealed,
        now: float,
        number: int,
        wanted: tuple[WantedBlock, ...],
        codec: str,
        cut: Recut | None = None,
    ) -> ImportOrder:
        deadline = now + sealed.grant.ttl_s * READ_WINDOW
        order = ImportOrder(number, None, sealed.grant, wanted, deadline, codec, cut)
        self._orders[number] = order
        self._offers[number] = sealed
        self._keys.update(_class_key(want.key, codec) for want in wanted)
        return order

    def finish(self, number: int, results: tuple[str, ...]) -> Landed | None:
        """A fetch was acknowledged, with a word a block. None if nothing came of it."""
        order, sealed = self._orders.pop(number), self._offers.pop(number)
        if number in self.given_up:
            self.given_up.discard(number)
            self._pool.release([want.block for want in order.wanted])
            return None
        for want, result in zip(order.wanted, results, strict=True):
            key = _class_key(want.key, order.codec)
            self._keys.discard(key)
            if result == OK:
                self._pool.publish(want.block, key)
            else:
                self._counters[f"early_lost_{result}"] += 1
        self._pool.release([want.block for want in order.wanted])
        num_landed = results.count(OK)
        if order.codec != RAW:
            self._counters[f"lossy_blocks_{order.codec}"] += num_landed
        if order.recut is not None:
            self._counters["converted_blocks"] += num_landed
        self._counters["early_blocks"] += num_landed
        if not num_landed:
            return None
        return Landed(sealed.request_id, sealed.choice, sealed.attempt, num_landed)

    def give_up(self, number: int) -> None:
        """A fetch does not end: nothing may come of it any more."""
        order = self._orders[number]
        self.given_up.add(number)
        self._keys.difference_update(_class_key(want.key, order.codec) for want in order.wanted)
        self._counters[f"early_lost_{OVERDUE}"] += len(order.wanted)

    def awaits(self, keys: Iterable[bytes]) -> bool:
        """Whether one of the blocks with these keys is on its way."""
        return not self._keys.isdisjoint(keys)

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


def _class_key(key: bytes, codec: str) -> bytes:
    """By which a sequence that takes blocks in this codec looks for them in the pool."""
    return key if codec == RAW else lossy_key(key, codec)
