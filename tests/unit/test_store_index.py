from __future__ import annotations

import pytest

from baton.core.store_index import StoreFull, StoreIndex

A, B, C, D = (bytes([n]) * 32 for n in range(4))


def export(index: StoreIndex, *keys: bytes) -> None:
    for key in keys:
        assert index.reserve(1)
        if index.begin(key).write:
            index.seal(key, b"d" * 16)


def test_an_export_with_a_credit_always_finds_a_frame() -> None:
    index = StoreIndex(2)
    export(index, A, B)
    assert index.reserve(2)
    assert not index.reserve(1)
    assert not index.hold(A), "A's frame is promised"
    assert index.begin(C).evicted_key == A
    assert index.begin(D).evicted_key == B
    assert not index.reserve(1)
    with pytest.raises(StoreFull):
        index.begin(A, reserved=False)
    index.check()


def test_reserving_too_much_takes_nothing() -> None:
    index = StoreIndex(3)
    assert not index.reserve(4)
    assert index.num_reservable == 3
    assert index.reserve(3)
    index.unreserve(2)
    assert index.num_reservable == 2


def test_the_least_recently_used_goes_first() -> None:
    index = StoreIndex(3)
    export(index, A, B, C)
    assert index.hold(A)
    index.unhold(A)  # used now, after B and C
    export(index, B)  # and B after that
    assert index.reserve(1)
    assert index.begin(D).evicted_key == C
    assert index.num_evictions == 1
    assert index.num_deduplicated == 1


def test_what_is_held_or_written_is_not_evicted() -> None:
    index = StoreIndex(2)
    export(index, A)
    assert index.hold(A)
    assert index.reserve(1)
    index.begin(B)
    assert not index.reserve(1)
    index.seal(B, b"d" * 16)
    assert index.reserve(1)
    assert index.begin(C).evicted_key == B
    assert index.lookup(A) is not None
    assert index.lookup(B) is None
    index.check()


def test_a_known_key_is_not_written_again_and_the_frame_stays_reservable() -> None:
    index = StoreIndex(2)
    assert index.reserve(2)
    first = index.begin(A)
    second = index.begin(A)
    assert (first.write, second.write) == (True, False)
    assert first.frame == second.frame
    assert index.num_reservable == 1
    entry = index.lookup(A)
    assert entry is not None
    assert not entry.sealed
    index.seal(A, b"d" * 16)
    entry = index.lookup(A)
    assert entry is not None
    assert entry.sealed
    assert entry.digest == b"d" * 16
    assert index.num_written == 1


def test_a_failed_copy_frees_its_frame() -> None:
    index = StoreIndex(1)
    assert index.reserve(1)
    index.begin(A)
    index.fail(A)
    assert index.lookup(A) is None
    assert index.num_free == 1
    assert index.num_failed == 1
    index.check()


def test_a_damaged_block_keeps_its_holds_until_it_is_written_again() -> None:
    index = StoreIndex(2)
    export(index, A)
    frame = index.lookup(A)
    assert frame is not None
    assert index.hold(A)
    index.fail(A)
    assert index.lookup(A) is None
    assert not index.hold(A)
    assert index.num_used == 1
    assert index.reserve(1)
    again = index.begin(A)
    assert again.write
    assert again.frame == frame.frame
    assert index.num_reservable == 1, "the frame was A's already; the credit came back"
    index.seal(A, b"e" * 16)
    index.unhold(A)
    assert index.num_cached == 1
    index.check()


def test_a_store_of_no_frames_takes_nothing() -> None:
    index = StoreIndex(0)
    assert index.reserve(0)
    assert not index.reserve(1)
    index.check()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda index: index.begin(B),
        lambda index: index.unreserve(1),
        lambda index: index.unhold(A),
        lambda index: index.seal(A, b"d" * 16),
    ],
    ids=["begin without credit", "unreserve too much", "unhold unheld", "seal twice"],
)
def test_misuse_by_the_owner_is_caught(wrong: object) -> None:
    index = StoreIndex(2)
    export(index, A)
    assert callable(wrong)
    with pytest.raises(AssertionError):
        wrong(index)
