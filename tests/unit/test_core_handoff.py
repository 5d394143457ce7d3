"""The gateway's half of a request's life: every transition, without a clock or a socket."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from baton.core import decision_log
from baton.core.handoff import RequestTable
from baton.core.instructions import (
    Ask,
    Instruction,
    Offer,
    Outcome,
    Release,
    Renew,
    Submit,
    Withdraw,
)
from baton.core.keys import chain, root_key
from baton.core.life import Content, HandoffPolicy, Life, Phase
from baton.core.replay import replay
from baton.core.router import Router, WorkerInfo
from baton.core.sequence import SequenceId
from baton.errors import InvalidRequest, TransferFailed, Unavailable, WireError
from baton.types import (
    FinishReason,
    Grant,
    Handoff,
    KvFormat,
    Landed,
    Request,
    Role,
    SamplingParams,
    Sealed,
    StageTimes,
    TokenDelta,
)

BLOCK_SIZE = 4
CONTENT = Content(b"weights", "exact", BLOCK_SIZE)
FORMAT = KvFormat(BLOCK_SIZE, "fake", 1, 1, 1, 96)
PROMPT = tuple(range(10, 20))  # two full blocks and a half
KEYS = chain(root_key(b"weights", "exact", b""), PROMPT, BLOCK_SIZE)
TTL_S = 9.0
ROLES = {"p": Role.PREFILL, "d": Role.DECODE, "u": Role.UNIFIED}


class Gateway:
    """A table, and what it brought. Workers are named by role: `p0`, `d0`, `u0`."""

    def __init__(self, *workers: str, router: Router | None = None, **policy: Any) -> None:
        self.router = router or Router()
        self.table = RequestTable(self.router, HandoffPolicy(TTL_S, **policy))
        for name in workers:
            self.join(name)

    def join(
        self, name: str, now: float = 0.0, content: Content = CONTENT, num_frames: int = 100
    ) -> Outcome:
        info = WorkerInfo(name, ROLES[name[0]], 1, 100, BLOCK_SIZE, num_frames, True)
        self.table.join(info, content, now)
        return self.table.take()

    def add(self, name: str = "r", now: float = 0.0, **fields: Any) -> tuple[Life, Outcome]:
        request = Request(name, fields.pop("prompt", PROMPT), SamplingParams(50), **fields)
        return self.table.add(request, now), self.table.take()

    def lose(self, name: str, now: float = 1.0, suspects: Sequence[SequenceId] = ()) -> Outcome:
        self.table.lose(name, now, suspects)
        return self.table.take()

    def freeze(
        self, name: str, now: float = 1.0, stuck_at: Sequence[SequenceId] | None = None
    ) -> Outcome:
        self.table.freeze(name, now, stuck_at)
        return self.table.take()

    def thaw(self, name: str, now: float = 2.0) -> Outcome:
        self.table.thaw(name, now)
        return self.table.take()

    def says(
        self, worker: str, *messages: TokenDelta | Handoff | Sealed, now: float = 1.0
    ) -> Outcome:
        for message in messages:
            match message:
                case TokenDelta():
                    self.table.delivered(worker, message, now)
                case Handoff():
                    self.table.handed_off(worker, message, now)
                case Sealed():
                    self.table.sealed(worker, message, now)
        return self.table.take()

    def tick(self, now: float) -> Outcome:
        self.table.tick(now)
        return self.table.take()

    def count(self, event: str) -> int:
        return self.table.counters[event]


def tokens(first: int, *ids: int, attempt: int = 0, **fields: Any) -> TokenDelta:
    return TokenDelta("r", 0, attempt, first, ids, **fields)


def grant(source: str, name: str = "g") -> Grant:
    return Grant(name, source, 1, "", TTL_S, b"")


def sealed(source: str, name: str = "g", *, attempt: int = 0, first: int = 0) -> Sealed:
    keys = tuple(KEYS[first:])
    return Sealed("r", 0, attempt, grant(source, name), first, keys, keys, (0,) * len(keys))


def handoff(source: str = "p0", name: str = "g", *, attempt: int = 0) -> Handoff:
    keys = tuple(KEYS)
    return Handoff("r", 0, attempt, grant(source, name), 10, FORMAT, "exact", keys, keys, (0, 1))


def submitted(outcome: Outcome) -> tuple[str, Request]:
    """The one leg of an outcome."""
    (found,) = [one for one in outcome.instructions if isinstance(one, Submit)]
    return found.worker_id, found.request


def told(outcome: Outcome) -> list[Instruction]:
    """What else it instructs."""
    return [one for one in outcome.instructions if not isinstance(one, Submit)]


def ended(outcome: Outcome) -> str:
    """The code of the error in which the one delta ends."""
    (delta,) = outcome.deltas
    assert (delta.finish, delta.token_ids) == (FinishReason.ERROR, ())
    assert delta.error is not None
    return delta.error.code


def taken_over(gateway: Gateway, name: str = "p0") -> Life:
    """A request with token 1 from `p0`, whose second leg was given to a decode worker."""
    life, _ = gateway.add()
    gateway.says(name, tokens(0, 7), handoff(name))
    assert life.phase is Phase.SECOND
    return life


def lending(gateway: Gateway) -> Life:
    """`p0` computes the same prompt for another request, so `p1` shall, with its blocks."""
    gateway.table.add(Request("x", PROMPT, SamplingParams(50)), 0.0)
    gateway.table.take()
    life, outcome = gateway.add()
    (ask,) = outcome.instructions
    assert isinstance(ask, Ask)
    assert (ask.worker_id, ask.lend.keys, ask.lend.attempt) == ("p0", tuple(KEYS), 0)
    return life


# Placing ---------------------------------------------------------------------------------------


def test_a_prompt_is_computed_to_be_handed_off() -> None:
    life, outcome = Gateway("p0", "d0").add(deadline_s=30.0, tenant="t")
    worker, leg = submitted(outcome)
    assert (worker, life.phase, life.worker_id) == ("p0", Phase.FIRST, "p0")
    assert (leg.hand_off, leg.attempt, leg.emitted, leg.handoff) == (True, 0, (), None)
    assert (leg.prompt, leg.deadline_s, leg.tenant) == (PROMPT, 30.0, "t")
    assert not told(outcome)
    assert not outcome.deltas


def test_one_worker_may_do_it_all() -> None:
    worker, leg = submitted(Gateway("u0").add()[1])
    assert (worker, leg.hand_off, leg.deadline_s) == ("u0", False, None)


@pytest.mark.parametrize("workers", [(), ("p0",), ("d0",)])
def test_nobody_can_take_it(workers: tuple[str, ...]) -> None:
    gateway = Gateway(*workers)
    with pytest.raises(Unavailable):
        gateway.add()
    assert not len(gateway.table)
    assert gateway.table.take() == Outcome()
    assert gateway.table.next_deadline() is None


def test_a_draining_worker_gets_nothing_more() -> None:
    gateway = Gateway("u0", "u1")
    gateway.table.drain("u0")
    assert {submitted(gateway.add(name)[1])[0] for name in "abc"} == {"u1"}


# From leg to leg -------------------------------------------------------------------------------


def test_the_first_token_is_passed_on_at_once() -> None:
    gateway = Gateway("p0", "d0")
    life, _ = gateway.add(now=1.0)
    outcome = gateway.says("p0", tokens(0, 7, num_cached=8), now=1.5)
    assert [(d.token_ids, d.num_cached) for d in outcome.deltas] == [((7,), 8)]
    assert not outcome.instructions
    assert (life.first_token_at, life.num_cached, life.tokens) == (1.5, 8, [7])


def test_the_decode_worker_takes_over() -> None:
    gateway = Gateway("p0", "d0")
    life, _ = gateway.add(deadline_s=30.0)
    gateway.says("p0", tokens(0, 7))
    outcome = gateway.says("p0", handoff(), now=2.5)
    worker, leg = submitted(outcome)
    assert (worker, leg.handoff, leg.emitted) == ("d0", handoff(), (7,))
    assert (leg.hand_off, leg.attempt, leg.deadline_s) == (False, 0, 27.5)
    assert not told(outcome), "the lease is needed until the blocks are read"
    assert life.took_over


def test_the_first_delta_of_the_second_leg_ends_the_lease() -> None:
    gateway = Gateway("p0", "d0")
    taken_over(gateway)
    outcome = gateway.says("d0", tokens(1, 8, num_cached=8))
    assert told(outcome) == [Release("p0", "g")]
    assert outcome.deltas[0].num_cached is None, "the client was told of the first leg's hit"
    assert not gateway.says("d0", tokens(2, 9)).instructions


def test_a_request_ends_once() -> None:
    gateway = Gateway("p0", "d0")
    life = taken_over(gateway)
    outcome = gateway.says("d0", tokens(1, 8, finish=FinishReason.LENGTH), now=3.0)
    assert outcome.deltas == [tokens(1, 8, finish=FinishReason.LENGTH)]
    assert (life.phase, life.finish, life.ended_at) == (Phase.ENDED, FinishReason.LENGTH, 3.0)
    assert not len(gateway.table)
    assert gateway.says("d0", tokens(2, 9)) == Outcome()
    assert gateway.count("stale_messages") == 1
    assert not gateway.router._placed


def test_a_first_token_that_ends_it_needs_no_handoff() -> None:
    gateway = Gateway("p0", "d0")
    gateway.add()
    gateway.says("p0", sealed("p0"))
    outcome = gateway.says("p0", tokens(0, 7, finish=FinishReason.STOP))
    assert told(outcome) == [Release("p0", "g")]
    assert not len(gateway.table)


def test_an_error_of_a_worker_is_its_clients() -> None:
    gateway = Gateway("p0", "d0")
    life, _ = gateway.add()
    error = TransferFailed("a block", stage="export").to_wire()
    outcome = gateway.says("p0", tokens(0, finish=FinishReason.ERROR, error=error))
    assert ended(outcome) == "transfer_failed"
    assert (life.error, outcome.instructions) == (error, [])
    assert not len(gateway.table)


def test_times_are_those_of_the_present_leg() -> None:
    gateway = Gateway("p0", "d0")
    life = taken_over(gateway)
    assert gateway.table.timed("d0", StageTimes("r", 0, 0)) is life
    gateway.table.timed("p0", StageTimes("r", 0, 1, prefill_s=2.0, num_prompt_computed=4))
    assert gateway.router._workers["p0"].prefill_token_s == 0.5, "whatever it was for"
    assert gateway.table.timed("p0", StageTimes("r", 0, 0)) is None
    assert gateway.table.timed("d0", StageTimes("r", 0, 1)) is None
    assert gateway.count("stale_messages") == 3


def test_a_prompt_is_work_until_its_first_token_in_every_attempt() -> None:
    gateway = Gateway("p0", "d0")
    for attempt in (0, 1):
        if attempt:
            gateway.lose("p0")
            gateway.join("p0")
        else:
            gateway.add()
        ahead, _ = gateway.add(f"behind {attempt}", prompt=(attempt,) * 8)
        gateway.table.abandon(*ahead.key, 1.0)
        gateway.says("p0", tokens(attempt, 7, attempt=attempt))
        alone, _ = gateway.add(f"alone {attempt}", prompt=(5 + attempt,) * 8)
        gateway.table.abandon(*alone.key, 1.0)
        assert ahead.placement is not None
        assert alone.placement is not None
        assert ahead.placement.predicted_tokens == 8 + len(PROMPT) + attempt
        assert alone.placement.predicted_tokens == 8


# Leases ----------------------------------------------------------------------------------------


def test_sealed_blocks_are_offered() -> None:
    gateway = Gateway("p0", "d0")
    gateway.add()
    assert gateway.says("p0", sealed("p0")).instructions == [Offer("d0", sealed("p0"))]
    assert gateway.says("p0", tokens(0, 7), handoff()).instructions[:-1] == []


def test_blocks_are_not_offered_if_so_told() -> None:
    gateway = Gateway("p0", "d0", fetch_early=False)
    gateway.add()
    assert not gateway.says("p0", sealed("p0")).instructions
    gateway.table.abandon("r", 0, 1.0)
    assert Release("p0", "g") in gateway.table.take().instructions


def test_a_new_grant_takes_the_place_of_the_old_one() -> None:
    gateway = Gateway("p0", "d0")
    gateway.add()
    gateway.says("p0", sealed("p0", "old"))
    assert told(gateway.says("p0", tokens(0, 7), handoff(name="new"))) == [Release("p0", "old")]
    assert told(gateway.says("d0", tokens(1, 8))) == [Release("p0", "new")]


def test_leases_are_renewed_together_while_they_are_held() -> None:
    gateway = Gateway("p0", "d0")
    for name in "ab":
        gateway.add(name)
        message = sealed("p0", f"grant of {name}")
        gateway.table.sealed("p0", Sealed(name, 0, 0, *_rest(message)), 2.0)
    gateway.table.take()
    assert gateway.table.next_deadline() == 2.0 + TTL_S / 3
    assert gateway.tick(4.9) == Outcome()
    renewal = Renew("p0", ("grant of a", "grant of b"))
    assert gateway.tick(5.0).instructions == [renewal]
    assert gateway.tick(5.1) == Outcome()
    gateway.table.abandon("a", 0, 6.0)
    gateway.table.take()
    assert gateway.tick(8.5).instructions == [Renew("p0", ("grant of b",))]
    gateway.table.abandon("b", 0, 9.0)
    gateway.table.take()
    assert gateway.tick(12.0) == Outcome()
    assert gateway.table.next_deadline() is None


def _rest(message: Sealed) -> tuple[Any, ...]:
    return (message.grant, message.first, message.keys, message.digests, message.frames)


def test_a_lost_worker_is_asked_for_nothing() -> None:
    gateway = Gateway("p0", "d0", "d1")
    life = taken_over(gateway)
    assert gateway.lose("p0") == Outcome(), "the second leg goes on"
    gateway.join("p0")
    assert gateway.tick(100.0) == Outcome(), "the new start knows no such lease"
    assert gateway.says("d0", tokens(1, 8)).instructions == []
    assert life.attempt == 0


def test_blocks_that_came_early_are_counted_with_the_first_token() -> None:
    gateway = Gateway("p0", "d0")
    life, _ = gateway.add()
    for attempt, num_blocks in ((0, 2), (1, 5)):
        gateway.table.landed(Landed("r", 0, attempt, num_blocks))
    gateway.says("p0", tokens(0, 7))
    gateway.table.landed(Landed("r", 0, 0, 1))
    assert life.num_early_blocks == 2


def test_what_came_early_for_a_lost_attempt_does_not_count() -> None:
    gateway = Gateway("p0", "d0")
    life, _ = gateway.add()
    gateway.table.landed(Landed("r", 0, 0, 2))
    gateway.lose("p0")
    gateway.join("p0")
    gateway.table.landed(Landed("r", 0, 1, 1))
    gateway.says("p0", tokens(0, 7, attempt=1))
    assert life.num_early_blocks == 1


# Borrowing -------------------------------------------------------------------------------------


def test_a_lender_is_asked_first() -> None:
    gateway = Gateway("p0", "p1", "d0")
    life = lending(gateway)
    assert (life.phase, life.worker_id) == (Phase.BORROWING, "p1")
    answer = sealed("p0", "loan")
    outcome = gateway.says("p0", answer)
    worker, leg = submitted(outcome)
    assert (worker, leg.prefix, leg.hand_off) == ("p1", answer, True)
    assert told(gateway.says("p1", tokens(0, 7))) == [Release("p0", "loan")]
    assert gateway.count("lenders_late") == 0


def test_a_lender_that_is_late() -> None:
    gateway = Gateway("p0", "p1", "d0", borrow_wait_s=0.5)
    lending(gateway)
    assert gateway.table.next_deadline() == 0.5
    assert gateway.tick(0.4) == Outcome()
    worker, leg = submitted(gateway.tick(0.5))
    assert (worker, leg.prefix) == ("p1", None)
    assert gateway.count("lenders_late") == 1
    assert gateway.says("p0", sealed("p0", "loan")).instructions == [Release("p0", "loan")]
    assert gateway.tick(9.0) == Outcome()


def test_a_lender_that_is_lost() -> None:
    gateway = Gateway("p0", "p1", "d0")
    life = lending(gateway)
    legs = [one for one in gateway.lose("p0").instructions if isinstance(one, Submit)]
    (leg,) = [one.request for one in legs if one.request.id == "r"]
    assert (leg.prefix, leg.attempt, life.phase) == (None, 0, Phase.FIRST)
    assert gateway.tick(5.0) == Outcome()


def test_a_borrower_that_is_lost() -> None:
    gateway = Gateway("p0", "p1", "p2", "d0")
    life = lending(gateway)
    borrower = life.worker_id
    assert borrower is not None
    outcome = gateway.lose(borrower)
    assert life.attempt == 1
    assert not any(isinstance(one, Withdraw) for one in outcome.instructions)
    late = gateway.says("p0", sealed("p0", "loan"))
    assert late.instructions == [Release("p0", "loan")]


# Abandoning ------------------------------------------------------------------------------------


def test_abandoned_in_the_first_leg() -> None:
    gateway = Gateway("p0", "d0")
    life, _ = gateway.add()
    gateway.says("p0", sealed("p0"))
    gateway.table.abandon("r", 0, 2.0)
    outcome = gateway.table.take()
    assert outcome.instructions == [Withdraw("p0", "r", 0, 0), Release("p0", "g")]
    assert not outcome.deltas
    assert (life.finish, life.ended_at) == (FinishReason.ABORT, 2.0)
    gateway.table.abandon("r", 0, 3.0)
    assert gateway.table.take() == Outcome()
    late = gateway.says("p0", sealed("p0"), tokens(0, 7), handoff())
    assert late.instructions == [Release("p0", "g")] * 2
    assert not late.deltas
    assert gateway.count("stale_messages") == 3


def test_abandoned_in_the_second_leg() -> None:
    gateway = Gateway("p0", "d0")
    taken_over(gateway)
    gateway.table.abandon("r", 0, 2.0)
    outcome = gateway.table.take()
    assert outcome.instructions == [Withdraw("d0", "r", 0, 0), Release("p0", "g")]


def test_abandoned_while_borrowing() -> None:
    gateway = Gateway("p0", "p1", "d0")
    lending(gateway)
    gateway.table.abandon("r", 0, 0.1)
    assert gateway.table.take().instructions == []
    assert gateway.tick(5.0) == Outcome()


def test_abandoned_while_waiting() -> None:
    gateway = Gateway("p0", "d0")
    gateway.add()
    gateway.lose("p0")
    gateway.table.abandon("r", 0, 2.0)
    assert gateway.join("p0") == Outcome()
    assert gateway.tick(1000.0) == Outcome()


def test_an_instruction_that_cannot_be_carried_out() -> None:
    gateway = Gateway("p0", "d0")
    gateway.add()
    gateway.table.refuse("r", 0, InvalidRequest("too long", param="prompt"), 1.0)
    assert ended(gateway.table.take()) == "invalid_request"
    assert not len(gateway.table)


# What must not be believed ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("worker", "delta"),
    [("d0", tokens(0, 7)), ("p1", tokens(0, 7)), ("p0", tokens(0, 7, attempt=1))],
)
def test_only_the_present_legs_worker_is_believed(worker: str, delta: TokenDelta) -> None:
    gateway = Gateway("p0", "p1", "d0")
    gateway.add()
    assert gateway.says(worker, delta) == Outcome()
    assert gateway.count("stale_messages") == 1


def test_a_worker_that_speaks_before_it_was_asked() -> None:
    gateway = Gateway("p0", "p1", "d0")
    life = lending(gateway)
    assert life.worker_id == "p1"
    outcome = gateway.says("p1", tokens(0, 7), handoff("p1"))
    assert outcome == Outcome([Release("p1", "g")])
    assert (life.phase, gateway.count("stale_messages")) == (Phase.BORROWING, 2)


@pytest.mark.parametrize("first", [0, 2])
def test_a_repeat_or_a_gap_ends_it(first: int) -> None:
    gateway = Gateway("p0", "d0")
    taken_over(gateway)
    outcome = gateway.says("d0", tokens(first, 9))
    assert ended(outcome) == "internal_error"
    assert told(outcome) == [Withdraw("d0", "r", 0, 0), Release("p0", "g")]


@pytest.mark.parametrize(("layout", "worker"), [(("p0", "d0"), "d0"), (("u0",), "u0")])
def test_a_handoff_that_nobody_asked_for(layout: tuple[str, ...], worker: str) -> None:
    gateway = Gateway(*layout)
    life = taken_over(gateway) if worker == "d0" else gateway.add()[0]
    phase = life.phase
    outcome = gateway.says(worker, handoff(worker, "other"))
    assert outcome.instructions == [Release(worker, "other")]
    assert (life.phase, life.worker_id) == (phase, worker)


def test_sealed_blocks_that_nobody_asked_for() -> None:
    gateway = Gateway("p0", "p1", "d0")
    gateway.add()
    for worker in ("p1", "d0"):
        assert gateway.says(worker, sealed(worker)).instructions == [Release(worker, "g")]


def test_an_end_without_a_token() -> None:
    gateway = Gateway("u0")
    gateway.add(prompt=())
    assert gateway.says("u0", tokens(0, finish=FinishReason.STOP)).deltas
    assert not len(gateway.table)


# Loss ------------------------------------------------------------------------------------------


def test_prefill_lost_before_the_first_token() -> None:
    gateway = Gateway("p0", "p1", "d0")
    life, _ = gateway.add(deadline_s=30.0)
    outcome = gateway.lose("p0", 4.0)
    worker, leg = submitted(outcome)
    assert (worker, leg.attempt, leg.emitted) == ("p1", 1, ())
    assert (leg.hand_off, leg.deadline_s) == (True, 26.0)
    assert not told(outcome)
    assert not outcome.deltas
    assert life.attempt == gateway.count("placed_again") == 1
    outcome = gateway.says("p1", tokens(0, 7, attempt=1, num_cached=4))
    assert life.num_cached == outcome.deltas[0].num_cached == 4, "of no hit was told before"


def test_prefill_lost_before_the_handoff() -> None:
    gateway = Gateway("p0", "p1", "d0")
    gateway.add()
    gateway.says("p0", tokens(0, 7), sealed("p0"))
    worker, leg = submitted(gateway.lose("p0"))
    assert (worker, leg.attempt, leg.emitted, leg.hand_off) == ("p1", 1, (7,), True)
    outcome = gateway.says("p1", tokens(1, 8, attempt=1, num_cached=0))
    assert [(d.first_index, d.token_ids, d.num_cached) for d in outcome.deltas] == [(1, (8,), None)]
    worker, leg = submitted(gateway.says("p1", handoff("p1", attempt=1)))
    assert (worker, leg.attempt, leg.emitted) == ("d0", 1, (7, 8))


def test_decode_lost() -> None:
    gateway = Gateway("p0", "d0", "d1")
    life = taken_over(gateway)
    assert life.worker_id == "d0"
    outcome = gateway.lose("d0")
    worker, leg = submitted(outcome)
    assert (worker, leg.attempt, leg.emitted, leg.handoff) == ("p0", 1, (7,), None)
    assert told(outcome) == [Release("p0", "g")]
    gateway.says("p0", tokens(1, 8, attempt=1), now=9.0)
    assert life.first_token_at == 1.0
    worker, leg = submitted(gateway.says("p0", handoff(attempt=1)))
    assert (worker, leg.emitted) == ("d1", (7, 8))
    outcome = gateway.says("d1", tokens(2, 9, attempt=1, finish=FinishReason.LENGTH))
    assert life.tokens == [7, 8, 9]
    assert outcome.deltas[-1].finish is FinishReason.LENGTH


def test_decode_lost_while_the_prompt_is_computed() -> None:
    gateway = Gateway("p0", "d0", "d1")
    life, _ = gateway.add()
    assert life.placement is not None
    assert life.placement.decode == "d0"
    assert gateway.lose("d0") == Outcome()
    assert gateway.says("p0", sealed("p0")).instructions == [], "nobody to offer to"
    outcome = gateway.says("p0", tokens(0, 7), handoff())
    worker, leg = submitted(outcome)
    assert (worker, leg.attempt, leg.emitted, leg.hand_off) == ("p0", 1, (7,), True)
    assert Release("p0", "g") in told(outcome)
    assert life.placement.decode == "d1"


@pytest.mark.parametrize(("num_tokens", "splits"), [(2, True), (3, False)])
def test_an_answer_that_has_outgrown_the_store(num_tokens: int, splits: bool) -> None:
    """Of three frames: the decode worker computes it all, for it cannot be handed off."""
    gateway = Gateway("d0", "d1")
    gateway.join("p0", num_frames=3)
    life = taken_over(gateway)
    gateway.says("d0", *(tokens(index, 8) for index in range(1, num_tokens)))
    worker, leg = submitted(gateway.lose("d0"))
    assert (worker, leg.hand_off) == (("p0", True) if splits else ("d1", False))
    assert len(leg.emitted) == num_tokens
    last = tokens(num_tokens, 9, attempt=1, finish=FinishReason.LENGTH)
    assert gateway.says(worker, last).deltas == [last]
    assert len(life.tokens) == num_tokens + 1
    assert not len(gateway.table)


def test_a_lost_unified_worker() -> None:
    gateway = Gateway("u0", "u1")
    gateway.add()
    gateway.says("u0", tokens(0, 7), tokens(1, 8))
    worker, leg = submitted(gateway.lose("u0"))
    assert (worker, leg.emitted, leg.hand_off) == ("u1", (7, 8), False)


def test_a_zombie_adds_nothing() -> None:
    gateway = Gateway("u0", "u1")
    life, _ = gateway.add()
    gateway.says("u0", tokens(0, 7))
    outcome = gateway.freeze("u0")
    assert told(outcome) == [Withdraw("u0", "r", 0, 0)]
    worker, leg = submitted(outcome)
    assert (leg.attempt, leg.emitted) == (1, (7,))
    assert gateway.says("u0", tokens(1, 8)) == Outcome()
    assert gateway.says("u1", tokens(1, 8)) == Outcome()
    assert gateway.says(worker, tokens(1, 8, attempt=1)).deltas
    assert life.tokens == [7, 8]


def test_a_handoff_of_an_attempt_that_was_given_up() -> None:
    gateway = Gateway("p0", "d0")
    gateway.add()
    gateway.says("p0", tokens(0, 7))
    gateway.freeze("p0")
    assert gateway.says("p0", handoff()).instructions == [Release("p0", "g")]


def test_it_waits_for_a_worker_to_join() -> None:
    gateway = Gateway("p0", "d0")
    life = taken_over(gateway)
    outcome = gateway.lose("d0", 1.0)
    assert outcome.instructions == [Release("p0", "g")]
    assert (life.phase, life.worker_id, outcome.deltas) == (Phase.WAITING, None, [])
    assert not gateway.router._placed, "nobody has work with it"
    assert gateway.join("p1", 2.0) == Outcome(), "still nobody who decodes"
    worker, leg = submitted(gateway.join("d1", 3.0))
    assert (leg.attempt, leg.emitted) == (1, (7,))
    assert life.worker_id == worker
    assert gateway.join("d2", 4.0) == Outcome(), "it waits no longer"
    assert gateway.tick(61.0).deltas == []


@pytest.mark.parametrize(
    ("deadline_s", "at", "code"), [(None, 21.0, "worker_lost"), (8.0, 8.0, "deadline_exceeded")]
)
def test_it_does_not_wait_for_ever(deadline_s: float | None, at: float, code: str) -> None:
    gateway = Gateway("p0", "d0", max_wait_s=20.0)
    life, _ = gateway.add(deadline_s=deadline_s)
    gateway.lose("p0", 1.0)
    assert gateway.table.next_deadline() == at
    assert gateway.tick(at - 0.1) == Outcome()
    assert ended(gateway.tick(at)) == code
    assert life.ended_at == at
    assert gateway.count("given_up") == 1
    assert gateway.join("p0", 30.0) == Outcome()


def test_it_waits_anew_when_it_is_lost_anew() -> None:
    gateway = Gateway("u0", max_wait_s=20.0)
    gateway.add()
    gateway.lose("u0", 1.0)
    gateway.join("u0", 5.0)
    gateway.lose("u0", 6.0)
    assert gateway.tick(21.0) == Outcome()
    assert ended(gateway.tick(26.0)) == "worker_lost"


def test_the_retry_budget() -> None:
    gateway = Gateway("p0", "d0", max_retries=2)
    life, _ = gateway.add()
    for attempt in (1, 2):
        assert not gateway.lose("p0").deltas
        assert submitted(gateway.join("p0"))[1].attempt == attempt
    outcome = gateway.lose("p0")
    assert ended(outcome) == "worker_lost"
    assert life.error is not None
    assert life.error.stage == "prefill"
    assert not outcome.instructions
    assert gateway.count("given_up") == 1


def test_a_request_that_may_have_crashed_two_workers() -> None:
    gateway = Gateway("u0")
    gateway.add()
    assert not gateway.lose("u0", 1.0, [("r", 0, 0)]).deltas
    gateway.join("u0")
    assert not gateway.lose("u0").deltas, "not its fault"
    gateway.join("u0")
    assert ended(gateway.lose("u0", 3.0, [("r", 0, 2)])) == "worker_lost"


def test_a_worker_that_drains_refuses() -> None:
    gateway = Gateway("p0", "p1", "d0")
    gateway.add()
    gateway.table.drain("p0")
    error = Unavailable("this worker is draining", stage="queue").to_wire()
    outcome = gateway.says("p0", tokens(0, finish=FinishReason.ERROR, error=error))
    worker, leg = submitted(outcome)
    assert (worker, leg.attempt, outcome.deltas) == ("p1", 1, [])


def test_a_new_start_that_was_not_preceded_by_a_loss() -> None:
    gateway = Gateway("u0")
    life, _ = gateway.add()
    worker, leg = submitted(gateway.join("u0"))
    assert (worker, leg.attempt) == ("u0", 1)
    assert life.attempt == 1


def test_another_model_does_not_go_on_where_this_one_was() -> None:
    gateway = Gateway("u0")
    gateway.add()
    gateway.lose("u0")
    outcome = gateway.join("u0", content=Content(b"other", "exact", BLOCK_SIZE))
    assert ended(outcome) == "worker_lost"


# What is remembered ----------------------------------------------------------------------------


def _all_keys(*generated: int) -> list[bytes]:
    return chain(root_key(b"weights", "exact", b""), (*PROMPT, *generated), BLOCK_SIZE)


def test_what_a_lone_worker_keeps() -> None:
    gateway = Gateway("u0")
    gateway.add("x")
    gateway.table.delivered("u0", TokenDelta("x", 0, 0, 0, (1, 2), finish=FinishReason.LENGTH), 1.0)
    assert gateway.router.stored("u0") == KEYS, "the last of 12 tokens has no KV"
    gateway.add()
    gateway.says("u0", tokens(0, 1, 2, 3, finish=FinishReason.LENGTH))
    assert gateway.router.stored("u0") == _all_keys(1, 2)
    assert len(_all_keys(1, 2)) == 3


def test_what_the_one_that_took_over_keeps() -> None:
    gateway = Gateway("p0", "d0")
    taken_over(gateway)
    gateway.says("d0", tokens(1, *range(6), finish=FinishReason.LENGTH))
    assert gateway.router.stored("d0") == _all_keys(7, *range(5))[len(KEYS) :]


def test_nothing_is_kept_after_an_error() -> None:
    gateway = Gateway("u0")
    gateway.add()
    gateway.says("u0", tokens(0, *range(6)))
    gateway.says("u0", tokens(6, finish=FinishReason.ERROR, error=WireError("internal_error", "")))
    assert gateway.router.stored("u0") == []


@pytest.mark.parametrize("step", [1, 3, 4, 9])
def test_keys_are_worked_out_piecewise(step: int) -> None:
    life = Life(Request("r", PROMPT, SamplingParams(50)), 0.0)
    life.tokens = list(range(23))
    for num_tokens in range(0, len(PROMPT) + 23, step):
        wanted = _all_keys(*life.tokens)[: num_tokens // BLOCK_SIZE]
        assert life.extend_keys(CONTENT, num_tokens) == wanted


# The log ---------------------------------------------------------------------------------------


def test_the_routers_log_of_a_life_with_losses_replays() -> None:
    parts: list[bytes] = []
    gateway = Gateway("p0", "p1", "d0", router=decision_log.LoggedRouter("g", parts.append))
    taken_over(gateway)
    gateway.lose("d0")
    gateway.join("d0")
    gateway.lose("p0")
    gateway.table.abandon("r", 0, 9.0)
    report = replay(b"".join(parts))
    assert report.num_decisions == 4, "placed, lost for want of a decode worker, placed, placed"
    assert report.num_differences == 0
