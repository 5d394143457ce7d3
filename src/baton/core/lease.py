"""Grants and their leases: who may read from this worker's block store, and until when.

    mint ──► live ──release──► gone        renew moves the deadline of a live lease;
               └────expire───► gone        one that is past its deadline cannot be renewed.

A live lease holds its keys in the `StoreIndex`, so none of them is evicted; one that is gone
holds nothing. The minter's monotonic clock, passed in as `now`, alone judges a lease: over the
wire goes only a duration, and readers stop a quarter before its end (`imports.READ_WINDOW`).

The engine thread owns the `LeaseTable`. The fabric checks MACs without it (`verify_mac`), with
the secret that is drawn anew for every epoch and never leaves the process; of the table itself it
may only ask what it `allows`.
"""

from __future__ import annotations

import hashlib
import heapq
import hmac

from baton.core.store_index import StoreIndex
from baton.types import Grant


def compute_mac(secret: bytes, grant_id: str, source: str, tenant: str, epoch: int) -> bytes:
    """32 bytes of keyed BLAKE2b over the fields, each with its length before it."""
    mac = hashlib.blake2b(key=secret, digest_size=32, person=b"baton-grant")
    for field in (grant_id, source, tenant, str(epoch)):
        data = field.encode()
        mac.update(len(data).to_bytes(8, "little"))
        mac.update(data)
    return mac.digest()


def verify_mac(secret: bytes, grant: Grant) -> bool:
    """True if `grant` was minted with `secret` and is unchanged; takes constant time.

    `ttl_s` is not covered: it only tells a reader when to stop. Says nothing about expiry.
    """
    expected = compute_mac(secret, grant.grant_id, grant.source, grant.tenant, grant.epoch)
    return hmac.compare_digest(expected, grant.mac)


class _Lease:
    __slots__ = ("deadline", "keys", "ttl_s")

    def __init__(self, ttl_s: float, deadline: float) -> None:
        self.ttl_s = ttl_s
        self.deadline = deadline
        self.keys: dict[bytes, None] = {}


class LeaseTable:
    """The live leases of one store in one epoch.

    secret: 16 to 64 random bytes. num_expired counts leases that ended without a release.
    """

    def __init__(self, source: str, epoch: int, secret: bytes, index: StoreIndex) -> None:
        assert 16 <= len(secret) <= 64
        self.source = source
        self.epoch = epoch
        self.num_expired = 0
        self._secret = secret
        self._index = index
        self._leases: dict[str, _Lease] = {}
        # One (time, id) for each live lease, and some of dead ones. A renewal leaves its entry
        # where it is, too early; it is moved when it reaches the top.
        self._heap: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._leases)

    def __contains__(self, grant_id: str) -> bool:
        return grant_id in self._leases

    def mint(self, grant_id: str, tenant: str, ttl_s: float, now: float) -> Grant:
        """A new grant, which covers no key yet. `grant_id` is new and cannot be guessed."""
        assert ttl_s > 0
        assert grant_id not in self._leases
        deadline = now + ttl_s
        self._leases[grant_id] = _Lease(ttl_s, deadline)
        heapq.heappush(self._heap, (deadline, grant_id))
        mac = compute_mac(self._secret, grant_id, self.source, tenant, self.epoch)
        return Grant(grant_id, self.source, self.epoch, tenant, ttl_s, mac)

    def cover(self, grant_id: str, key: bytes) -> bool:
        """Extend a live lease to `key`, which it then holds; covering twice is covering once.

        False if the lease is gone or the index cannot hold the key (see `StoreIndex.hold`).
        """
        lease = self._leases.get(grant_id)
        if lease is None:
            return False
        if key in lease.keys:
            return True
        if not self._index.hold(key):
            return False
        lease.keys[key] = None
        return True

    def allows(self, grant_id: str, key: bytes, now: float) -> bool:
        """Whether a lease that is alive at `now` covers `key`.

        Safe from other threads, for it only looks up in dictionaries; `now` judges, not whether
        `expire` has been called yet.
        """
        lease = self._leases.get(grant_id)
        return lease is not None and now < lease.deadline and key in lease.keys

    def renew(self, grant_id: str, now: float) -> bool:
        """Start the time to live anew. False if the lease is gone or past its deadline."""
        lease = self._leases.get(grant_id)
        if lease is None or now >= lease.deadline:
            return False
        lease.deadline = now + lease.ttl_s
        return True

    def release(self, grant_id: str) -> bool:
        """End a lease and let go of its keys. False if it was gone already, which is no error."""
        lease = self._leases.pop(grant_id, None)
        if lease is None:
            return False
        for key in lease.keys:
            self._index.unhold(key)
        if len(self._heap) > 2 * len(self._leases) + 64:
            self._heap = [(lease.deadline, name) for name, lease in self._leases.items()]
            heapq.heapify(self._heap)
        return True

    def expire(self, now: float) -> list[str]:
        """End every lease whose deadline is not after `now`; returns their ids."""
        expired = []
        while (soonest := self.next_expiry()) is not None and soonest <= now:
            grant_id = self._heap[0][1]
            self.release(grant_id)
            expired.append(grant_id)
        self.num_expired += len(expired)
        return expired

    def next_expiry(self) -> float | None:
        """The earliest deadline of a live lease; None without leases."""
        while self._heap:
            at, grant_id = self._heap[0]
            lease = self._leases.get(grant_id)
            if lease is None:
                heapq.heappop(self._heap)
            elif lease.deadline > at:
                heapq.heapreplace(self._heap, (lease.deadline, grant_id))
            else:
                return at
        return None

    def keys(self, grant_id: str) -> tuple[bytes, ...]:
        """The keys that a lease holds, in the order they were covered; none if it is gone."""
        lease = self._leases.get(grant_id)
        return () if lease is None else tuple(lease.keys)
