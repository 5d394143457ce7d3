"""Who stands still: told by pulses, on a clock of the test's own."""

from __future__ import annotations

import pytest

from baton.core.liveness import HEARTBEAT_S, MAX_GAP_S, PATIENCE_S, Frozen, Liveness
from baton.core.step_times import UNKNOWN_STEP_S, StepTimes
from baton.types import Pulse

BATCH = (("r", 0, 1),)


class Clock:
    """Two workers that joined at 0; `run` lets beats pass and says who was found to stand still."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self.now = 100.0
        self.watched = Liveness(patience_s)
        self.progress = 0
        for name in ("a", "b"):
            self.watched.joined(name, self.now)

    def run(
        self,
        seconds: float,
        *,
        silent: bool = False,
        still: bool = False,
        working: bool = True,
        predicted_s: float = 0.01,
    ) -> list[Frozen]:
        """`b` is always well. `a` says nothing, or its counter stands still, or it does move."""
        found = []
        for _ in range(round(seconds / HEARTBEAT_S)):
            self.now += HEARTBEAT_S
            self.progress += 1
            self.watched.heard("b", Pulse(self.progress, True, 0.01), self.now)
            if not silent:
                progress = 7 if still else self.progress
                pulse = Pulse(progress, working, predicted_s, BATCH if still else ())
                self.watched.heard("a", pulse, self.now)
            found += self.watched.check(self.now)
        return found


def test_silent_for_too_long() -> None:
    clock = Clock()
    assert clock.run(10) == []
    assert clock.run(PATIENCE_S, silent=True) == []
    (frozen,) = clock.run(0.5, silent=True)
    assert frozen == ("a", PATIENCE_S + 0.5, None)
    assert clock.run(60, silent=True) == [], "it is told once"
    assert clock.watched.frozen() == {"a": 60}


def test_silence_counts_without_work_too() -> None:
    clock = Clock()
    clock.run(10, working=False)
    assert [each.worker_id for each in clock.run(4, silent=True)] == ["a"]


def test_never_heard_at_all() -> None:
    assert [each.worker_id for each in Clock().run(4, silent=True)] == ["a"]


def test_stuck_in_a_step() -> None:
    clock = Clock()
    clock.run(2)
    assert clock.run(PATIENCE_S + 0.5, still=True) == []
    assert clock.run(0.5, still=True) == [("a", PATIENCE_S + 0.5, BATCH)]
    assert clock.run(30, still=True) == []


def test_a_long_step_is_not_mistaken() -> None:
    """Its counter moves, or it was predicted to be long; then it has five times as long."""
    clock = Clock()
    assert clock.run(600, predicted_s=0.01) == []
    assert clock.run(100, still=True, predicted_s=20.0) == []
    assert [each.stuck_at for each in clock.run(2, still=True, predicted_s=20.0)] == [BATCH]


def test_the_first_step_of_all_may_take_long() -> None:
    clock = Clock()
    assert clock.run(5 * UNKNOWN_STEP_S, still=True, predicted_s=UNKNOWN_STEP_S) == []


def test_who_waits_for_others_does_not_stand_still() -> None:
    clock = Clock()
    assert clock.run(600, still=True, working=False) == []


def copying(clock: Clock, num_copied: int, is_copying: bool = True) -> list[Frozen]:
    """Half a second later: `a` steps on, and its copier has done so many copies."""
    clock.now += HEARTBEAT_S
    clock.progress += 1
    clock.watched.heard("b", Pulse(clock.progress, True, 0.01), clock.now)
    pulse = Pulse(clock.progress, True, 0.01, (), num_copied, is_copying)
    clock.watched.heard("a", pulse, clock.now)
    return clock.watched.check(clock.now)


def test_a_copier_that_stands_still() -> None:
    """Its engine gets on, or waits for the copies: nobody is to blame, but it takes no more."""
    clock = Clock()
    assert [copying(clock, n) for n in range(20)] == [[]] * 20
    found = [frozen for _ in range(7) for frozen in copying(clock, 19)]
    assert found == [("a", PATIENCE_S + 0.5, ())]
    assert not clock.watched.heard("a", Pulse(999, True, 0.01, (), 19, True), clock.now)
    assert clock.watched.frozen(), "that its engine steps on does not help"
    assert clock.watched.heard("a", Pulse(1000, True, 0.01, (), 20, True), clock.now)
    assert not clock.watched.frozen()


def test_a_copier_without_copies_may_rest() -> None:
    clock = Clock()
    assert [copying(clock, 5, is_copying=False) for _ in range(50)] == [[]] * 50
    assert [found for _ in range(9) for found in copying(clock, 5)] != []
    assert clock.watched.heard("a", Pulse(999, True, 0.01, (), 5, False), clock.now)


@pytest.mark.parametrize("how", [{"silent": True}, {"still": True}])
def test_it_comes_back_when_its_counter_moves(how: dict[str, bool]) -> None:
    clock = Clock()
    clock.run(2)
    assert len(clock.run(5, **how)) == 1
    watched, now = clock.watched, clock.now
    assert not watched.heard("a", None, now), "a report without a pulse proves nothing"
    if "still" in how:
        assert not watched.heard("a", Pulse(7, True, 0.01), now), "the counter has not moved"
    assert watched.frozen()
    assert watched.heard("a", Pulse(8, True, 0.01), now)
    assert not watched.frozen()
    assert not watched.heard("a", Pulse(9, True, 0.01), now), "it is told once"
    assert len(clock.run(5, **how)) == 1, "and again if it happens again"


def test_it_comes_back_when_it_has_nothing_to_do() -> None:
    clock = Clock()
    clock.run(2)
    clock.run(5, still=True)
    assert clock.watched.heard("a", Pulse(7, False), clock.now)


def test_silent_in_a_step_and_woken_in_it() -> None:
    """Stopped while it worked: it is back with the next layer, not with the first word."""
    clock = Clock()
    clock.run(2, still=True)
    assert [each.stuck_at for each in clock.run(5, silent=True)] == [None]
    assert not clock.watched.heard("a", Pulse(7, True, 0.01), clock.now)
    assert clock.watched.heard("a", Pulse(8, True, 0.01), clock.now)


def test_one_that_left_is_watched_no_more() -> None:
    clock = Clock()
    clock.run(5, silent=True)
    clock.watched.left("a")
    assert clock.watched.frozen() == {}
    assert not clock.watched.heard("a", Pulse(1, True), clock.now)
    assert clock.run(10, silent=True) == []
    clock.watched.joined("a", clock.now)
    assert clock.run(2, silent=True) == []


def test_when_the_gateway_stood_still_nobody_else_did() -> None:
    clock = Clock()
    clock.run(2)
    clock.now += 3600.0
    assert clock.watched.check(clock.now) == []
    assert clock.run(PATIENCE_S - MAX_GAP_S, silent=True) == [], "the gap counts for little"
    assert len(clock.run(1, silent=True)) == 1


def test_patience_is_the_operators() -> None:
    clock = Clock(patience_s=20.0)
    assert clock.run(20, silent=True) == []
    assert len(clock.run(1, silent=True)) == 1


# Predictions -----------------------------------------------------------------------------------


def test_steps_are_predicted_by_their_size() -> None:
    times = StepTimes()
    assert times.predict(1) == times.predict(512) == UNKNOWN_STEP_S
    times.observe(8, 0.1)
    assert times.predict(8) == times.predict(15) == pytest.approx(0.1)
    assert times.predict(1) == pytest.approx(0.1), "no more than a larger one"
    assert times.predict(512) == pytest.approx(6.4), "64 times as large, at most 64 times as long"
    assert times.predict(32) == pytest.approx(0.4)
    assert times.predict(64) == pytest.approx(2.0), "much larger: kernels may be missing for it"
    times.observe(512, 2.0)
    assert times.predict(100) == times.predict(512) == pytest.approx(2.0)
    assert times.predict(9) == pytest.approx(0.1)


def test_predictions_follow_what_is_seen() -> None:
    times = StepTimes()
    for _ in range(50):
        times.observe(1, 0.01)
    for _ in range(50):
        times.observe(1, 0.1)
    assert times.predict(1) == pytest.approx(0.1, rel=0.01)
