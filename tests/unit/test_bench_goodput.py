"""The arithmetic of `bench/goodput.py`: arrivals, attainment, goodput, what is measured next."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from parts.goodput import judge, plan, report
from parts.goodput import workload as workloads

from baton.errors import ConfigError
from baton.observe.slo import Slo

BENCH = Path(__file__).parents[2] / "bench"

WORKLOAD = workloads.load_workload(BENCH / "goodput.yaml")
ENGINES = ("baton-1P1D", "vllm")


def outcome(name="chat", ttft=1.0, tpot=0.03, itl_p99=0.05, failure=None):
    values = {"ttft": ttft, "tpot": tpot, "itl_p99": itl_p99}
    return judge.Outcome(name, values, 64, failure)


def window(engine, budget, rate, num_good, kind="poisson", number=0, total=20):
    """`num_good` requests that keep every objective, the others fail."""
    outcomes = [outcome()] * num_good + [outcome(failure="timeout")] * (total - num_good)
    return judge.Measured(judge.Key(engine, budget, kind, rate, number), outcomes, 5e10, "", "")


class TestWorkload:
    def test_objectives_are_those_of_the_issue(self) -> None:
        limits = {
            (objective, name): WORKLOAD.slo(objective, name).limits
            for objective in WORKLOAD.objectives
            for name in WORKLOAD.classes
        }
        assert limits["loose", "chat"] == {"ttft": 4.0, "tpot": 0.1}
        assert limits["loose", "long"] == {"ttft": 20.0, "tpot": 0.1}
        assert limits["firm", "chat"] == {"ttft": 2.0, "tpot": 0.04}
        assert limits["firm", "long"] == {"ttft": 12.0, "tpot": 0.04}
        assert limits["smooth", "chat"] == {"ttft": 2.0, "tpot": 0.04, "itl_p99": 0.06}

    def test_every_five_requests_hold_one_long_one(self) -> None:
        planned = workloads.mixed(WORKLOAD, 2.0, "a")
        assert len(planned) == 80
        for i in range(0, len(planned), 5):
            assert Counter(p.name for p in planned[i : i + 5]) == {"chat": 4, "long": 1}
        for p in planned:
            low, high = (96, 160) if p.name == "chat" else (1500, 2000)
            assert low <= p.arrival.prompt_tokens <= high
            assert p.arrival.output_tokens == (64 if p.name == "chat" else 16)

    def test_times_scale_with_the_rate_and_lengths_do_not_change(self) -> None:
        slow, fast = (workloads.mixed(WORKLOAD, rate, "a") for rate in (0.2, 0.4))
        assert len(slow) == len(fast) == 20
        assert slow[1].arrival.prompt_tokens == fast[1].arrival.prompt_tokens
        assert [p.name for p in slow] == [p.name for p in fast]

    def test_bursts_keep_the_order_and_leave_pauses(self) -> None:
        planned = workloads.mixed(WORKLOAD, 2.0, "a", bursty=True)
        plain = workloads.mixed(WORKLOAD, 2.0, "a")
        times = [p.arrival.at_s for p in planned]
        assert times == sorted(times)
        bursty = WORKLOAD.bursty
        assert all(t % bursty.period_s <= bursty.period_s * bursty.share + 1e-9 for t in times)
        assert max(b - a for a, b in pairwise(times)) > bursty.period_s / 2
        same = [p.arrival.at_s // bursty.period_s for p in plain]
        assert [t // bursty.period_s for t in times] == same

    def test_the_tail_has_streams_first_and_prompts_after(self) -> None:
        planned = workloads.tail(WORKLOAD)
        times = [p.arrival.at_s for p in planned]
        assert times == sorted(times)
        assert Counter(p.name for p in planned) == {"stream": 8, "prompt": 4}

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("of_five: 4", "of_five: 3"),
            ("first_rate: 0.4", "first_rate: 0.5"),
            ("loose:", "x: 1\n  loose:"),
        ],
    )
    def test_a_file_that_does_not_fit_is_refused(self, tmp_path: Path, old: str, new: str) -> None:
        file = tmp_path / "w.yaml"
        text = (BENCH / "goodput.yaml").read_text()
        assert old in text
        file.write_text(text.replace(old, new))
        with pytest.raises(ConfigError, match="w.yaml"):
            workloads.load_workload(file)


class TestJudge:
    def test_stress_is_the_worst_value_in_limits(self) -> None:
        slo = Slo.parse("ttft=2s,tpot=40ms")
        assert judge.stress(outcome(ttft=1.0, tpot=0.03), slo) == pytest.approx(0.75)
        assert judge.stress(outcome(ttft=4.0, tpot=0.03), slo) == pytest.approx(2.0)
        assert judge.stress(outcome(tpot=None), slo) == pytest.approx(0.5)
        assert judge.stress(outcome(failure="timeout"), slo) == math.inf

    def test_each_request_is_judged_by_its_class(self) -> None:
        mixed = [outcome("chat", ttft=3.0), outcome("long", ttft=11.0)]
        assert judge.attainment(WORKLOAD, "loose", mixed) == 1.0
        assert judge.attainment(WORKLOAD, "firm", mixed) == 0.5

    def test_a_failed_request_counts_against(self) -> None:
        assert judge.attainment(WORKLOAD, "loose", [outcome(), outcome(failure="http 500")]) == 0.5

    def test_smooth_looks_at_a_requests_own_gaps(self) -> None:
        stutters = [outcome(itl_p99=0.061)]
        assert judge.attainment(WORKLOAD, "firm", stutters) == 1.0
        assert judge.attainment(WORKLOAD, "smooth", stutters) == 0.0

    @pytest.mark.parametrize(
        ("attained", "expected"),
        [
            ({}, None),
            ({0.4: 1.0}, judge.Goodput(0.4, at_least=True)),
            ({0.2: 0.5, 0.4: 0.4}, judge.Goodput(0.0, at_most=0.2)),
            ({0.4: 1.0, 0.8: 0.8}, judge.Goodput(0.6)),
            ({0.4: 0.9, 0.8: 0.8}, judge.Goodput(0.4)),
            # Held again at a higher rate: luck, not goodput.
            ({0.4: 1.0, 0.8: 0.8, 1.0: 1.0}, judge.Goodput(0.6)),
        ],
    )
    def test_goodput(self, attained: dict[float, float], expected: object) -> None:
        found = judge.goodput(attained, 0.9)
        if expected is None:
            assert found is None
        else:
            assert found.rate == pytest.approx(expected.rate)
            assert (found.at_least, found.at_most) == (expected.at_least, expected.at_most)

    def test_rounds_are_pooled(self) -> None:
        rounds = [window("vllm", 64, 0.4, good, number=i) for i, good in enumerate((20, 10))]
        assert judge.curve(WORKLOAD, "loose", rounds, "vllm", 64) == {0.4: 0.75}

    def test_the_budget_with_the_least_stress_at_the_deciding_rank_is_chosen(self) -> None:
        def at(budget, ttfts):
            key = judge.Key("vllm", budget, "poisson", WORKLOAD.first_rate, 0)
            return judge.Measured(key, [outcome(ttft=t) for t in ttfts], 5e10, "", "")

        # The two worst of twenty do not count, the third worst does.
        windows = [
            at(64, [1.6] * 20),
            at(256, [1.2] * 18 + [9.0] * 2),
            at(512, [1.0] * 17 + [9.0] * 3),
        ]
        assert judge.choose_budget(WORKLOAD, "firm", windows, "vllm") == 256
        assert judge.choose_budget(WORKLOAD, "firm", windows, "llama-server") is None


class TestPlan:
    def run(self, holds, rounds=1, stop_after=None):
        """Measure with an engine that keeps everything as `holds(key)` says."""
        measured = []
        while (key := plan.next_window(WORKLOAD, ENGINES, rounds, measured)) is not None:
            good = 20 if holds(key) else 0
            found = window(key.engine, key.budget, key.rate, good, key.kind, key.round)
            measured.append(found)
            if len(measured) == stop_after:
                break
        return measured

    def test_nothing_is_measured_twice_and_it_ends(self) -> None:
        keys = [m.key for m in self.run(lambda key: key.rate <= 0.7, rounds=2)]
        assert len(keys) == len(set(keys))
        assert {k.kind for k in keys} == {"poisson", "tail", "bursty"}

    def test_budgets_come_first_at_the_first_rate(self) -> None:
        keys = [m.key for m in self.run(lambda key: True)]
        expected = [(e, b) for e in ENGINES for b in WORKLOAD.budgets[e]]
        first = keys[: len(expected)]
        assert [(k.engine, k.budget) for k in first] == expected
        assert {k.rate for k in first} == {WORKLOAD.first_rate}

    def test_a_sweep_goes_up_to_the_first_rate_that_fails(self) -> None:
        keys = [m.key for m in self.run(lambda key: key.rate <= 0.7)]
        rates = {k.rate for k in keys if k.kind == "poisson"}
        assert rates == {0.4, 0.7, 1.0}

    def test_a_sweep_goes_down_from_a_first_rate_that_fails(self) -> None:
        keys = [m.key for m in self.run(lambda key: False)]
        assert {k.rate for k in keys if k.kind == "poisson"} == {0.2, 0.4}

    def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(self) -> None:
        def holds(key):
            return key.rate <= 0.7

        whole = [m.key for m in self.run(holds)]
        half = self.run(holds, stop_after=7)
        assert [m.key for m in half] == whole[:7]
        assert plan.next_window(WORKLOAD, ENGINES, 1, half) == whole[7]

    def test_nothing_is_left_when_all_engines_have_failed(self) -> None:
        assert plan.next_window(WORKLOAD, [], 2, []) is None

    def test_later_rounds_do_not_change_the_chosen_budget(self) -> None:
        first = [window("vllm", b, 0.4, 20 if b == 256 else 0) for b in WORKLOAD.budgets["vllm"]]
        later = [window("vllm", 256, 0.4, 0, number=1)]
        chosen = plan.budgets_of(WORKLOAD, first + later, "vllm")
        assert set(chosen.values()) == {256}


class TestReport:
    def test_it_names_what_is_missing_and_what_is_not_measured_yet(self) -> None:
        first = [window("baton-1P1D", b, 0.4, 20) for b in WORKLOAD.budgets["baton-1P1D"]]
        gone = [report.Missing("llama-server", "no compiler")]
        text = report.render(WORKLOAD, first, ENGINES, gone)
        assert "| baton-1P1D | ≥ 0.4" in text
        assert "- vllm: not measured at all of its budgets yet" in text
        assert "- llama-server: not measured: no compiler" in text

    def test_a_peer_with_zero_is_reported_in_absolutes(self) -> None:
        ours = [window("baton-1P1D", b, 0.4, 20) for b in WORKLOAD.budgets["baton-1P1D"]]
        theirs = [window("vllm", b, 0.4, 5) for b in WORKLOAD.budgets["vllm"]]
        text = report.render(WORKLOAD, ours + theirs, ENGINES, [])
        assert "0: 25% at 0.4" in text
        assert "firm: baton-1P1D 0.40 ÷ vllm 0.00: not defined (the peer has 0)" in text

    def test_ratios_are_of_the_best_on_either_side(self) -> None:
        ours = [window("baton-1P1D", b, 0.4, 20) for b in WORKLOAD.budgets["baton-1P1D"]]
        ours.append(window("baton-1P1D", ours[0].key.budget, 0.7, 20))
        theirs = [window("vllm", b, 0.4, 20) for b in WORKLOAD.budgets["vllm"]]
        text = report.render(WORKLOAD, ours + theirs, ENGINES, [])
        assert "- loose: baton-1P1D 0.70 ÷ vllm 0.40: 1.75" in text

    def test_windows_survive_the_results_file(self) -> None:
        found = window("vllm", 64, 0.4, 3)
        encoded = msgspec.json.encode(found)
        again = msgspec.json.decode(encoded, type=judge.Measured)
        assert again == found
