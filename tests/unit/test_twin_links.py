"""Shared links: transfers take what max-min fairness gives them."""

from __future__ import annotations

import math

import pytest

from baton.twin.clock import Clock
from baton.twin.links import Network, Port


class World:
    def __init__(self, **ports: Port) -> None:
        self.clock = Clock()
        self.network = Network(self.clock, ports)
        self.ended: dict[str, float] = {}
        self.numbers: dict[str, int] = {}

    def send(
        self,
        name: str,
        source: str,
        reader: str,
        num_bytes: float,
        *,
        at: float = 0.0,
        fixed_s: float = 0.0,
    ) -> None:
        def begin() -> None:
            self.numbers[name] = self.network.begin(source, reader, num_bytes, fixed_s, done)

        def done() -> None:
            self.ended[name] = self.clock.now

        self.clock.at(at, begin)

    def run(self) -> dict[str, float]:
        while len(self.clock):
            self.clock.next()
        return {name: round(when, 6) for name, when in self.ended.items()}


def world() -> World:
    return World(a=Port(100.0), b=Port(100.0), c=Port(100.0), slow=Port(20.0, 50.0))


def test_alone_it_takes_the_slower_end() -> None:
    it = world()
    it.send("x", "a", "slow", 40.0, fixed_s=0.5)
    assert it.run() == {"x": 2.5}
    assert it.network.num_bytes == {("a", "slow"): 40.0}


def test_two_readers_share_a_source() -> None:
    it = world()
    it.send("x", "a", "b", 100.0)
    it.send("y", "a", "c", 50.0)
    # Half each until y has its 50 after 1 s; x then has 50 left at the full rate.
    assert it.run() == {"y": 1.0, "x": 1.5}


def test_what_one_cannot_use_the_others_may() -> None:
    it = world()
    it.send("x", "a", "slow", 20.0)
    it.send("y", "a", "b", 80.0)
    assert it.run() == {"x": 1.0, "y": 1.0}


def test_a_latecomer_slows_who_is_under_way() -> None:
    it = world()
    it.send("x", "a", "b", 100.0)
    it.send("y", "c", "b", 25.0, at=0.5)
    # x has moved 50 by 0.5 s; then both at 50 a second: y ends at 1.0, x has 25 left.
    assert it.run() == {"y": 1.0, "x": 1.25}


def test_both_ways_at_once_do_not_share() -> None:
    it = world()
    it.send("x", "a", "b", 100.0)
    it.send("y", "b", "a", 100.0)
    assert it.run() == {"x": 1.0, "y": 1.0}


def test_within_a_host_its_memory_is_the_link() -> None:
    it = world()
    it.send("x", "slow", "slow", 50.0)
    it.send("y", "slow", "slow", 50.0)
    it.send("z", "a", "a", 1e9)  # no rate is known: at once
    assert it.run() == {"z": 0.0, "x": 2.0, "y": 2.0}


def test_a_slow_link_heals() -> None:
    it = world()
    it.send("x", "a", "b", 100.0)
    it.clock.at(0.5, lambda: it.network.slow("a", 0.1))
    it.clock.at(1.5, lambda: it.network.slow("a", 1.0))
    assert it.run() == {"x": pytest.approx(1.9)}  # 50, then 10, then 40


def test_a_link_that_stands_still_moves_nothing_until_it_heals() -> None:
    it = world()
    it.send("x", "a", "b", 100.0)
    it.clock.at(0.0, lambda: it.network.slow("b", 0.0))
    it.clock.at(3.0, lambda: it.network.slow("b", 1.0))
    assert it.run() == {"x": 4.0}


def test_who_gives_up_leaves_room() -> None:
    it = world()
    it.send("x", "a", "b", 100.0)
    it.send("y", "a", "c", 100.0)
    it.clock.at(1.0, lambda: it.network.cancel(it.numbers["x"]))
    assert it.run() == {"y": 1.5}
    assert it.network.num_bytes == {("a", "c"): 100.0}


def test_fair_rates_fill_every_bottleneck() -> None:
    """No transfer could be faster without one that is as slow becoming slower."""
    it = world()
    for number, (source, reader) in enumerate(
        [("a", "b"), ("a", "c"), ("b", "c"), ("a", "slow"), ("slow", "b"), ("c", "a")]
    ):
        it.send(str(number), source, reader, 1e6)
    for _ in range(12):  # the sends, then their beginnings
        it.clock.next()
    transfers = it.network._transfers.values()
    used: dict[object, float] = {}
    for transfer in transfers:
        for link in transfer.links:
            used[link] = used.get(link, 0.0) + transfer.rate
    for link, total in used.items():
        assert total <= it.network._rate(link) + 1e-9  # type: ignore[arg-type]
    for transfer in transfers:
        full = [
            link
            for link in transfer.links
            if math.isclose(used[link], it.network._rate(link))
            and transfer.rate >= max(t.rate for t in transfers if link in t.links) - 1e-9
        ]
        assert full, "it could have had more"
