from __future__ import annotations

import msgspec
import pytest

from baton.core.lease import LeaseTable, verify_mac
from baton.core.store_index import StoreIndex

SECRET = bytes(range(32))
A, B = b"a" * 32, b"b" * 32


@pytest.fixture
def index() -> StoreIndex:
    index = StoreIndex(2)
    assert index.reserve(2)
    for key in (A, B):
        index.begin(key)
        index.seal(key, b"d" * 16)
    return index


@pytest.fixture
def table(index: StoreIndex) -> LeaseTable:
    return LeaseTable("w0", 3, SECRET, index)


def test_a_live_grant_holds_its_keys(index: StoreIndex, table: LeaseTable) -> None:
    table.mint("g", "t", 10.0, now=0.0)
    assert table.cover("g", A)
    assert table.cover("g", A)
    assert table.cover("g", B)
    assert table.keys("g") == (A, B)
    assert index.num_cached == 0
    assert not index.reserve(1)
    assert table.release("g")
    assert index.num_cached == 2
    assert not table.release("g"), "releasing again is no error and does nothing"
    assert not table.cover("g", A)
    assert not table.renew("g", now=1.0)
    index.check()


def test_two_grants_may_hold_the_same_key(index: StoreIndex, table: LeaseTable) -> None:
    for name in ("g", "h"):
        table.mint(name, "t", 10.0, now=0.0)
        assert table.cover(name, A)
    table.release("g")
    assert index.num_cached == 1
    table.release("h")
    assert index.num_cached == 2


def test_only_keys_of_the_store_can_be_covered(table: LeaseTable) -> None:
    table.mint("g", "t", 10.0, now=0.0)
    assert not table.cover("g", b"x" * 32)
    assert table.keys("g") == ()


def test_expiry(index: StoreIndex, table: LeaseTable) -> None:
    assert table.next_expiry() is None
    table.mint("late", "t", 10.0, now=0.0)
    table.mint("soon", "t", 4.0, now=1.0)
    assert table.cover("soon", A)
    assert table.next_expiry() == 5.0
    assert table.expire(4.9) == []
    assert not table.renew("soon", now=5.0), "past its deadline, though not yet swept"
    assert table.expire(5.0) == ["soon"]
    assert index.num_cached == 2
    assert "soon" not in table
    assert "late" in table
    assert table.next_expiry() == 10.0
    assert table.num_expired == 1


def test_renewal_moves_the_deadline(table: LeaseTable) -> None:
    table.mint("g", "t", 6.0, now=0.0)
    for now in (2.0, 4.0, 6.0, 8.0):
        assert table.renew("g", now)
    assert table.expire(13.9) == []
    assert table.next_expiry() == 14.0
    assert table.expire(14.0) == ["g"]


def test_what_a_grant_allows(table: LeaseTable) -> None:
    table.mint("g", "t", 6.0, now=0.0)
    assert not table.allows("g", A, now=1.0), "covers nothing yet"
    table.cover("g", A)
    assert table.allows("g", A, now=5.9)
    assert not table.allows("g", B, now=1.0)
    assert not table.allows("other", A, now=1.0)
    assert not table.allows("g", A, now=6.0), "over, though nobody has called expire"
    assert table.renew("g", now=5.0)
    assert table.allows("g", A, now=10.9)
    table.release("g")
    assert not table.allows("g", A, now=5.0)


def test_released_grants_leave_no_trace(table: LeaseTable) -> None:
    table.mint("stays", "t", 5.0, now=0.0)
    for n in range(10_000):
        table.mint(f"g{n}", "t", 1000.0, now=0.0)
        table.release(f"g{n}")
    assert len(table._heap) < 100
    assert table.expire(5.0) == ["stays"]
    assert len(table) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"grant_id": "g2"},
        {"source": "w1"},
        {"epoch": 4},
        {"tenant": "other"},
        {"mac": bytes(32)},
        {"mac": b""},
        {"grant_id": "gw", "source": "0"},  # the same bytes, cut elsewhere
    ],
    ids=str,
)
def test_a_changed_grant_is_refused(table: LeaseTable, change: dict[str, object]) -> None:
    grant = table.mint("g", "t", 10.0, now=0.0)
    assert verify_mac(SECRET, grant)
    assert not verify_mac(SECRET, msgspec.structs.replace(grant, **change))


def test_another_secret_refuses(table: LeaseTable) -> None:
    assert not verify_mac(b"x" * 32, table.mint("g", "t", 10.0, now=0.0))
