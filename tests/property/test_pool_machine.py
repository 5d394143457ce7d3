"""`BlockPool` against a model that keeps lists and counts."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.core.block_pool import BlockPool

NUM_BLOCKS = 5
KEYS = [bytes([n]) for n in range(6)]


class PoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.held: list[int] = []  # one entry a reference
        self.key_of: dict[int, bytes] = {}
        self.cached: list[int] = []  # least recently released first

    @rule(count=st.integers(0, 3))
    def allocate(self, count: int) -> None:
        in_use = set(self.held)
        empty = [b for b in range(NUM_BLOCKS) if b not in in_use and b not in self.cached]
        if count > len(empty) + len(self.cached):
            try:
                self.pool.allocate(count)
            except MemoryError:
                return
            raise AssertionError("more than there is")
        evicted = self.cached[: max(0, count - len(empty))]
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        assert set(blocks) <= set(empty) | set(evicted)
        assert set(evicted) <= set(blocks), "evicted the wrong one"
        for block in evicted:
            self.cached.remove(block)
            del self.key_of[block]
        self.held += blocks

    @precondition(lambda self: self.held)
    @rule(picks=st.lists(st.integers(0, 99), min_size=1, max_size=3))
    def release(self, picks: list[int]) -> None:
        blocks = [self.held.pop(pick % len(self.held)) for pick in picks if self.held]
        self.pool.release(blocks)
        while blocks:
            block = blocks.pop()
            if block not in [*self.held, *blocks] and block in self.key_of:
                self.cached.append(block)

    @precondition(lambda self: self.held)
    @rule(pick=st.integers(0, 99), key=st.sampled_from(KEYS))
    def publish(self, pick: int, key: bytes) -> None:
        block = self.held[pick % len(self.held)]
        if block not in self.key_of:
            self.pool.publish(block, key)
            if key not in self.key_of.values():
                self.key_of[block] = key

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=4, unique=True))
    def hit(self, keys: list[bytes]) -> None:
        block_of = {key: block for block, key in self.key_of.items()}
        expected = []
        for key in keys:
            if key not in block_of:
                break
            expected.append(block_of[key])
        found = self.pool.lookup(keys)
        assert found == expected
        assert self.pool.num_unreferenced(found) == sum(b in self.cached for b in found)
        self.pool.acquire(found)
        self.held += found
        self.cached = [block for block in self.cached if block not in found]

    @invariant()
    def agrees(self) -> None:
        self.pool.check()
        for block in range(NUM_BLOCKS):
            assert self.pool.refs(block) == self.held.count(block)
        assert self.pool.num_cached == len(self.cached)
        assert self.pool.num_free == NUM_BLOCKS - len(set(self.held))


TestPool = PoolMachine.TestCase
