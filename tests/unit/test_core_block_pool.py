"""Block pool: references, cache, eviction order."""

from __future__ import annotations

import pytest

from baton.core.block_pool import BlockPool


def _published(pool: BlockPool, *keys: bytes) -> list[int]:
    blocks = pool.allocate(len(keys))
    for block, key in zip(blocks, keys, strict=True):
        pool.publish(block, key)
    return blocks


def test_allocates_all_and_no_more() -> None:
    pool = BlockPool(3)
    assert sorted(pool.allocate(3)) == [0, 1, 2]
    assert pool.num_free == 0
    with pytest.raises(MemoryError):
        pool.allocate(1)
    pool.check()


def test_a_pool_needs_a_block() -> None:
    with pytest.raises(ValueError, match="at least one"):
        BlockPool(0)


def test_shared_block_lives_until_the_last_release() -> None:
    pool = BlockPool(1)
    (block,) = _published(pool, b"k")
    pool.acquire([block])
    pool.release([block])
    assert pool.num_free == 0
    pool.release([block])
    assert pool.num_free == pool.num_cached == 1
    with pytest.raises(AssertionError, match="once too often"):
        pool.release([block])


def test_cached_block_is_found_and_taken_back() -> None:
    pool = BlockPool(2)
    (block,) = _published(pool, b"k")
    pool.release([block])
    assert pool.lookup([b"k"]) == [block]
    assert pool.num_unreferenced([block]) == 1
    pool.acquire([block])
    assert pool.num_unreferenced([block]) == 0
    assert pool.num_free == 1
    pool.check()


def test_lookup_stops_at_the_first_gap() -> None:
    pool = BlockPool(3)
    blocks = _published(pool, b"1", b"3")
    assert pool.lookup([b"1", b"2", b"3"]) == blocks[:1]


def test_evicts_least_recently_released_and_a_prefix_from_its_end() -> None:
    pool = BlockPool(4)
    old = _published(pool, b"a1", b"a2")
    new = _published(pool, b"b1", b"b2")
    pool.release(old)
    pool.release(new)
    pool.allocate(1)
    assert pool.lookup([b"a1", b"a2"]) == old[:1]
    pool.allocate(1)
    assert pool.lookup([b"a1"]) == []
    assert pool.lookup([b"b1", b"b2"]) == new
    assert pool.num_evictions == 2
    pool.check()


def test_key_that_is_taken_stays_put() -> None:
    pool = BlockPool(2)
    (first,) = _published(pool, b"k")
    (second,) = _published(pool, b"k")
    assert pool.lookup([b"k"]) == [first]
    pool.release([second])
    assert pool.num_cached == 0  # it has no key, so it is empty
    pool.check()


def test_check_sees_damage() -> None:
    pool = BlockPool(2)
    (block,) = _published(pool, b"k")
    pool._key_of[block] = None
    with pytest.raises(AssertionError):
        pool.check()
