"""The pure parts of `bench/twin_vs_real.py`: requests, order, capacity, judgement, what is kept."""

from __future__ import annotations

import statistics
from collections import Counter
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from parts.twin_vs_real import capacity, judge, report, served, simulated
from parts.twin_vs_real import settings as config
from parts.twin_vs_real.book import Book, Capacity, Header, Hop, Replayed
from parts.twin_vs_real.cells import (
    CELLS,
    LOADS,
    MAX_REPEATS,
    MIXES,
    Cell,
    Server,
    next_cell,
    requests,
    share_cores,
)

from baton.cli.parser import Parser, add_config_flags, config_from
from baton.config import load_config
from baton.core.cost import Coefficients, Profile, model_shape
from baton.core.replay import ReplayReport
from baton.errors import ConfigError
from baton.observe.results import RequestResult
from baton.twin.workload import TraceRequest

DEMO_1U = Server("demo", "1U")
CELL = Cell(DEMO_1U, "chat", 70)
HEADER = Header(20.0, (0, 1), "a machine")


def run(cell=CELL, scale=1.0, failures=None, **changed):
    """A run whose every figure is `scale` seconds, but for those in `changed`."""
    figures = dict.fromkeys(judge.FIGURES, scale)
    figures |= {name.replace("_", " "): value for name, value in changed.items()}
    times = [(1.0, 0.1, 2.0)] * 3
    return judge.Run(cell, 2.0, figures, times, failures or {}, 0.001, 0.5, "2026-01-01")


def result(index=0, at=0.0, ttft=1.0, gaps=(0.5, 0.5), failure=None, prompt=10):
    events = [at + ttft]
    for gap in gaps:
        events.append(events[-1] + gap)
    return RequestResult(
        index=index,
        planned_s=at,
        sent_s=at,
        end_s=events[-1],
        event_s=tuple(events),
        prompt_tokens=prompt,
        output_tokens=len(events),
        failure=failure,
    )


class TestCells:
    def test_all_that_is_asked_for_is_there_once(self) -> None:
        assert len(CELLS) == len(set(map(str, CELLS))) == 20
        demo = Counter(cell.server.layout for cell in CELLS if cell.server.model == "demo")
        assert demo == {"1U": 9, "1P1D": 9}
        others = {str(cell) for cell in CELLS if cell.server.model != "demo"}
        assert others == {"0.5B-1U-chat-70", "0.5B-1P1D-chat-70"}

    @pytest.mark.parametrize("workload", MIXES)
    def test_requests_have_the_rate_and_fit_the_model(self, workload: str) -> None:
        trace = requests(workload, 5.0, 180, "a")
        assert len(trace) == 900
        assert trace[0].arrival_s == 0
        assert (len(trace) - 1) / trace[-1].arrival_s == pytest.approx(5.0)
        longest = max(each.num_prompt_tokens + each.num_output_tokens for each in trace)
        assert longest < config.MAX_MODEL_LEN
        assert requests(workload, 5.0, 180, "a") == trace != requests(workload, 5.0, 180, "b")

    def test_code_comes_in_bursts(self) -> None:
        def variation(steady: bool) -> float:
            gaps = [
                b.arrival_s - a.arrival_s
                for a, b in pairwise(requests("code", 5.0, 180, "a", steady))
            ]
            return statistics.stdev(gaps) / statistics.mean(gaps)

        assert variation(True) == pytest.approx(1.0, abs=0.15)
        assert variation(False) > 1.2

    @pytest.mark.parametrize(
        ("workers", "cores", "expected"),
        [
            (1, [0, 1], [(1,)]),  # one is left to gateway and client
            (2, [0, 1], [(0,), (1,)]),
            (2, [0], [(0,), (0,)]),
            (1, [0, 1, 2, 3], [(1, 2, 3)]),
            (2, [0, 1, 2, 3], [(1,), (2,)]),
            (2, [4, 5, 6, 7, 8], [(5, 6), (7, 8)]),
        ],
    )
    def test_cores(self, workers: int, cores: list[int], expected: list[tuple[int, ...]]) -> None:
        assert share_cores(workers, cores) == expected


