"""Workers that stand still, and suspects: what the request table does about them."""

from __future__ import annotations

from typing import Any

from unit.test_core_handoff import (
    PROMPT,
    Gateway,
    ended,
    handoff,
    lending,
    sealed,
    submitted,
    taken_over,
    tokens,
    told,
)

from baton.core.alone import ALONE_TOKENS
from baton.core.instructions import Outcome, Release, Submit, Withdraw
from baton.core.life import Phase
from baton.types import FinishReason, Request, TokenDelta

SUSPECT = ("r", 0, 0)


def legs(outcome: Outcome) -> dict[str, Request]:
    """What was submitted, by request."""
    found = [one.request for one in outcome.instructions if isinstance(one, Submit)]
    assert len({leg.id for leg in found}) == len(found)
    return {leg.id: leg for leg in found}


def say(gateway: Gateway, worker: str, leg: Request, count: int = 1, **fields: Any) -> Outcome:
    """`count` more tokens of a leg that has drawn none yet."""
    ids = tuple(range(count))
    delta = TokenDelta(leg.id, leg.choice, leg.attempt, len(leg.emitted), ids, **fields)
    return gateway.says(worker, delta)


# Standing still --------------------------------------------------------------------------------


def test_a_frozen_decode_worker() -> None:
    """Its leg is placed again; it hears so when it wakes, and what it says then is not believed."""
    gateway = Gateway("p0", "d0", "d1")
    life = taken_over(gateway)
    frozen = life.worker_id
    assert frozen is not None
    gateway.says(frozen, tokens(1, 8))
    outcome = gateway.freeze(frozen)
    assert told(outcome) == [Withdraw(frozen, "r", 0, 0)]
    worker, leg = submitted(outcome)
    assert (worker, leg.attempt, leg.emitted, leg.hand_off) == ("p0", 1, (7, 8), True)
    assert not leg.alone, "nothing says that the request is the cause"
    assert gateway.count("workers_silent") == 1
    assert gateway.says(frozen, tokens(2, 9)) == Outcome()
    assert gateway.count("stale_messages") == 1
    # The handoff goes to the other one, and so does the next request.
    outcome = gateway.says("p0", tokens(2, 9, attempt=1), handoff(attempt=1))
    assert submitted(outcome)[0] == ({"d0", "d1"} - {frozen}).pop()


def test_it_takes_none_until_it_goes_on() -> None:
    gateway = Gateway("u0", "u1")
    gateway.freeze("u0")
    for name in ("x", "y"):
        assert submitted(gateway.add(name)[1])[0] == "u1"
    gateway.thaw("u0")
    assert submitted(gateway.add("z")[1])[0] == "u0"
    assert gateway.count("workers_thawed") == 1


def test_the_only_worker_freezes() -> None:
    """Its requests wait for it, and are given to it again under another attempt."""
    gateway = Gateway("u0")
    life, _ = gateway.add()
    gateway.says("u0", tokens(0, 7))
    assert told(gateway.freeze("u0")) == [Withdraw("u0", "r", 0, 0)]
    assert life.phase is Phase.WAITING
    assert gateway.says("u0", tokens(1, 8)) == Outcome()
    worker, leg = submitted(gateway.thaw("u0"))
    assert (worker, leg.attempt, leg.emitted) == ("u0", 1, (7,))


def test_frozen_twice_is_frozen_once() -> None:
    gateway = Gateway("u0")
    gateway.add()
    gateway.freeze("u0")
    assert gateway.freeze("u0") == Outcome()
    assert gateway.freeze("u9") == Outcome(), "nobody of that name is there"
    assert gateway.count("workers_silent") == 1
    assert gateway.thaw("u9") == Outcome()


def test_a_frozen_worker_that_dies() -> None:
    gateway = Gateway("u0", "u1")
    life, _ = gateway.add()
    gateway.freeze("u0")
    assert gateway.lose("u0") == Outcome(), "its leg is elsewhere"
    assert gateway.thaw("u0") == Outcome(), "it is gone"
    assert life.worker_id == "u1"
    assert life.attempt == 1


def test_a_frozen_worker_that_starts_anew() -> None:
    gateway = Gateway("u0")
    gateway.add()
    gateway.freeze("u0")
    worker, leg = submitted(gateway.join("u0"))
    assert (worker, leg.attempt) == ("u0", 1)
    assert gateway.thaw("u0") == Outcome()


def test_what_a_frozen_worker_holds_is_released_when_it_is_not_wanted() -> None:
    """Its store can still be read, so the one that took over goes on, and ends the lease."""
    gateway = Gateway("p0", "d0")
    life = taken_over(gateway)
    assert gateway.freeze("p0") == Outcome()
    assert life.phase is Phase.SECOND
    assert gateway.says("d0", tokens(1, 8)).instructions == [Release("p0", "g")]


def test_a_prompt_that_is_computed_on_a_frozen_worker() -> None:
    gateway = Gateway("p0", "p1", "d0")
    gateway.add()
    gateway.says("p0", sealed("p0"))
    outcome = gateway.freeze("p0")
    assert told(outcome) == [Withdraw("p0", "r", 0, 0), Release("p0", "g")]
    assert submitted(outcome)[0] == "p1"
    assert gateway.says("p0", handoff()).instructions == [Release("p0", "g")]


