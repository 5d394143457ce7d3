"""`StoreIndex` and `LeaseTable` together against a model that is slow and plain.

The last test patches bugs into the code, one at a time, and expects the machine to find each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from baton.core import store_index
from baton.core.lease import LeaseTable, verify_mac
from baton.core.store_index import Begun, StoreFull, StoreIndex

NUM_FRAMES = 3
KEYS = [bytes([n]) * 32 for n in range(5)]
GRANTS = [f"grant-{n}" for n in range(2)]
SECRET = b"s" * 32
keys = st.sampled_from(KEYS)
grants = st.sampled_from(GRANTS)


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = StoreIndex(NUM_FRAMES)
        self.table = LeaseTable("w0", 7, SECRET, self.index)
        self.now = 100.0
        # The model.
        self.memory: dict[int, bytes | None] = {}  # frame -> the key whose bytes are in it
        self.state: dict[bytes, str] = {}  # writing, sealed, damaged
        self.holds: Counter[bytes] = Counter()  # by direct holds only
        self.leases: dict[str, tuple[float, float, list[bytes]]] = {}  # ttl, deadline, keys
        self.recency: list[bytes] = []  # of cached keys, least recent first
        self.credits = 0

    # What the model knows

    def num_holds(self, key: bytes) -> int:
        return self.holds[key] + sum(key in covered for _, _, covered in self.leases.values())

    def is_cached(self, key: bytes) -> bool:
        return self.state.get(key) == "sealed" and self.num_holds(key) == 0

    def num_available(self) -> int:
        return NUM_FRAMES - sum(not self.is_cached(key) for key in self.state) - self.credits

    def settle(self) -> None:
        """Bring the model's recency and damaged keys in line with its holds."""
        self.recency = [key for key in self.recency if self.is_cached(key)]
        self.recency += [k for k in self.state if self.is_cached(k) and k not in self.recency]
        for key in [k for k, s in self.state.items() if s == "damaged" and not self.num_holds(k)]:
            del self.state[key]

    # Credits and writing

    @rule(n=st.integers(0, NUM_FRAMES + 1))
    def reserve(self, n: int) -> None:
        granted = self.index.reserve(n)
        assert granted == (n <= self.num_available())
        self.credits += n if granted else 0

    @precondition(lambda self: self.credits)
    @rule(data=st.data())
    def unreserve(self, data: st.DataObject) -> None:
        n = data.draw(st.integers(1, self.credits))
        self.index.unreserve(n)
        self.credits -= n

    @precondition(lambda self: self.credits)
    @rule(key=keys, grant=st.none() | grants)
    def begin(self, key: bytes, grant: str | None) -> None:
        self.credits -= 1
        self.took(key, self.index.begin(key))
        if grant in self.leases:
            assert self.table.cover(grant, key), "covering right after begin must not fail"
            self.covered(grant, key)

    @rule(key=keys, grant=grants)
    def export(self, key: bytes, grant: str) -> None:
        """The whole way of a block, so that there is soon something to quarrel about."""
        self.reserve(1)
        if self.credits:
            self.begin(key, grant)
            self.seal(key)

    @rule(key=keys)
    def begin_unreserved(self, key: bytes) -> None:
        refused = key not in self.state and self.num_available() <= 0
        try:
            begun = self.index.begin(key, reserved=False)
        except StoreFull:
            assert refused
        else:
            assert not refused
            self.took(key, begun)

    def took(self, key: bytes, begun: Begun) -> None:
        assert begun.write == (self.state.get(key) not in ("writing", "sealed"))
        if begun.evicted_key is not None:
            assert len(self.state) == NUM_FRAMES, "evicted while a frame was free"
            assert begun.evicted_key == self.recency[0], "evicted another than the oldest cached"
            del self.state[begun.evicted_key]
        if begun.write:
            self.memory[begun.frame] = None
            self.state[key] = "writing"
        elif key in self.recency:
            self.recency.append(self.recency.pop(self.recency.index(key)))
        self.settle()

    @rule(key=keys)
    def seal(self, key: bytes) -> None:
        entry = self.index.lookup(key)
        if self.state.get(key) != "writing" or entry is None:
            return
        self.memory[entry.frame] = key
        self.index.seal(key, b"digest of " + key)
        self.state[key] = "sealed"
        self.settle()

    @rule(key=keys)
    def fail(self, key: bytes) -> None:
        if self.state.get(key) in ("writing", "sealed"):
            self.index.fail(key)
            self.state[key] = "damaged"
            self.settle()

    # Holds and leases

    def may_hold(self, key: bytes) -> bool:
        if self.is_cached(key):
            return self.num_available() > 0
        return self.state.get(key) in ("writing", "sealed")

    @rule(key=keys)
    def hold(self, key: bytes) -> None:
        expected = self.may_hold(key)
        assert self.index.hold(key) == expected
        self.holds[key] += expected
        self.settle()

    @rule(key=keys)
    def unhold(self, key: bytes) -> None:
        if self.holds[key]:
            self.index.unhold(key)
            self.holds[key] -= 1
            self.settle()

    @rule(grant=grants, ttl_s=st.sampled_from([1.0, 3.0, 10.0]))
    def mint(self, grant: str, ttl_s: float) -> None:
        if grant not in self.leases:
            assert verify_mac(SECRET, self.table.mint(grant, "tenant", ttl_s, self.now))
            self.leases[grant] = ttl_s, self.now + ttl_s, []

    @rule(grant=grants, key=keys)
    def cover(self, grant: str, key: bytes) -> None:
        expected = grant in self.leases and (key in self.leases[grant][2] or self.may_hold(key))
        assert self.table.cover(grant, key) == expected
        if expected:
            self.covered(grant, key)

    def covered(self, grant: str, key: bytes) -> None:
        if key not in self.leases[grant][2]:
            self.leases[grant][2].append(key)
        self.settle()

    @rule(grant=grants)
    def renew(self, grant: str) -> None:
        lease = self.leases.get(grant)
        alive = lease is not None and self.now < lease[1]
        assert self.table.renew(grant, self.now) == alive
        if lease is not None and alive:
            self.leases[grant] = lease[0], self.now + lease[0], lease[2]

    @rule(grant=grants)
    def release(self, grant: str) -> None:
        lease = self.leases.get(grant)
        assert self.table.release(grant) == (lease is not None)
        self.ended([grant])

    @rule(elapsed_s=st.sampled_from([0.5, 1.0, 2.5, 9.5]))
    def pass_time(self, elapsed_s: float) -> None:
        self.now += elapsed_s

    @rule()
    def expire(self) -> None:
        expected = [grant for grant, lease in self.leases.items() if lease[1] <= self.now]
        expired = self.table.expire(self.now)
        assert sorted(expired) == sorted(expected)
        self.ended(expired)

    def ended(self, ended: list[str]) -> None:
        for grant in ended:
            covered = self.leases[grant][2] if grant in self.leases else []
            while covered:
                covered.pop(0)
                self.settle()
            self.leases.pop(grant, None)

    # What must always be true

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.index.check()
        assert self.index.num_reserved == self.credits
        assert self.index.num_reservable == self.num_available()
        assert self.index.num_free == NUM_FRAMES - len(self.state)
        for key in KEYS:
            entry = self.index.lookup(key)
            state = self.state.get(key)
            assert (entry is not None) == (state in ("writing", "sealed"))
            if entry is not None:
                assert entry.sealed == (state == "sealed")
                assert entry.digest == (b"digest of " + key if entry.sealed else b"")
                assert self.memory[entry.frame] == (key if entry.sealed else None)
        assert len(self.table) == len(self.leases)
        for grant, (_, _, covered) in self.leases.items():
            assert self.table.keys(grant) == tuple(covered)
        deadlines = [lease[1] for lease in self.leases.values()]
        assert self.table.next_expiry() == min(deadlines, default=None)


