"""Blocks from store to pool, on virtual time: what the fabric's threads do, without the bytes.

A worker has one fetcher for each peer, which does one fetch at a time, as the fabric has; what
waits for it waits here. Bytes move over the `Network`, which shares bandwidth among all. A block
is whole if its source still lives in the epoch of the grant and the lease still covers it when the
last byte has come; and what is not there by the deadline of its order has not come at all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from baton.core.cost import Link
from baton.core.imports import OK
from baton.core.plan import ImportOrder
from baton.twin.clock import Clock
from baton.twin.links import Network

if TYPE_CHECKING:
    from baton.twin.node import Node

Arrived = Callable[[tuple[str, ...], float], None]
"""Results, a word a block, and the seconds that the fetch took without its wait."""


class _Job:
    __slots__ = ("arrived", "began", "order", "reader", "transfer")

    def __init__(self, reader: Node, order: ImportOrder, arrived: Arrived) -> None:
        self.reader = reader
        self.order = order
        self.arrived = arrived
        self.began = 0.0
        self.transfer: int | None = None


class Fetcher:
    """All fetches of all workers."""

    def __init__(
        self, clock: Clock, network: Network, link: Link, find: Callable[[str], Node]
    ) -> None:
        self._clock = clock
        self._network = network
        self._link = link
        self._find = find
        self._queues: dict[tuple[str, str], deque[_Job]] = {}
        self._wires: set[tuple[str, int, str]] = set()

    def own(self, reader: Node, order: ImportOrder, done_at: float, arrived: Arrived) -> None:
        """Blocks out of the reader's own store, which holds them meanwhile."""
        elapsed_s = done_at - self._clock.now
        results = (OK,) * len(order.wanted)
        self._clock.at(done_at, lambda: arrived(results, elapsed_s))

    def fetch(self, reader: Node, order: ImportOrder, arrived: Arrived) -> None:
        """Blocks of a peer."""
        assert order.grant is not None
        way = (reader.setup.worker_id, order.grant.source)
        queue = self._queues.setdefault(way, deque())
        queue.append(_Job(reader, order, arrived))
        if len(queue) == 1:
            self._begin(way)

    def lost(self, worker_id: str) -> None:
        """A worker has died: nothing comes from it, and nothing need come to it."""
        for way in list(self._queues):
            reader, source = way
            if reader == worker_id:
                for job in self._queues.pop(way):
                    if job.transfer is not None:
                        self._network.cancel(job.transfer)
            elif source == worker_id:
                for job in list(self._queues[way]):
                    if job.transfer is not None:
                        self._network.cancel(job.transfer)
                    self._finish(way, job, "unreachable")

    def _begin(self, way: tuple[str, str]) -> None:
        job = self._queues[way][0]
        now, order, reader = self._clock.now, job.order, job.reader
        job.began = now
        source = self._find(way[1])
        if not source.is_alive:
            self._clock.after(0.0, lambda: self._finish(way, job, "unreachable"))
            return
        if now >= order.deadline:
            self._clock.after(0.0, lambda: self._finish(way, job, "timed_out"))
            return
        limits = reader.setup.limits
        num_blocks, num_bytes = len(order.wanted), limits.kv_format.block_bytes
        fixed_s = self._link.latency_s + num_blocks * self._link.per_block_s
        for figures in limits.codecs:
            if figures.name == order.codec:
                num_bytes = figures.encoded_bytes
                fixed_s += num_blocks * (figures.encode_s + figures.decode_s)
        ports = source.setup.port, reader.setup.port
        wire = (reader.setup.worker_id, reader.epoch, way[1])
        if ports[0] != ports[1] and wire not in self._wires:
            self._wires.add(wire)
            reader.put(lambda: reader.scheduler.link(way[1]), urgent=False)
        job.transfer = self._network.begin(
            *ports, float(num_blocks * num_bytes), fixed_s, lambda: self._moved(way, job)
        )
        self._clock.at(order.deadline, lambda: self._too_late(way, job))

    def _moved(self, way: tuple[str, str], job: _Job) -> None:
        source, grant = self._find(way[1]), job.order.grant
        assert grant is not None
        if grant.epoch != source.epoch:
            self._finish(way, job, "stale_epoch")
            return
        now, results = self._clock.now, []
        for want in job.order.wanted:
            entry = source.index.lookup(want.key)
            held = source.leases.allows(grant.grant_id, want.key, now)
            results.append(OK if held and entry is not None and entry.sealed else "missing")
        self._end(way, job, tuple(results))

    def _too_late(self, way: tuple[str, str], job: _Job) -> None:
        queue = self._queues.get(way)
        if queue and queue[0] is job and job.transfer is not None:
            self._network.cancel(job.transfer)
            self._finish(way, job, "timed_out")

    def _finish(self, way: tuple[str, str], job: _Job, reason: str) -> None:
        self._end(way, job, (reason,) * len(job.order.wanted))

    def _end(self, way: tuple[str, str], job: _Job, results: tuple[str, ...]) -> None:
        queue = self._queues.get(way)
        if not queue or queue[0] is not job:
            return  # its reader has died
        queue.popleft()
        job.arrived(results, self._clock.now - job.began)
        if queue:
            self._begin(way)
        else:
            self._queues.pop(way, None)
