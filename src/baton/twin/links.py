"""Links between workers: who shares a link shares its bandwidth.

A transfer takes a fixed time (latency, and what each block costs) and then moves its bytes. Every
port sends and receives at its rate; what moves within one port (workers of one host) goes through
its memory instead. Rates are max-min fair: all transfers grow alike until one of their links is
full, the others go on. They change when a transfer begins or ends, and with them all ends to come.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import msgspec

from baton.twin.clock import Clock

Done = Callable[[], None]


class Port(msgspec.Struct, frozen=True):
    """Rates of one host: of its network, each way, and between workers on it."""

    bytes_per_s: float
    local_bytes_per_s: float = math.inf


class _Link(NamedTuple):
    port: str
    way: str  # out, in, local


class _Transfer:
    __slots__ = ("done", "left", "links", "rate")

    def __init__(self, links: tuple[_Link, ...], num_bytes: float, done: Done) -> None:
        self.links = links
        self.left = num_bytes
        self.rate = 0.0
        self.done = done


class Network:
    """All transfers under way. `num_bytes` counts those that arrived, by (source, reader) port."""

    def __init__(self, clock: Clock, ports: Mapping[str, Port]) -> None:
        self.num_bytes: dict[tuple[str, str], float] = {}
        self._clock = clock
        self._ports = dict(ports)
        self._factors: dict[str, float] = {}
        self._transfers: dict[int, _Transfer] = {}
        self._num_begun = 0
        self._settled_at = 0.0
        self._version = 0

    def slow(self, port: str, factor: float) -> None:
        """From now on a port has this share of its rates; 1 heals it."""
        self._settle()
        self._factors[port] = factor
        self._share()

    def begin(self, source: str, reader: str, num_bytes: float, fixed_s: float, done: Done) -> int:
        """Move bytes from port to port; `done` is called when they are there. Returns its number.

        fixed_s: what passes before the first byte moves.
        """
        self._num_begun += 1
        number = self._num_begun
        if source == reader:
            links: tuple[_Link, ...] = (_Link(source, "local"),)
        else:
            links = (_Link(source, "out"), _Link(reader, "in"))

        def arrived() -> None:
            moved = self.num_bytes.get((source, reader), 0.0)
            self.num_bytes[source, reader] = moved + num_bytes
            done()

        self._transfers[number] = _Transfer((), num_bytes, arrived)  # it moves nothing yet

        def start() -> None:
            transfer = self._transfers.get(number)
            if transfer is not None:
                self._settle()
                transfer.links = links
                self._share()

        self._clock.after(fixed_s, start)
        return number

    def cancel(self, number: int) -> None:
        """Give a transfer up; nothing is called. No error if it has ended."""
        self._settle()
        if self._transfers.pop(number, None) is not None:
            self._share()

    def _settle(self) -> None:
        """Count what has moved since the rates were set."""
        passed = self._clock.now - self._settled_at
        self._settled_at = self._clock.now
        for transfer in self._transfers.values():
            if transfer.links and transfer.rate < math.inf:
                transfer.left -= transfer.rate * passed

    def _share(self) -> None:
        """Set every rate anew, and the time of the next end."""
        moving = [(n, transfer) for n, transfer in self._transfers.items() if transfer.links]
        self._version += 1
        if not moving:
            return
        self._set_rates([transfer for _, transfer in moving])
        version = self._version
        first_s, number = math.inf, 0
        for n, transfer in moving:
            needs_s = 0.0
            if transfer.left > 0:
                needs_s = transfer.left / transfer.rate if transfer.rate > 0 else math.inf
            if needs_s < first_s:
                first_s, number = needs_s, n
        if first_s < math.inf:
            self._clock.after(first_s, lambda: self._end(number, version))

    def _end(self, number: int, version: int) -> None:
        if version != self._version:
            return
        self._settle()
        transfer = self._transfers.pop(number)
        self._share()
        transfer.done()

    def _set_rates(self, moving: list[_Transfer]) -> None:
        """Progressive filling."""
        using: dict[_Link, list[_Transfer]] = {}
        for transfer in moving:
            transfer.rate = -1.0
            for link in transfer.links:
                using.setdefault(link, []).append(transfer)
        room = {link: self._rate(link) for link in using}
        if len(using) == sum([len(transfer.links) for transfer in moving]):  # nobody shares
            for transfer in moving:
                transfer.rate = max(0.0, min([room[link] for link in transfer.links]))
            return
        waiting = {link: len(users) for link, users in using.items()}
        while waiting:
            fullest = min(waiting, key=lambda link: (room[link] / waiting[link], link))
            rate = max(0.0, room[fullest] / waiting[fullest])
            for transfer in using[fullest]:
                if transfer.rate >= 0:
                    continue
                transfer.rate = rate
                for link in transfer.links:
                    if rate < math.inf:
                        room[link] -= rate
                    waiting[link] -= 1
                    if not waiting[link]:
                        del waiting[link]

    def _rate(self, link: _Link) -> float:
        port = self._ports[link.port]
        rate = port.local_bytes_per_s if link.way == "local" else port.bytes_per_s
        return rate * self._factors.get(link.port, 1.0)
