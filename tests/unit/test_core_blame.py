"""Workers that end without a word: who may have been the cause, and who is ended for it."""

from __future__ import annotations

import pytest
from unit.test_core_frozen import legs, say
from unit.test_core_handoff import Gateway, ended, handoff, lending, submitted, taken_over, tokens

from baton.core.alone import ALONE_TOKENS
from baton.core.instructions import Outcome, Proceed
from baton.core.life import Phase
from baton.types import Request


def dies(gateway: Gateway, worker: str, now: float = 1.0) -> Outcome:
    """No last words: the stream ends, and that is all."""
    gateway.table.lose(worker, now, None)
    return gateway.table.take()


def asks(gateway: Gateway, worker: str, leg: Request, *, begins: bool = True) -> Outcome:
    gateway.table.alone(worker, (leg.id, leg.choice, leg.attempt), begins)
    return gateway.table.take()


def leave(worker: str, leg: Request) -> Outcome:
    return Outcome([Proceed(worker, leg.id, leg.choice, leg.attempt)])


def test_whoever_was_there_is_a_suspect_and_nobody_else() -> None:
    gateway = Gateway("u0", "u1")
    for name in ("r", "x", "y", "z"):
        gateway.add(name)
    there = {key[0] for key, life in gateway.table.lives.living.items() if life.worker_id == "u0"}
    assert there and len(there) < 4
    placed = legs(dies(gateway, "u0"))
    assert placed.keys() == there
    assert all(leg.alone for leg in placed.values())
    assert {k[0] for k, life in gateway.table.lives.living.items() if life.num_crashes} == there


def test_a_second_silent_end_convicts_only_the_one_that_was_alone() -> None:
    gateway = Gateway("u0")
    for name in ("r", "x", "y"):
        gateway.add(name)
    dies(gateway, "u0")
    placed = legs(gateway.join("u0"))
    assert asks(gateway, "u0", placed["x"]) == leave("u0", placed["x"])
    outcome = dies(gateway, "u0")
    assert ended(outcome) == "worker_lost"
    assert outcome.deltas[0].request_id == "x"
    assert set(legs(gateway.join("u0"))) == {"r", "y"}, "they stood still beside it"


def test_what_stood_still_beside_it_is_no_suspect() -> None:
    gateway = Gateway("u0")
    gateway.add("r")
    dies(gateway, "u0")
    _, leg = submitted(gateway.join("u0"))
    gateway.add("x")
    asks(gateway, "u0", leg)
    assert ended(dies(gateway, "u0")) == "worker_lost"
    assert not legs(gateway.join("u0"))["x"].alone


def test_without_anybody_alone_nobody_is_convicted() -> None:
    """Killed again and again before anything had begun: that says nothing of the requests."""
    gateway = Gateway("u0")
    life, _ = gateway.add()
    for attempt in range(3):
        assert not dies(gateway, "u0").deltas
        assert submitted(gateway.join("u0"))[1].attempt == attempt + 1
        assert life.num_crashes == 1
    assert ended(dies(gateway, "u0")) == "worker_lost", "placed again three times at most"


def test_a_request_that_was_the_only_one() -> None:
    gateway = Gateway("u0", "u1")
    life, _ = gateway.add()
    assert life.worker_id is not None
    worker, leg = submitted(dies(gateway, life.worker_id))
    asks(gateway, worker, leg)
    assert ended(dies(gateway, worker)) == "worker_lost"


def test_named_once_and_silent_once() -> None:
    gateway = Gateway("u0", "u1")
    life, _ = gateway.add()
    assert life.worker_id is not None
    worker, leg = submitted(gateway.lose(life.worker_id, 1.0, [("r", 0, 0)]))
    asks(gateway, worker, leg)
    assert ended(dies(gateway, worker)) == "worker_lost"


def test_last_words_that_name_nobody_make_no_suspects() -> None:
    gateway = Gateway("u0")
    gateway.add()
    gateway.lose("u0", 1.0, ())
    assert not submitted(gateway.join("u0"))[1].alone


def test_a_new_start_that_is_announced_first_is_a_silent_end() -> None:
    gateway = Gateway("u0")
    gateway.add()
    assert submitted(gateway.join("u0"))[1].alone


def test_one_that_has_got_on_is_not_alone_any_more() -> None:
    gateway = Gateway("u0")
    life, _ = gateway.add()
    dies(gateway, "u0")
    _, leg = submitted(gateway.join("u0"))
    asks(gateway, "u0", leg)
    say(gateway, "u0", leg, ALONE_TOKENS - 1)
    assert life.is_alone
    gateway.says("u0", tokens(ALONE_TOKENS - 1, 9, attempt=1))
    assert (life.is_alone, life.num_crashes) == (False, 0)
    dies(gateway, "u0")
    assert life.num_crashes == 1


def test_one_that_gave_its_blocks_back_is_not_alone_any_more() -> None:
    gateway = Gateway("u0")
    life, _ = gateway.add()
    dies(gateway, "u0")
    _, leg = submitted(gateway.join("u0"))
    asks(gateway, "u0", leg)
    assert asks(gateway, "u0", leg, begins=False) == Outcome()
    assert not dies(gateway, "u0").deltas
    assert life.num_crashes == 1


def test_a_prompt_to_be_handed_off_is_alone_until_its_token() -> None:
    gateway = Gateway("p0", "d0")
    life, _ = gateway.add()
    dies(gateway, "p0")
    _, leg = submitted(gateway.join("p0"))
    asks(gateway, "p0", leg)
    assert life.is_alone
    gateway.says("p0", tokens(0, 7, attempt=1))
    assert not life.is_alone, "only copies keep it there"
    assert life.num_crashes == 1
    _, second = submitted(gateway.says("p0", handoff(attempt=1)))
    assert second.alone
    assert asks(gateway, "d0", second) == leave("d0", second)
    assert ended(dies(gateway, "d0")) == "worker_lost"


def test_the_worker_that_has_handed_off_takes_no_one_along() -> None:
    gateway = Gateway("p0", "d0")
    life = taken_over(gateway)
    assert dies(gateway, "p0").deltas == []
    assert (life.phase, life.num_crashes) == (Phase.SECOND, 0)


def test_a_lender_that_ends_is_nobodys_fault() -> None:
    gateway = Gateway("p0", "p1", "d0")
    life = lending(gateway)
    dies(gateway, "p0")
    assert (life.phase, life.num_crashes) == (Phase.FIRST, 0)


@pytest.mark.parametrize("worker", ["u0", "u9"])
def test_leave_is_for_the_present_attempt_alone(worker: str) -> None:
    gateway = Gateway("u0")
    life, _ = gateway.add()
    gateway.table.alone(worker, ("r", 0, 1), True)
    gateway.table.alone("u9", ("r", 0, 0), True)
    assert gateway.table.take() == Outcome()
    assert not life.is_alone
    assert gateway.count("stale_messages") == 2
