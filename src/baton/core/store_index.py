"""Which block's key lives in which frame of a worker's block store.

Pure policy: the bytes are `fabric.arena`'s, this decides only what may go where. Owned by the
engine thread, which is the only caller. Every operation is O(1).

A key's life:

    begin ──► WRITING ──seal──► SEALED ──fail──┐      SEALED and held by nobody = *cached*:
                 │  ▲                          │      it may be evicted, oldest use first,
                 │  └──────── begin ───────┐   │      and only when a frame is needed.
                 └──────────fail─────────► DAMAGED    DAMAGED lives only while held.

A hold belongs to the key, and a key names its content, so a damaged key keeps its frame and its
holds until it is written again or the last hold goes.

Credits make sure that an export never fails for want of a frame: they are taken when a sequence
that will be exported is admitted, and `begin` spends one. The invariant behind the promise is

    num_reserved <= num_free + num_cached

and so everything that takes a free or cached frame away without spending a credit (`hold` of a
cached key, an unreserved `begin`) may be refused, while spending a credit never is.
"""

from __future__ import annotations

import enum
from collections import OrderedDict

import msgspec

from baton.errors import BatonError


class StoreFull(BatonError):
    """No frame is free or evictable beyond those that are promised to others."""


class Begun(msgspec.Struct, frozen=True):
    """Answer to `begin`.

    frame: where the key lives. write: True if the caller must copy the block there and then
    `seal` or `fail` it; False if it is there already, or someone is writing it. evicted_key:
    the key that lost this frame; its content must be invalidated before the frame is written
    (`Arena.write` does so itself).
    """

    frame: int
    write: bool
    evicted_key: bytes | None = None


class Entry(msgspec.Struct, frozen=True):
    """What is known of one key; digest is empty until the block is sealed."""

    frame: int
    digest: bytes
    sealed: bool


class _State(enum.Enum):
    WRITING = enum.auto()
    SEALED = enum.auto()
    DAMAGED = enum.auto()


class _Slot:
    __slots__ = ("digest", "frame", "num_holds", "state")

    def __init__(self, frame: int) -> None:
        self.frame = frame
        self.state = _State.WRITING
        self.digest = b""
        self.num_holds = 0