class TestNext:
    def order(self, cells, noisy=(), done=None):
        counts = Counter(done)
        found = []
        while (cell := next_cell(cells, counts, set(noisy))) is not None:
            counts[cell] += 1
            found.append(cell)
        return found

    def test_every_cell_once_before_any_twice(self) -> None:
        assert self.order(CELLS) == [*CELLS, *CELLS]

    def test_noisy_ones_are_run_again_in_pairs_until_it_is_enough(self) -> None:
        assert self.order(CELLS, noisy=[CELL])[2 * len(CELLS) :] == [CELL] * (MAX_REPEATS - 2)

    def test_a_pair_that_was_begun_is_ended(self) -> None:
        assert self.order([CELL], done={CELL: 3}) == [CELL]
        assert self.order([CELL], done={CELL: 4}) == []

    def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(self) -> None:
        whole = self.order(CELLS)
        assert self.order(CELLS, done=Counter(whole[:23])) == whole[23:]


class TestJudge:
    def test_figures(self) -> None:
        results = [result(i, ttft=float(i), gaps=(0.5, 1.5)) for i in range(11)]
        found = judge.figures([*results, result(failure="timeout", ttft=99.0)])
        assert list(found) == list(judge.FIGURES)
        assert found["ttft mean"] == pytest.approx(5.0)
        assert found["ttft p90"] == pytest.approx(9.0)
        assert found["tpot mean"] == pytest.approx(1.0)
        assert found["e2e p90"] == pytest.approx(11.0)

    @pytest.mark.parametrize(
        ("first", "second", "allowed", "noisy"),
        [
            (1.0, 1.0, 0.10, False),
            (0.98, 1.02, 0.10, False),
            (0.95, 1.05, 0.15, False),
            (0.935, 1.065, 0.195, False),
            (0.92, 1.08, 0.20, True),
        ],
    )
    def test_what_is_allowed(
        self, first: float, second: float, allowed: float, noisy: bool
    ) -> None:
        compared = judge.Compared("ttft mean", first, second, 1.1)
        assert compared.allowed == pytest.approx(allowed)
        assert compared.error == pytest.approx(0.1)
        assert compared.is_noisy is noisy

    @pytest.mark.parametrize(
        ("second", "twin", "expected"),
        [
            (run(), {"tpot p90": 1.09}, "within"),
            (run(), {"tpot p90": 0.91}, "within"),
            (run(), {"tpot p90": 1.11}, "off"),
            (run(), {"tpot p90": 0.89}, "off"),
            (run(e2e_mean=1.3), {}, "again"),
            (run(failures={"timeout": 1}), {}, "failed"),
        ],
    )
    def test_one_figure_decides(self, second, twin, expected) -> None:  # type: ignore[no-untyped-def]
        pair = (run(), second)
        compared = judge.compare(pair, dict.fromkeys(judge.FIGURES, 1.0) | twin)
        assert judge.verdict(pair, compared) == expected
        assert judge.is_noisy(pair) is (expected in ("again", "failed"))

    def test_a_figure_that_is_missing_is_no_success(self) -> None:
        pair = (run(), run())
        twin = dict.fromkeys(judge.FIGURES[1:], 1.0)
        assert judge.verdict(pair, judge.compare(pair, twin)) == "failed"

    def test_the_newest_whole_pair_counts(self) -> None:
        runs = [run(scale=float(i)) for i in range(1, 6)]
        other = run(Cell(DEMO_1U, "code", 40), 9.0)
        mixed = [runs[0], other, *runs[1:]]
        assert judge.last_pair(mixed[:1], CELL) is None
        assert judge.last_pair(mixed[:3], CELL) == (runs[0], runs[1])
        assert judge.last_pair(mixed, CELL) == (runs[2], runs[3])

    def test_other_lengths_are_failures(self) -> None:
        trace = [TraceRequest(0.0, 10, 3)] * 4
        results = [
            result(0),
            result(1, gaps=(0.5,)),
            result(2, prompt=9),
            result(3, failure="timeout"),
        ]
        assert judge.failures(trace, results) == {"other length": 2, "timeout": 1}


