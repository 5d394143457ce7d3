"""Blocks from store to pool, on virtual time: what the fabric's threads do, without the bytes.

A worker has one fetcher for each peer, as the fabric has: what is asked for while it is busy waits
here, and goes as one train when its turn comes, first come first served, to be acknowledged when
the last byte has come. Bytes move over the `Network`, which shares bandwidth among all. A block is
whole if its source still lives in the epoch of the grant and the lease still covers it by then;
and what is not there by the deadline of its order has not come at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from baton.core.cost import Link
from baton.core.imports import OK
from baton.core.plan import ImportOrder
from baton.twin.clock import Clock
from baton.twin.links import Network

if TYPE_CHECKING:
    from baton.twin.node import Node

Arrived = Callable[[tuple[str, ...], float], None]
"""Results, a word a block, and the seconds that the fetch took without its wait."""


class _Job(NamedTuple):
    order: ImportOrder
    arrived: Arrived
    num_bytes: int


class _Way:
    """From one store to one pool: the train under way, and what waits for it."""

    __slots__ = ("began", "reader", "source", "train", "transfer", "waiting")

    def __init__(self, source: str, reader: Node) -> None:
        self.source = source
        self.reader = reader
        self.train: list[_Job] = []
        self.waiting: list[_Job] = []
        self.transfer: int | None = None
        self.began = 0.0


class Fetcher:
    """All fetches of all workers."""

    def __init__(
        self, clock: Clock, network: Network, link: Link, find: Callable[[str], Node]
    ) -> None:
        self._clock = clock
        self._network = network
        self._link = link
        self._find = find
        self._ways: dict[tuple[str, str], _Way] = {}
        self._wires: set[tuple[str, int, str]] = set()

    def own(self, order: ImportOrder, done_at: float, arrived: Arrived) -> None:
        """Blocks out of the reader's own store, which holds them meanwhile."""
        elapsed_s = done_at - self._clock.now
        results = (OK,) * len(order.wanted)
        self._clock.at(done_at, lambda: arrived(results, elapsed_s))

    def fetch(self, reader: Node, order: ImportOrder, arrived: Arrived) -> None:
        """Blocks of a peer."""
        assert order.grant is not None
        names = (order.grant.source, reader.setup.worker_id)
        way = self._ways.get(names)
        if way is None:
            way = self._ways[names] = _Way(names[0], reader)
        block_bytes = reader.setup.limits.kv_format.block_bytes
        for figures in reader.setup.limits.codecs:
            if figures.name == order.codec:
                block_bytes = figures.encoded_bytes
        way.waiting.append(_Job(order, arrived, len(order.wanted) * block_bytes))
        if not way.train:
            self._depart(way)

    def lost(self, worker_id: str) -> None:
        """A worker has died: nothing comes from it, and nothing need come to it."""
        for names, way in list(self._ways.items()):
            if worker_id not in names:
                continue
            if way.transfer is not None:
                self._network.cancel(way.transfer)
            del self._ways[names]
            if way.source == worker_id:
                for job in (*way.train, *way.waiting):
                    job.arrived(("unreachable",) * len(job.order.wanted), 0.0)

    def _depart(self, way: _Way) -> None:
        way.train, way.waiting = way.waiting, []
        way.began = now = self._clock.now
        source, reader = self._find(way.source), way.reader
        if not source.is_alive or now >= min(job.order.deadline for job in way.train):
            self._clock.after(0.0, lambda: self._arrive(way))
            return
        ports = source.setup.port, reader.setup.port
        self._tell_wire(reader, way.source, ports)
        fixed_s = self._link.latency_s
        num_bytes = 0
        codecs = {figures.name: figures for figures in reader.setup.limits.codecs}
        for job in way.train:
            coding = codecs.get(job.order.codec)
            coding_s = 0.0 if coding is None else coding.encode_s + coding.decode_s
            fixed_s += len(job.order.wanted) * (self._link.per_block_s + coding_s)
            num_bytes += job.num_bytes
        way.transfer = self._network.begin(
            *ports, float(num_bytes), fixed_s, lambda: self._arrive(way)
        )
        train, deadline = way.train, min(job.order.deadline for job in way.train)
        self._clock.at(deadline, lambda: self._give_up(way, train))

    def _tell_wire(self, reader: Node, source: str, ports: tuple[str, str]) -> None:
        """A worker learns that a peer is reached over a network when it first fetches from it."""
        wire = (reader.setup.worker_id, reader.epoch, source)
        if ports[0] != ports[1] and wire not in self._wires:
            self._wires.add(wire)
            reader.put(lambda: reader.scheduler.link(source), urgent=False)

    def _give_up(self, way: _Way, train: list[_Job]) -> None:
        """At the first deadline in the train; the network was slower than the lease allows for."""
        if way.train is train and way.transfer is not None:
            self._network.cancel(way.transfer)
            self._arrive(way)

    def _arrive(self, way: _Way) -> None:
        train, way.train, way.transfer = way.train, [], None
        passed = self._clock.now - way.began
        num_bytes = sum(job.num_bytes for job in train)
        for job in train:
            job.arrived(self._results(way, job.order), passed * job.num_bytes / num_bytes)
        if way.waiting and not way.train:
            self._depart(way)

    def _results(self, way: _Way, order: ImportOrder) -> tuple[str, ...]:
        source, grant, now = self._find(way.source), order.grant, self._clock.now
        assert grant is not None
        reason = ""
        if not source.is_alive:
            reason = "unreachable"
        elif grant.epoch != source.epoch:
            reason = "stale_epoch"
        elif now >= order.deadline:
            reason = "timed_out"
        if reason:
            return (reason,) * len(order.wanted)
        allows, lookup = source.leases.allows, source.index.lookup
        results = []
        for want in order.wanted:
            entry = lookup(want.key) if allows(grant.grant_id, want.key, now) else None
            results.append(OK if entry is not None and entry.sealed else "missing")
        return tuple(results)
