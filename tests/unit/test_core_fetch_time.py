"""What fetching is believed to take, and whom a router asks to lend because of it."""

from __future__ import annotations

import random

import pytest

from baton.core.fetch_time import MAX_UNTESTED, FetchTime
from baton.core.router import Router, WorkerInfo
from baton.types import Role, StageTimes

ASKING_S, EACH_S = 0.003, 0.0001
BLOCK_SIZE = 4


def told_of(*sizes: int, noise: float = 0.0) -> FetchTime:
    rng = random.Random(1)
    found = FetchTime()
    for num_blocks in sizes:
        found.observe(num_blocks, (ASKING_S + num_blocks * EACH_S) * rng.uniform(1, 1 + noise))
    return found


def test_nothing_is_known_at_first() -> None:
    assert FetchTime().predict(1) is None
    assert not FetchTime().is_dearer(1000, 0.0)
    assert not told_of(1).is_dearer(1000, None)


def test_after_one_size_all_of_it_may_be_the_asking() -> None:
    once = told_of(1, 1, 1)
    assert once.predict(100) == pytest.approx(ASKING_S + EACH_S)
    assert told_of(50).predict(1) == pytest.approx(ASKING_S + 50 * EACH_S)


def test_two_sizes_tell_the_parts_apart() -> None:
    found = told_of(1, 100, 20)
    for num_blocks in (1, 7, 1000):
        assert found.predict(num_blocks) == pytest.approx(ASKING_S + num_blocks * EACH_S)


def test_neither_part_takes_less_than_nothing() -> None:
    found = FetchTime()
    found.observe(1, 0.5)  # it had to wait for a long step
    found.observe(100, 0.01)
    assert found.predict(1000) == pytest.approx(found.predict(1))
    found = FetchTime()
    found.observe(10, 0.001)
    found.observe(20, 0.1)
    small = found.predict(0)
    assert small is not None and small >= 0.0


def test_it_follows_what_is_seen() -> None:
    found = told_of(*[1, 100] * 5)
    for num_blocks in [1, 100] * 30:
        found.observe(num_blocks, 10 * (ASKING_S + num_blocks * EACH_S))
    assert found.predict(50) == pytest.approx(10 * (ASKING_S + 50 * EACH_S), rel=0.01)


def test_noise_moves_it_by_no_more_than_noise() -> None:
    found = told_of(*[2, 10, 60, 30] * 10, noise=0.3)
    for num_blocks in (5, 100):
        predicted = found.predict(num_blocks)
        assert predicted is not None
        assert 0.8 < predicted / (ASKING_S + num_blocks * EACH_S) < 1.6


def test_a_belief_that_nothing_tests_lapses() -> None:
    found = told_of(1, 100)
    assert [found.is_dearer(100, 0.001) for _ in range(MAX_UNTESTED)] == [True] * MAX_UNTESTED
    assert not found.is_dearer(100, 0.001), "it is tried once"
    found.observe(100, 0.5)
    assert found.is_dearer(100, 0.001), "and believed again"


def test_a_fetch_that_was_made_is_a_test() -> None:
    found = told_of(1, 100)
    for _ in range(5):
        assert [found.is_dearer(100, 0.001) for _ in range(10)] == [True] * 10
        found.observe(100, ASKING_S + 100 * EACH_S)


# The router --------------------------------------------------------------------------------------


def chat(router: Router, name: str, num_history: int, token_s: float) -> str | None:
    """A second turn, after a first whose answer of so many blocks is in the store of `d0`; returns
    the lender. The prefill worker then tells how long it took, as it would."""
    prompt = [bytes([n]) + name.encode() for n in range(3)]
    answer = [b"a%d" % n + name.encode() for n in range(num_history)]
    router.place(name, 0, BLOCK_SIZE * 3 + 1, prompt)
    router.prefilled(name, 0)
    router.timed("p0", StageTimes(name, 0, 0, prefill_s=13 * token_s, num_prompt_computed=13))
    router.kept("d0", answer)
    router.finished(name, 0)
    placed = router.place(f"{name}+", 0, BLOCK_SIZE * (3 + num_history) + 1, [*prompt, *answer])
    if placed.lender is not None:
        import_s = ASKING_S + num_history * EACH_S
        told = StageTimes(f"{name}+", 0, 0, import_s=import_s, num_imported_blocks=num_history)
        router.timed("p0", told)
    router.finished(f"{name}+", 0)
    return placed.lender


def pair() -> Router:
    router = Router()
    for name, role in (("p0", Role.PREFILL), ("d0", Role.DECODE)):
        router.join(WorkerInfo(name, role, 1, 1000, BLOCK_SIZE, 1000, keeps_blocks=True))
    return router


def test_a_short_fetch_does_not_make_a_long_one_seem_dear() -> None:
    """A token takes 0.1 ms to compute: so one block is computed sooner, and 200 are not."""
    router = pair()
    assert chat(router, "x", 1, 1e-4) == "d0", "nothing is known yet"
    assert chat(router, "y", 1, 1e-4) is None, "what it has told of is dearer than 0.4 ms"
    for number in range(5):
        assert chat(router, f"long{number}", 200, 1e-4) == "d0"
    assert chat(router, "z", 1, 1e-4) is None


def test_what_is_quicker_to_compute_is_computed() -> None:
    """A model so small that a block takes less time to compute than to fetch."""
    router = pair()
    lenders = [chat(router, f"c{n}", 20 + n % 5, 1e-5) for n in range(40)]
    assert lenders[0] == "d0"
    assert 0 < sum(lender is not None for lender in lenders[2:]) <= 4, "but for tests of that"


def test_one_request_has_one_lender() -> None:
    """Where the prompt's worker is busy, another one borrows that of it, and no answer."""
    router = pair()
    router.join(WorkerInfo("p1", Role.PREFILL, 1, 1000, BLOCK_SIZE, 1000, keeps_blocks=True))
    prompt, answer = [b"x0", b"x1", b"x2"], [b"y0", b"y1"]
    assert router.place("x", 0, 12, prompt).prefill == "p0"
    router.prefilled("x", 0)
    router.kept("d0", answer)
    router.finished("x", 0)
    router.place("z", 0, 10_000, [])
    busy = router.place("x++", 0, 20, [*prompt, *answer])
    assert (busy.prefill, busy.lender, busy.first_lent) == ("p1", "p0", 0)
