"""Suspects run alone: steps of their own, one suspect at a time, and soon like any other.

`SimWorker` verifies at each step that no suspect has company in what is in flight, and the tokens
of everyone are those of a run without suspects.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from sim_engine import Client, SimWorker, make_config, make_request

from baton.core import alone
from baton.core.alone import ALONE_TOKENS, Suspects
from baton.core.in_flight import InFlight
from baton.core.next_step import NextStep
from baton.core.sequence import Status
from baton.types import Request

DEPTHS = pytest.mark.parametrize("depth", [1, 2])


@dataclass
class Steps:
    """A worker, its clients, and who was in each step."""

    worker: SimWorker
    clients: dict[str, Client] = field(default_factory=dict)
    batches: list[set[str]] = field(default_factory=list)
    now: float = 0.0

    def add(self, name: str, prompt: tuple[int, ...], max_tokens: int, **fields: bool) -> Request:
        request = make_request(name, prompt, max_tokens, **fields)
        self.clients[name] = Client(request)
        self.worker.scheduler.add(request, self.now)
        return request

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.now += 0.01
            update = self.worker.step(self.now)
            for delta in update.deltas:
                self.clients[delta.request_id].take(delta)

    def run(self, max_steps: int = 200) -> None:
        """Until everyone has ended, without a turn in which nothing is computed."""
        for _ in range(max_steps):
            if all(client.ended for client in self.clients.values()):
                self.worker.check_empty()
                return
            before = self.worker.runner.num_computed
            self.step()
            stepped = self.worker.runner.pending or self.worker.runner.num_computed > before
            assert stepped, "the engine would sleep now"
        raise AssertionError("not ended")


def make(depth: int, **fields: int) -> Steps:
    made = Steps(SimWorker(make_config(**fields), depth=depth))
    submit = made.worker.runner.submit

    def noted(plan: object) -> None:
        made.batches.append({chunk.seq.request.id for chunk in plan.chunks})  # type: ignore[attr-defined]
        submit(plan)  # type: ignore[arg-type]

    made.worker.runner.submit = noted  # type: ignore[method-assign]
    return made


@DEPTHS
def test_a_suspect_has_its_first_steps_to_itself(depth: int) -> None:
    steps = make(depth, num_blocks=40)
    steps.add("a", (1, 2, 3), 20)
    steps.step(4)
    steps.add("s", (4, 5, 6), 12, alone=True)
    begun = len(steps.batches)
    steps.run()
    with_s = [batch for batch in steps.batches[begun:] if "s" in batch]
    assert with_s[:ALONE_TOKENS] == [{"s"}] * ALONE_TOKENS
    assert {"a", "s"} in with_s, "then it is like any other"
    assert len(with_s) - with_s.count({"a", "s"}) <= ALONE_TOKENS + depth - 1


@DEPTHS
def test_a_long_prompt_is_alone_in_all_its_chunks(depth: int) -> None:
    steps = make(depth, num_blocks=40, max_num_batched_tokens=3)
    steps.add("a", (1, 2, 3), 20)
    steps.step(4)
    steps.add("s", tuple(range(10)), 6, alone=True)
    steps.run()
    before = steps.batches[: max(i for i, batch in enumerate(steps.batches) if batch == {"s"})]
    assert not any(batch > {"s"} for batch in before)
    assert before.count({"s"}) >= 4 + ALONE_TOKENS - 2


@DEPTHS
def test_one_suspect_at_a_time(depth: int) -> None:
    steps = make(depth, num_blocks=60)
    for name in ("s", "t", "u"):
        steps.add(name, (ord(name), 2, 3), 8, alone=True)
    steps.add("a", (9, 9), 8)
    steps.run()
    for name in ("s", "t", "u"):
        with_it = [batch for batch in steps.batches if name in batch]
        assert with_it[:ALONE_TOKENS] == [{name}] * ALONE_TOKENS


@DEPTHS
def test_a_suspect_on_an_idle_worker_begins_at_once(depth: int) -> None:
    """A plan without chunks would let the engine sleep."""
    steps = make(depth)
    steps.add("s", (1, 2, 3), 3, alone=True)
    steps.step()
    assert steps.batches == [{"s"}]
    steps.run()


@DEPTHS
def test_a_suspect_that_has_no_room_waits_and_the_others_go_on(depth: int) -> None:
    steps = make(depth, num_blocks=6, max_model_len=12)
    steps.add("a", (1, 2, 3, 4), 6)
    steps.step(2)
    steps.add("s", (5, 6, 7, 8, 9), 7, alone=True)
    steps.run()


@DEPTHS
@pytest.mark.parametrize("num_blocks", [5, 6, 7, 8])
def test_a_suspect_that_is_preempted(depth: int, num_blocks: int) -> None:
    """It gives its blocks back like any other; whoever is there goes on meanwhile."""
    steps = make(depth, num_blocks=num_blocks, max_model_len=10, prefix_cache=False)
    steps.add("a", (1, 2, 3, 4), 6)
    steps.step(3)
    steps.add("s", (5, 6), 8, alone=True)
    steps.add("t", (7, 8, 9), 7, alone=True)
    steps.run()


def test_what_it_has_emitted_does_not_count_as_getting_on() -> None:
    steps = make(1, num_blocks=40)
    steps.add("a", (1, 2, 3), 30)
    steps.step(3)
    request = make_request("s", (4, 5, 6), 20, alone=True)
    client = Client(request)
    emitted = tuple(client.expected[:9])
    client.received, client.request = list(emitted), request
    steps.clients["s"] = client
    steps.worker.scheduler.add(make_request("s", (4, 5, 6), 20, alone=True, emitted=emitted), 0.0)
    begun = len(steps.batches)
    steps.run()
    with_s = [batch for batch in steps.batches[begun:] if "s" in batch]
    assert with_s[: ALONE_TOKENS + 1].count({"s"}) == ALONE_TOKENS


def test_a_suspect_to_hand_off_is_alone_until_its_token() -> None:
    steps = make(1, num_blocks=40, num_frames=40)
    steps.add("a", (1, 2, 3), 8)
    steps.step(2)
    steps.add("s", (4, 5, 6), 8, alone=True, hand_off=True)
    steps.step(2)
    assert {"s"} in steps.batches
    suspects = steps.worker.scheduler.books.suspects
    assert [seq.status for seq in suspects.values()] == [Status.EXPORTING]
    steps.step()
    assert steps.batches[-1] == {"a"}, "the others go on while it is copied"


def test_an_aborted_suspect_is_forgotten() -> None:
    steps = make(1)
    steps.add("s", (1, 2, 3), 8, alone=True)
    steps.step()
    steps.worker.scheduler.abort(("s", 0, 0))
    assert not steps.worker.scheduler.books.suspects
    steps.add("a", (1, 2), 2)
    steps.clients.pop("s")
    steps.run()


def test_the_twin_may_jump_over_a_suspects_steps() -> None:
    """Where nobody waits, nothing changes when it has got on."""
    steps = make(1, num_blocks=40)
    steps.add("s", (1, 2, 3), 20, alone=True)
    steps.step()
    plan = steps.worker.scheduler.schedule(1.0)
    assert steps.worker.scheduler.steady_steps(plan) > 1
    other = make(1, num_blocks=40)
    other.add("a", (7, 8), 20)
    other.step(2)
    other.add("s", (1, 2, 3), 20, alone=True)
    other.step(2)
    plan = other.worker.scheduler.schedule(1.0)
    assert [chunk.seq.request.id for chunk in plan.chunks] == ["s"]
    assert other.worker.scheduler.steady_steps(plan) == 1


# The checks fail where they should --------------------------------------------------------------


def _company(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(NextStep, "_plan_alone", lambda self: False)


def _beside_what_is_in_flight(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(InFlight, "has_only", lambda self, seq_id: True)


def _two_at_a_time(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Suspects, "may_enter", lambda self, seq: True)


def _never_gets_on(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(alone, "has_got_on", lambda num_drawn: False)


@pytest.mark.parametrize(
    "bug", [_company, _beside_what_is_in_flight, _two_at_a_time, _never_gets_on]
)
def test_finds(bug: object, monkeypatch: pytest.MonkeyPatch) -> None:
    bug(monkeypatch)  # type: ignore[operator]
    with pytest.raises(AssertionError):
        test_a_suspect_has_its_first_steps_to_itself(2)
        test_one_suspect_at_a_time(2)