class StoreIndex:
    """The index of one block store of `num_frames` frames.

    Counters, running totals: num_evictions, num_deduplicated (begins that needed no copy),
    num_written (sealed copies), num_failed (damaged or failed copies).
    """

    def __init__(self, num_frames: int) -> None:
        assert num_frames >= 0
        self.num_frames = num_frames
        self.num_reserved = 0
        self.num_evictions = 0
        self.num_deduplicated = 0
        self.num_written = 0
        self.num_failed = 0
        self._free = list(range(num_frames - 1, -1, -1))
        self._slots: dict[bytes, _Slot] = {}
        self._cached: OrderedDict[bytes, None] = OrderedDict()  # least recently used first

    @property
    def num_free(self) -> int:
        """Frames that hold nothing."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Frames with a sealed block that nobody holds."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        """Frames that are not free: written, held or cached."""
        return self.num_frames - len(self._free)

    @property
    def num_reservable(self) -> int:
        """How many more credits could be taken now."""
        return len(self._free) + len(self._cached) - self.num_reserved

    def reserve(self, n: int) -> bool:
        """Take `n` credits, each good for one `begin`; False, and nothing taken, if too many."""
        assert n >= 0
        if n > self.num_reservable:
            return False
        self.num_reserved += n
        return True

    def unreserve(self, n: int) -> None:
        """Give back `n` credits that were not spent."""
        assert 0 <= n <= self.num_reserved
        self.num_reserved -= n

    def begin(self, key: bytes, reserved: bool = True) -> Begun:
        """Find or make a place for `key`.

        With `reserved`, spends one credit whatever the answer: where no copy is needed, the frame
        that the credit stood for becomes reservable again. The block is not held yet; a caller
        who needs it to stay calls `hold` (or `LeaseTable.cover`) before anything else, and then,
        having spent a credit, cannot be refused.

        Raises:
            StoreFull: only if not `reserved`, and no frame is to be had.
        """
        if reserved:
            assert self.num_reserved > 0, "begin without a credit"
            self.num_reserved -= 1
        slot = self._slots.get(key)
        if slot is not None:
            if slot.state is _State.DAMAGED:
                slot.state = _State.WRITING
                return Begun(slot.frame, write=True)
            if key in self._cached:
                self._cached.move_to_end(key)
            self.num_deduplicated += 1
            return Begun(slot.frame, write=False)
        if self.num_reservable <= 0:
            raise StoreFull(f"all {self.num_frames} frames of the block store are in use")
        evicted = None
        if self._free:
            frame = self._free.pop()
        else:
            evicted, _ = self._cached.popitem(last=False)
            frame = self._slots.pop(evicted).frame
            self.num_evictions += 1
        self._slots[key] = _Slot(frame)
        return Begun(frame, write=True, evicted_key=evicted)

    def seal(self, key: bytes, digest: bytes) -> None:
        """The block that `begin` told to write is written, whole, with this digest."""
        slot = self._slots[key]
        assert slot.state is _State.WRITING
        slot.state = _State.SEALED
        slot.digest = digest
        self.num_written += 1
        if slot.num_holds == 0:
            self._cached[key] = None

    def fail(self, key: bytes) -> None:
        """The copy failed, or a sealed block was found damaged: `key` answers no look-up.

        The frame is freed now, or at the last `unhold`. A copy must have ended before it is
        declared failed, else it would write into a frame that is no longer its own.
        """
        slot = self._slots[key]
        assert slot.state is not _State.DAMAGED
        self.num_failed += 1
        slot.state = _State.DAMAGED
        slot.digest = b""
        self._cached.pop(key, None)
        if slot.num_holds == 0:
            self._discard(key)

    def lookup(self, key: bytes) -> Entry | None:
        """The entry of `key`, sealed or being written. Does not count as a use."""
        slot = self._slots.get(key)
        if slot is None or slot.state is _State.DAMAGED:
            return None
        return Entry(slot.frame, slot.digest, slot.state is _State.SEALED)

    def hold(self, key: bytes) -> bool:
        """Keep `key` from eviction until as many `unhold`s.

        False, and nothing held, if the key is not here (or damaged), or if it is a cached block
        whose frame is promised to an export.
        """
        slot = self._slots.get(key)
        if slot is None or slot.state is _State.DAMAGED:
            return False
        if slot.num_holds == 0 and slot.state is _State.SEALED:
            if self.num_reservable <= 0:
                return False
            del self._cached[key]
        slot.num_holds += 1
        return True

    def unhold(self, key: bytes) -> None:
        """Give back one hold; at the last one the block becomes the most recently used."""
        slot = self._slots[key]
        assert slot.num_holds > 0
        slot.num_holds -= 1
        if slot.num_holds > 0 or slot.state is _State.WRITING:
            return
        if slot.state is _State.SEALED:
            self._cached[key] = None
        else:
            self._discard(key)

    def _discard(self, key: bytes) -> None:
        self._free.append(self._slots.pop(key).frame)

    def check(self) -> None:
        """Assert every invariant, in O(num_frames); for tests and for an idle engine."""
        frames = [slot.frame for slot in self._slots.values()] + self._free
        assert sorted(frames) == list(range(self.num_frames)), "a frame is lost or shared"
        assert 0 <= self.num_reserved <= self.num_free + self.num_cached, "a credit is not covered"
        for key, slot in self._slots.items():
            assert slot.num_holds >= 0
            cached = slot.state is _State.SEALED and slot.num_holds == 0
            assert cached == (key in self._cached), "cached must mean sealed and unheld"
            assert bool(slot.digest) == (slot.state is _State.SEALED)
            assert slot.state is not _State.DAMAGED or slot.num_holds > 0
        assert all(key in self._slots for key in self._cached)