def queue(per_s):
    """A server that ends one request after the other, each in the same time."""

    def serve(trace):
        free, results = 0.0, []
        for number, each in enumerate(trace):
            free = max(free, each.arrival_s) + 1 / per_s
            results.append(result(number, each.arrival_s, free - each.arrival_s, ()))
        return results

    return serve


class TestCapacity:
    @pytest.mark.parametrize("per_s", [0.4, 3.0, 70.0])
    def test_it_is_what_a_queue_ends_when_it_grows(self, per_s: float) -> None:
        assert capacity.of_twin(queue(per_s), "code") == pytest.approx(per_s, rel=0.06)
        assert capacity.find(queue(per_s), "chat", 0.5 * per_s, 1.25) == pytest.approx(
            per_s, rel=0.06
        )

    def test_no_more_is_offered_than_makes_the_queue_grow(self) -> None:
        offered = []

        def serve(trace):
            offered.append((len(trace) - 1) / trace[-1].arrival_s)
            return queue(10.0)(trace)

        capacity.find(serve, "chat", 5.0, 1.25)
        assert len(offered) > 1 and max(offered) < 16.0

    def test_there_is_none_without_a_limit(self) -> None:
        assert capacity.find(queue(1e9), "code", 1.0, 1.5) is None

    def test_what_ends_in_the_first_quarter_does_not_count(self) -> None:
        results = [result(i, float(i), 0.5, ()) for i in range(20)]
        ended_per_s, kept_up = judge.throughput(results, 20.0)
        assert ended_per_s == pytest.approx(1.0)
        assert kept_up == pytest.approx(15 / 14)


@pytest.fixture(scope="module")
def demo() -> config.Setup:
    return config.setup(DEMO_1U, Path("nowhere"), [0, 1])


def made_up(setup: config.Setup) -> Profile:
    rates = Coefficients(1e11, 1e10, 1e11, 1e10, step_s=1e-4)
    shape = model_shape(setup.spec, "demo", None)
    return Profile("baton", "here", shape, rates, (), "a test", "2026-01-01", True)


class TestSettings:
    def test_the_server_and_the_twin_are_told_the_same(self, demo: config.Setup) -> None:
        parser = Parser("serve", summary="")
        add_config_flags(parser)
        assert config_from(parser.parse(demo.flags)) == load_config(None, demo.settings)

    def test_the_profile_is_of_one_worker_of_that_size(self) -> None:
        setups = [config.setup(Server("demo", name), Path(), [0, 1]) for name in ("1U", "1P1D")]
        assert [setup.settings["engine.cpus"] for setup in setups] == ["1", "0-1"]
        assert {setup.settings["engine.threads"] for setup in setups} == {"1"}
        assert len({setup.profile_name for setup in setups}) == 1
        parser = Parser("profile", summary="")
        add_config_flags(parser, only=("model", "engine"))
        found = config_from(parser.parse(setups[1].profile_flags))
        assert (found.engine.cpus, found.engine.threads) == ("0", 1)
        assert found.model.max_model_len == config.MAX_MODEL_LEN


