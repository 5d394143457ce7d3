"""What is left out of a search does not change what it finds.

Searches that leave nothing out take a while; `unit` has a small one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from unit import plan_worlds as worlds

from baton.observe.slo import Slo
from baton.planner.plan import hunt
from baton.planner.plan.candidates import Style
from baton.planner.plan.rows import Wish
from baton.planner.plan.search import Found, Space
from baton.planner.plan.trials import Bench, Question, Trial
from baton.planner.plan.verdict import Plan, plan

FAST = worlds.offer("Fast", usd=2.0, flops=8e12, memory=2e10)
WIDE = worlds.offer("Wide", usd=1.5, flops=5e11, memory=2e11)
ROUGH = worlds.offer(ratios=(0.6, 1.0, 1.6))

CASES = {
    "one kind of device": (worlds.space(), "ttft=1s,tpot=50ms", 4.0),
    "a tight limit": (worlds.space(), "ttft=150ms,tpot=8ms", 14.0),
    "two kinds of device": (worlds.space(FAST, WIDE), "ttft=40ms,tpot=8ms", 4.0),
    "a rough profile": (worlds.space(ROUGH), "ttft=150ms,tpot=8ms", 18.0),
    "nothing is sure": (worlds.space(ROUGH, max_devices=2), "ttft=150ms,tpot=8ms", 18.0),
}


@pytest.fixture(scope="module", autouse=True)
def trials() -> Iterator[None]:
    """The twin answers the same to the same question, so it is asked once for all these tests."""
    known: dict[str, Trial] = {}
    answer = Bench._answer

    def once(self: Bench, question: Question) -> Trial:
        trace = self.traces[question.trace]
        whole = repr((question, trace, self._slo, self._attainment))
        if whole not in known:
            known[whole] = answer(self, question)
        return known[whole]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bench, "_answer", once)
        yield


@pytest.mark.parametrize("case", CASES)
def test_the_verdict_is_that_of_a_search_that_leaves_nothing_out(case: str) -> None:
    space, slo, rate = CASES[case]
    pruned = _plan(space, worlds.wish(slo, num_draws=10, num_requests=40), rate)
    whole = _plan(space, worlds.wish(slo, num_draws=10, num_requests=40, thorough=True), rate)
    assert _verdict(pruned) == _verdict(whole)
    assert pruned.num_runs < whole.num_runs or case == "nothing is sure"
    assert len(whole.rows) == whole.num_candidates


@pytest.mark.parametrize("case", ["a tight limit", "a rough profile"])
def test_the_order_of_the_search_does_not_matter(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may begin with what is dearest: all that costs less is looked at then."""
    space, slo, rate = CASES[case]
    wish = worlds.wish(slo, num_draws=10, num_requests=40)
    usual = _plan(space, wish, rate)

    def backwards(found: Sequence[Found], slo: Slo, style: Style) -> list[Found]:
        return [each for each in reversed(found) if each.candidate.style is style]

    monkeypatch.setattr(hunt, "in_order", backwards)
    monkeypatch.setattr(hunt, "BATCH", 1)
    assert _verdict(_plan(space, wish, rate)) == _verdict(usual)


def test_the_cases_end_in_every_way() -> None:
    found = []
    for space, slo, rate in CASES.values():
        found.append(_plan(space, worlds.wish(slo, num_draws=10, num_requests=40), rate))
    sure = [each.chosen.probability or 0.0 for each in found if each.holds]
    assert {each.chosen.style.value for each in found} >= {"unified", "split"}
    assert min(sure) < 0.8 <= max(sure)
    assert len({each.chosen.candidate.num_devices for each in found}) > 1


def test_draws_stop_when_it_is_clear() -> None:
    """A candidate that breaks the promise under most errors is not drawn for to the end, unless
    there is no other."""
    space, slo, rate = CASES["a rough profile"]
    found = _plan(space, worlds.wish(slo, num_draws=30), rate)
    drawn = [row.certainty for row in found.rows if row.certainty is not None]
    assert found.chosen.certainty is not None
    assert found.chosen.certainty.num_draws == 30
    short = [each for each in drawn if each.num_draws < 30]
    assert short
    assert all(each.probability < 0.8 for each in short)


def _plan(space: Space, wish: Wish, rate: float) -> Plan:
    return plan(worlds.trace(num=40, rate=rate), space, wish)


def _verdict(found: Plan) -> tuple[bool, str, float | None]:
    return found.holds, found.chosen.candidate.name, found.chosen.probability
