"""The memory of attempts."""

from __future__ import annotations

from baton.core.attempts import AttemptMemory


def test_ended_attempts_are_remembered_for_a_while() -> None:
    memory = AttemptMemory(2)
    for n in range(3):
        memory.begin((f"r{n}", 0, 5))
    memory.end(("r0", 0, 5))
    memory.end(("r1", 0, 5))
    assert memory.latest("r0", 0) == ("r0", 0, 5)
    memory.end(("r2", 0, 5))
    assert memory.latest("r0", 0) is None
    assert memory.latest("r1", 0) == ("r1", 0, 5)


def test_the_living_are_never_forgotten() -> None:
    memory = AttemptMemory(1)
    memory.begin(("a", 0, 0))
    memory.end(("a", 0, 0))
    memory.begin(("a", 0, 1))
    for n in range(10):
        memory.begin((f"r{n}", 0, 0))
        memory.end((f"r{n}", 0, 0))
    assert memory.latest("a", 0) == ("a", 0, 1)
    assert memory.latest("a", 1) is None