class TestSimulated:
    def test_lengths_are_those_of_the_trace(self, demo: config.Setup) -> None:
        trace = requests("chat", 5.0, 20, "a")
        results = simulated.simulate(demo.settings, made_up(demo), trace, 0.001)
        assert judge.failures(trace, results) == {}
        assert [each.planned_s for each in results] == [each.arrival_s for each in trace]

    def test_a_first_token_takes_two_messages(self, demo: config.Setup) -> None:
        trace = served.probe_trace()
        fast, slow = (
            served.median_ttft_s(simulated.simulate(demo.settings, made_up(demo), trace, message_s))
            for message_s in (0.0, 0.003)
        )
        assert slow - fast == pytest.approx(0.006)

    def test_a_request_that_fails_on_an_idle_server_is_told(self) -> None:
        with pytest.raises(served.Broken, match="timeout"):
            served.median_ttft_s([result(), result(failure="timeout")])


class TestBook:
    def lines(self):
        again = ReplayReport("gateway", 9, 5, 0)
        return [
            Hop(DEMO_1U, 0.003),
            Hop(DEMO_1U, 0.001),
            Hop(DEMO_1U, 0.002),
            Capacity(DEMO_1U, "chat", 12.5),
            run(),
            run(e2e_mean=1.4),
            Replayed(DEMO_1U, (CELL,), (again,)),
        ]

    def test_it_goes_on_where_it_was(self, tmp_path: Path) -> None:
        book = Book(tmp_path / "new", HEADER)
        for line in self.lines():
            book.add(line)
        again = Book(tmp_path / "new", HEADER)
        for each in (book, again):
            assert each.message_s(DEMO_1U) == 0.002
            assert each.message_s(Server("demo", "1P1D")) is None
            assert each.capacities == {(DEMO_1U, "chat"): 12.5}
            assert each.num_runs() == {CELL: 2}
            assert each.noisy() == {CELL}
            assert each.runs == [run(), run(e2e_mean=1.4)]
            assert each.replayed == self.lines()[-1:]

    def test_other_runs_are_refused(self, tmp_path: Path) -> None:
        Book(tmp_path, HEADER)
        with pytest.raises(ConfigError, match="name another"):
            Book(tmp_path, msgspec.structs.replace(HEADER, seconds=180.0))


class TestReport:
    def row(self, **twin):
        pair = (run(), run(scale=1.04))
        named = {name.replace("_", " "): value for name, value in twin.items()}
        compared = judge.compare(pair, dict.fromkeys(judge.FIGURES, 1.02) | named)
        return report.Row(CELL, pair, compared)

    def test_errors_and_verdicts(self) -> None:
        rows = [self.row(), self.row(ttft_p90=1.53)]
        text = report.errors_table(rows, {CELL: 2})
        first, second = text.splitlines()[-2:]
        assert first.startswith("| demo-1U-chat-70 | 2 | 3 | 2 | +0.0% (10%) |")
        assert first.endswith("| within |")
        assert "| +50.0% (10%) |" in second and second.endswith("| **off** |")
        assert "| 1000 | 1040 | 3.9% | 1530 | +50.0% |" in report.times_table(rows)
        total = report.total(rows, len(LOADS))
        assert total.startswith("1 of 3 cells within, 1 off, 0 to be run again, 0 requests failed")
        assert "1 not measured twice" in total and "largest 50.0%" in total

    def test_decisions_that_differ_are_counted(self) -> None:
        reports = (ReplayReport("gateway", 9, 5, 0), ReplayReport("unified-0", 90, 50, 2, 7))
        replayed = [Replayed(DEMO_1U, (CELL,), reports)]
        assert report.num_differing(replayed) == 2
        text = report.replay_table(replayed)
        assert "| demo-1U | 1 | unified-0 | 90 | 50 | 2 |" in text
        assert "2 of 55 decisions differ." in text

    def test_capacities_stand_side_by_side(self) -> None:
        real = {(DEMO_1U, "chat"): 10.0, (DEMO_1U, "code"): 4.0}
        text = report.capacity_table(real, {(DEMO_1U, "chat"): 11.0})
        assert "| demo-1U | chat | 10 | 11 | +10.0% |" in text
        assert "| demo-1U | code | 4 | ? |  |" in text
