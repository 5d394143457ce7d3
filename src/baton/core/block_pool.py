"""Which KV block holds what, and who still needs it.

A block is in one of three places:

    empty ──allocate──▶ in use (refs > 0) ──release to 0──▶ cached (has a key, refs = 0)
      ▲                    │    ▲                              │
      └──release, no key───┘    └──────────acquire─────────────┤
      └───────────────────evict (least recently released)──────┘

Every operation costs O(1) a block. Sequences and transfers each take their own reference, so a
block that is being copied out outlives the sequence that wrote it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Reference counts, content keys and least-recently-used eviction over `num_blocks` blocks."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError("a pool needs at least one block")
        self.num_blocks = num_blocks
        self.num_evictions = 0
        self._refs = [0] * num_blocks
        self._key_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, key: bytes) -> bool:
        """Whether a block with this content is here."""
        return key in self._block_of

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` could hand out now, evicting cached ones."""
        return len(self._empty) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks with content that nobody references."""
        return len(self._cached)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, each with one reference and no key.

        Raises:
            MemoryError: fewer than `count` are free; nothing was taken.
        """
        if count > self.num_free:
            raise MemoryError(f"{count} blocks wanted, {self.num_free} free")
        empty, refs = self._empty, self._refs
        if count == 1:  # most are for a token that an answer has no room for
            block = empty.pop() if empty else self._evict(1)[0]
            refs[block] = 1
            return [block]
        taken = empty[: -count - 1 : -1]  # the last ones, the very last first
        del empty[len(empty) - len(taken) :]
        taken += self._evict(count - len(taken))
        for block in taken:
            refs[block] = 1
        return taken

    def lookup(self, keys: Sequence[bytes]) -> list[int]:
        """Blocks of the longest prefix of `keys` that is present. Takes no reference."""
        found, block_of = [], self._block_of
        for key in keys:
            block = block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def num_unreferenced(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` count as free now, and would not after `acquire`."""
        return sum(self._refs[block] == 0 for block in blocks)

    def acquire(self, blocks: Iterable[int]) -> None:
        """Add a reference to blocks that are in use or cached."""
        refs, cached = self._refs, self._cached
        for block in blocks:
            if refs[block] == 0:
                del cached[block]
            refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop a reference of each; what falls to zero is cached if it has a key, else empty.

        The last block goes first, so that eviction takes the end of a prefix before its start.
        """
        refs, key_of = self._refs, self._key_of
        for block in reversed(blocks):
            left = refs[block] - 1
            assert left >= 0, f"block {block} released once too often"
            refs[block] = left
            if left == 0:
                if key_of[block] is None:
                    self._empty.append(block)
                else:
                    self._cached[block] = None

    def publish(self, block: int, key: bytes) -> None:
        """Make a full, computed or verified block findable. A key that is taken stays put."""
        self.publish_all((block,), (key,))

    def publish_all(self, blocks: Sequence[int], keys: Sequence[bytes]) -> None:
        """As `publish`, one after the other."""
        refs, key_of, block_of = self._refs, self._key_of, self._block_of
        for block, key in zip(blocks, keys, strict=True):
            assert refs[block] > 0, f"block {block} published by nobody"
            if key not in block_of:
                assert key_of[block] is None, f"block {block} published twice"
                block_of[key] = block
                key_of[block] = key

    def refs(self, block: int) -> int:
        return self._refs[block]

    def check(self) -> None:
        """Verify every invariant; used when idle and by the tests.

        Raises:
            AssertionError: naming the invariant that does not hold.
        """
        empty, cached = set(self._empty), set(self._cached)
        assert len(empty) == len(self._empty), "a block is empty twice"
        assert not empty & cached, "a block is both empty and cached"
        for block, refs in enumerate(self._refs):
            assert (refs == 0) == (block in empty or block in cached), f"block {block} is lost"
            key = self._key_of[block]
            assert key is None or self._block_of.get(key) == block, f"stale key on {block}"
            assert block not in empty or key is None, f"empty block {block} has a key"
            assert block not in cached or key is not None, f"cached block {block} has no key"
        assert len(self._block_of) == sum(key is not None for key in self._key_of)

    def _evict(self, count: int) -> list[int]:
        cached, key_of, block_of = self._cached, self._key_of, self._block_of
        evicted = []
        for _ in range(count):
            block, _ = cached.popitem(last=False)
            key = key_of[block]
            assert key is not None
            del block_of[key]
            key_of[block] = None
            evicted.append(block)
        self.num_evictions += count
        return evicted