def test_a_decode_worker_that_freezes_before_the_handoff() -> None:
    gateway = Gateway("p0", "d0")
    life, _ = gateway.add()
    assert gateway.freeze("d0") == Outcome()
    gateway.says("p0", tokens(0, 7), handoff())
    assert life.phase is Phase.WAITING
    assert submitted(gateway.thaw("d0"))[1].attempt == 1


def test_a_lender_that_freezes() -> None:
    gateway = Gateway("p0", "p1", "d0")
    life = lending(gateway)
    placed = legs(gateway.freeze("p0"))
    assert (placed["r"].prefix, placed["r"].attempt, life.phase) == (None, 0, Phase.FIRST)
    assert gateway.count("lenders_late") == 1
    assert gateway.says("p0", sealed("p0", "loan")).instructions == [Release("p0", "loan")]


# Suspects --------------------------------------------------------------------------------------


def test_a_suspect_is_to_run_alone() -> None:
    gateway = Gateway("u0")
    gateway.add()
    gateway.add("x")
    gateway.lose("u0", 1.0, [SUSPECT])
    placed = legs(gateway.join("u0"))
    assert placed["r"].alone
    assert not placed["x"].alone, "it was not in that step"


def test_its_second_crash_is_its_end() -> None:
    gateway = Gateway("u0")
    gateway.add()
    gateway.add("x")
    gateway.lose("u0", 1.0, [SUSPECT])
    gateway.join("u0")
    assert ended(gateway.lose("u0", 1.0, [("r", 0, 1)])) == "worker_lost"
    assert gateway.count("given_up") == 1
    assert set(legs(gateway.join("u0"))) == {"x"}


def test_what_is_said_twice_of_an_attempt_counts_once() -> None:
    """Stuck first, and then its step fails after all."""
    gateway = Gateway("u0", "u1")
    life, _ = gateway.add()
    gateway.freeze("u0", 1.0, [SUSPECT])
    gateway.lose("u0", 2.0, [SUSPECT])
    assert (life.num_crashes, life.worker_id) == (1, "u1")


def test_last_words_that_come_late_count_all_the_same() -> None:
    """It was silent first, so the request is with another worker by then."""
    gateway = Gateway("u0", "u1")
    life, _ = gateway.add()
    assert not submitted(gateway.freeze("u0"))[1].alone
    gateway.lose("u0", 2.0, [SUSPECT, ("of another gateway", 0, 0)])
    assert (life.num_crashes, life.worker_id) == (1, "u1")
    assert ended(gateway.lose("u1", 3.0, [("r", 0, 1)])) == "worker_lost"


def test_one_that_gets_on_alone_is_a_suspect_no_more() -> None:
    gateway = Gateway("u0")
    life, _ = gateway.add()
    gateway.lose("u0", 1.0, [SUSPECT])
    _, leg = submitted(gateway.join("u0"))
    say(gateway, "u0", leg, ALONE_TOKENS - 1)
    assert life.num_crashes == 1
    gateway.says("u0", tokens(ALONE_TOKENS - 1, 9, attempt=1))
    assert life.num_crashes == 0
    gateway.lose("u0", 1.0, [("r", 0, 1)])
    assert submitted(gateway.join("u0"))[1].alone, "it may be one again"


def test_the_leg_that_takes_over_is_alone_too() -> None:
    gateway = Gateway("p0", "d0")
    gateway.add()
    gateway.lose("p0", 1.0, [SUSPECT])
    _, first = submitted(gateway.join("p0"))
    assert (first.alone, first.hand_off) == (True, True)
    _, second = submitted(gateway.says("p0", tokens(0, 7, attempt=1), handoff(attempt=1)))
    assert second.alone
    gateway.says("d0", tokens(1, 7, attempt=1, finish=FinishReason.LENGTH))
    assert not len(gateway.table)


def test_suspects_go_where_there_is_the_least_work() -> None:
    """Not to the worker that has the prompt's blocks, and they borrow none."""
    gateway = Gateway("u0", "u1", "u2")
    for number in range(4):
        gateway.add(f"x{number}", prompt=PROMPT)
    life, _ = gateway.add(prompt=tuple(range(50, 80)))
    where = life.worker_id
    assert where is not None
    gateway.lose(where, 1.0, [SUSPECT])
    leg = next(one for one in gateway.table.lives.living.values() if one.key == ("r", 0))
    assert leg.worker_id not in (None, where)
    assert leg.placement is not None
    assert leg.placement.lender is None


def test_a_stuck_step_makes_suspects_and_a_silent_worker_none() -> None:
    gateway = Gateway("u0")
    gateway.add()
    gateway.add("x")
    gateway.freeze("u0", 1.0, [SUSPECT])
    assert gateway.count("workers_stuck") == 1
    placed = legs(gateway.thaw("u0"))
    assert (placed["r"].alone, placed["x"].alone) == (True, False)
    gateway.freeze("u0")
    placed = legs(gateway.thaw("u0"))
    assert (placed["r"].alone, placed["x"].alone) == (True, False)
    assert gateway.count("given_up") == 0