SETTINGS = settings(
    max_examples=100,
    stateful_step_count=50,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def test_store_and_leases_agree_with_the_model() -> None:
    run_state_machine_as_test(StoreMachine, settings=SETTINGS)


# The seeded bugs: each replaces a method by one that is wrong in one way.

Patch = Callable[[pytest.MonkeyPatch], None]
_hold, _unhold, _begin = (
    StoreIndex.hold,
    StoreIndex.unhold,
    StoreIndex.begin,
)


def evict_a_held_frame(patch: pytest.MonkeyPatch) -> None:
    def hold(self: StoreIndex, key: bytes) -> bool:
        was_cached = key in self._cached
        held = _hold(self, key)
        if held and was_cached:
            self._cached[key] = None
        return held

    patch.setattr(StoreIndex, "hold", hold)
    patch.setattr(StoreIndex, "check", lambda self: None)  # found by what is evicted, too


def evict_a_half_written_frame(patch: pytest.MonkeyPatch) -> None:
    def begin(self: StoreIndex, key: bytes, reserved: bool = True) -> Begun:
        begun = _begin(self, key, reserved)
        if begun.write:
            self._cached[key] = None
        return begun

    patch.setattr(StoreIndex, "begin", begin)
    patch.setattr(StoreIndex, "check", lambda self: None)


def evict_the_newest(patch: pytest.MonkeyPatch) -> None:
    def begin(self: StoreIndex, key: bytes, reserved: bool = True) -> Begun:
        if not self._free and self._cached and key not in self._slots:
            self._cached.move_to_end(next(reversed(self._cached)), last=False)
        return _begin(self, key, reserved)

    patch.setattr(StoreIndex, "begin", begin)


def forget_the_credit_when_deduplicating(patch: pytest.MonkeyPatch) -> None:
    def begin(self: StoreIndex, key: bytes, reserved: bool = True) -> Begun:
        begun = _begin(self, key, reserved)
        self.num_reserved += reserved and not begun.write
        return begun

    patch.setattr(StoreIndex, "begin", begin)


def write_twice(patch: pytest.MonkeyPatch) -> None:
    def begin(self: StoreIndex, key: bytes, reserved: bool = True) -> Begun:
        begun = _begin(self, key, reserved)
        return Begun(begun.frame, write=True, evicted_key=begun.evicted_key)

    patch.setattr(StoreIndex, "begin", begin)


def hold_what_is_promised(patch: pytest.MonkeyPatch) -> None:
    def hold(self: StoreIndex, key: bytes) -> bool:
        num_reserved, self.num_reserved = self.num_reserved, 0
        held = _hold(self, key)
        self.num_reserved = num_reserved
        return held

    patch.setattr(StoreIndex, "hold", hold)


def free_a_damaged_block_that_is_held(patch: pytest.MonkeyPatch) -> None:
    def fail(self: StoreIndex, key: bytes) -> None:
        self._cached.pop(key, None)
        self._discard(key)

    patch.setattr(StoreIndex, "fail", fail)


def cache_a_damaged_block(patch: pytest.MonkeyPatch) -> None:
    def unhold(self: StoreIndex, key: bytes) -> None:
        slot = self._slots[key]
        if slot.state is store_index._State.DAMAGED:
            slot.state = store_index._State.SEALED
        _unhold(self, key)

    patch.setattr(StoreIndex, "unhold", unhold)


def renew_an_expired_lease(patch: pytest.MonkeyPatch) -> None:
    def renew(self: LeaseTable, grant_id: str, now: float) -> bool:
        lease = self._leases.get(grant_id)
        if lease is not None:
            lease.deadline = now + lease.ttl_s
        return lease is not None

    patch.setattr(LeaseTable, "renew", renew)


def expire_a_renewed_lease(patch: pytest.MonkeyPatch) -> None:
    def next_expiry(self: LeaseTable) -> float | None:
        while self._heap and self._heap[0][1] not in self._leases:
            self._heap.pop(0)
        return self._heap[0][0] if self._heap else None

    patch.setattr(LeaseTable, "next_expiry", next_expiry)


def release_without_letting_go(patch: pytest.MonkeyPatch) -> None:
    def release(self: LeaseTable, grant_id: str) -> bool:
        return self._leases.pop(grant_id, None) is not None

    patch.setattr(LeaseTable, "release", release)


def cover_twice(patch: pytest.MonkeyPatch) -> None:
    def cover(self: LeaseTable, grant_id: str, key: bytes) -> bool:
        lease = self._leases.get(grant_id)
        if lease is None or not self._index.hold(key):
            return False
        lease.keys[key] = None
        return True

    patch.setattr(LeaseTable, "cover", cover)


@pytest.mark.parametrize(
    "seed_bug",
    [
        evict_a_held_frame,
        evict_a_half_written_frame,
        evict_the_newest,
        forget_the_credit_when_deduplicating,
        write_twice,
        hold_what_is_promised,
        free_a_damaged_block_that_is_held,
        cache_a_damaged_block,
        renew_an_expired_lease,
        expire_a_renewed_lease,
        release_without_letting_go,
        cover_twice,
    ],
    ids=lambda patch: patch.__name__,
)
def test_the_machine_finds_a_seeded_bug(seed_bug: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    seed_bug(monkeypatch)
    quick = settings(SETTINGS, max_examples=5000, derandomize=True, phases=[Phase.generate])
    with pytest.raises((AssertionError, KeyError)):
        run_state_machine_as_test(StoreMachine, settings=quick)
