"""The verdict: the twin decides, errors are drawn, and thresholds are where they are said to be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from unit import plan_worlds as worlds

from baton.config import load_config
from baton.core.cost import ChunkShape, HeldOut, Link, Parallel, Profile, StepShape
from baton.errors import ConfigError
from baton.planner.plan.candidates import Candidate, Style
from baton.planner.plan.certainty import certainty, draws
from baton.planner.plan.flips import price_flips
from baton.planner.plan.frontier import MOST_STRAIN, frontier, plot
from baton.planner.plan.plan_file import needs, plan_yaml
from baton.planner.plan.report import document, runners_up, sentences
from baton.planner.plan.rows import Wish
from baton.planner.plan.trials import Bench, Question, Ratios, Scaled, Trial, deployment_of
from baton.planner.plan.verdict import Plan, plan
from baton.types import Role

FAST = {"flops": 8e12, "memory": 2e10}
WIDE = {"flops": 5e11, "memory": 2e11}


@pytest.fixture(scope="module")
def simple() -> Plan:
    """One kind of device that is idle most of the time: two of them cannot pay."""
    return plan(worlds.trace(), worlds.space(), worlds.wish(), today=worlds.unified(3))


@pytest.fixture(scope="module")
def heard() -> dict[str, list[tuple[int, int]]]:
    """What `divided` has told on its way: by stage, how much was done, of how much."""
    return {}


@pytest.fixture(scope="module")
def divided(heard: dict[str, list[tuple[int, int]]]) -> Plan:
    """Two kinds of device, each good at one phase."""
    return plan(
        worlds.trace(),
        worlds.space(worlds.offer("Fast", **FAST), worlds.offer("Wide", **WIDE)),
        worlds.wish("ttft=40ms,tpot=8ms"),
        tell=lambda stage, done, total: heard.setdefault(stage, []).append((done, total)),
    )


def test_light_traffic_stays_unified(simple: Plan) -> None:
    assert simple.holds
    assert simple.chosen.style is Style.UNIFIED
    assert simple.chosen.candidate.num_devices == 1
    assert next(sentences(simple)).startswith("Verdict: stay unified: 1U Box")


def test_hardware_that_is_good_at_one_phase_each_is_split(divided: Plan) -> None:
    """Prompts are slow on one device and answers on the other, and the link is fast."""
    assert divided.holds
    assert divided.chosen.style is Style.SPLIT
    names = [kind.offer.name for kind, _ in divided.chosen.candidate.workers.values()]
    assert names == ["Fast", "Wide"]


def test_costs_are_those_of_the_layout(simple: Plan) -> None:
    row = simple.chosen
    assert row.usd_per_hour == 1.0
    tokens_per_hour = 4.0 * 30 * 3600
    assert row.usd_per_million == pytest.approx(1e6 / tokens_per_hour, rel=0.01)
    assert row.joules_per_token is not None
    assert 20 / 120 < row.joules_per_token < 100 / 120  # between idle and full power


def test_today_is_compared(simple: Plan) -> None:
    text = " ".join(sentences(simple))
    assert "Today's 3U Box" in text
    assert "moving saves $2.00 an hour" in text


def test_two_processes_find_the_same(simple: Plan) -> None:
    again = plan(
        worlds.trace(), worlds.space(), worlds.wish(), today=worlds.unified(3), num_processes=2
    )
    offered = [worlds.offer()]
    assert document(again, offered) == document(simple, offered)


def test_probability_follows_the_held_out_errors() -> None:
    """A promise with 10 % of room holds under errors of 1 %, and not under those of 50 %."""
    [trial] = _ask(worlds.unified(1), worlds.wish("tpot=1s"))
    limit_ms = 1.1 * trial.tpot_s * 1000
    found = {}
    for name, ratios in (("small", (0.99, 1.01)), ("large", (1.3, 1.7))):
        offered = worlds.offer(ratios=ratios)
        wish = worlds.wish(f"tpot={limit_ms:.3f}ms")
        candidate = worlds.unified(1, worlds.kind(offered))
        trials = _ask(candidate, wish, draws([offered], 10, 0))
        sure = certainty(trials, 0.9)
        assert sure is not None
        found[name] = sure.probability
    assert found == {"small": 1.0, "large": 0.0}


def test_draws_stay_within_the_errors_and_repeat() -> None:
    offered = worlds.offer(ratios=(0.8, 1.0, 1.5))
    drawn = draws([offered], 50, 7)
    assert drawn == draws([offered], 50, 7) != draws([offered], 50, 8)
    values = [value for each in drawn for value in each["Box"]]
    assert 0.8 <= min(values) < 0.9
    assert 1.3 < max(values) <= 1.5
    silent = worlds.offer(ratios=())
    assert draws([silent], 5, 0) == []


def test_errors_of_prompts_and_of_answers_are_told_apart() -> None:
    ratios = worlds.RATIOS
    profile = worlds.offer().profile
    both = (HeldOut("decode", 9, 0.1, 0.2, (2.0, 2.0)), HeldOut("ttft", 9, 0.1, 0.2, ratios))
    offered = msgspec.structs.replace(
        worlds.offer(), profile=msgspec.structs.replace(profile, held_out=both)
    )
    prompt, decode = draws([offered], 1, 0)[0]["Box"]
    assert decode == 2.0
    assert 0.9 <= prompt <= 1.1


def test_each_role_with_a_profile_of_its_own_is_drawn_apart() -> None:
    def sure(ratio: float) -> Profile:
        held_out = (HeldOut("step", 9, 0.1, 0.2, (ratio, ratio)),)
        return msgspec.structs.replace(worlds.offer().profile, held_out=held_out)

    own = {Role.DECODE: sure(3.0)}
    offered = msgspec.structs.replace(worlds.offer(), profile=sure(2.0), own=own)
    (ratios,) = draws([offered], 1, 0)
    assert ratios == {"Box": (2.0, 2.0), "Box/decode": (3.0, 3.0)}
    made = worlds.kind(offered)
    run = deployment_of(worlds.split(1, 1, made, made), worlds.trace(), ratios)
    shape = StepShape.of([ChunkShape(1, 50, True)] * 2)
    plain = worlds.kind().cost(Role.UNIFIED).step_s(shape)
    scaled = {each.role: each.cost.step_s(shape) for each in run.workers}
    assert scaled == {
        Role.PREFILL: pytest.approx(2 * plain), Role.DECODE: pytest.approx(3 * plain),
    }  # fmt: skip


def test_scaled_steps() -> None:
    cost = worlds.kind().cost(Role.UNIFIED)
    scaled = Scaled(cost, 3.0, 2.0)
    decode = StepShape.of([ChunkShape(1, 50, True)] * 2)
    prompt = StepShape.of([ChunkShape(1, 50, True), ChunkShape(20, 0, True)])
    assert scaled.step_s(decode) == 2 * cost.step_s(decode)
    assert scaled.step_s(prompt) == 3 * cost.step_s(prompt)


def test_a_price_flips_where_costs_meet() -> None:
    cheap, dear = worlds.kind(worlds.offer("A", usd=2.0)), worlds.kind(worlds.offer("B", usd=5.0))
    [flip] = price_flips(worlds.unified(1, cheap), [worlds.unified(1, dear)])
    assert flip.what == "price of A"
    assert flip.factor == pytest.approx(2.5)
    assert flip.to == "unified"


def test_a_slower_link_flips_a_split() -> None:
    offered = (worlds.offer("Fast", **FAST), worlds.offer("Wide", **WIDE))
    space = worlds.space(*offered, links=(Link(2e8),))
    found = plan(worlds.trace(), space, worlds.wish("ttft=40ms,tpot=8ms"))
    assert found.chosen.style is Style.SPLIT
    assert found.flips is not None
    slower = [flip for flip in found.flips if flip.what == "link" and flip.factor < 1]
    assert slower
    assert slower[0].to != "split"


def test_a_promise_that_cannot_be_kept_is_told_so(simple: Plan) -> None:
    row = msgspec.structs.replace(
        simple.chosen, trial=msgspec.structs.replace(simple.chosen.trial, attainment=0.2)
    )
    text = next(sentences(msgspec.structs.replace(simple, chosen=row, holds=False, best={})))
    assert text.startswith("Verdict: nothing that was run keeps")
    assert "20.0%" in text


def test_an_empty_trace_and_no_promise() -> None:
    with pytest.raises(ConfigError, match="the trace is empty"):
        plan([], worlds.space(), worlds.wish())
    with pytest.raises(ConfigError, match="needs a promise to keep: give --slo"):
        plan(worlds.trace(), worlds.space(), worlds.wish(""))


def test_progress_ends_where_it_said_it_would(
    divided: Plan, heard: dict[str, list[tuple[int, int]]]
) -> None:
    assert next(iter(heard)) == "predicting candidates"
    assert len(heard) == 4
    for stage, steps in heard.items():
        done = [each[0] for each in steps]
        assert done == sorted(done), stage
        assert all(each <= total for each, total in steps), stage
        assert steps[-1][0] == steps[-1][1], stage
    assert heard["looking for head-room"][-1][0] == len(divided.headroom)
    draws = sum(row.certainty.num_draws for row in divided.rows if row.certainty is not None)
    assert heard["running candidates in the twin"][-1][0] == len(divided.rows) + draws


def test_what_is_left_out_changes_nothing() -> None:
    """`property` has larger ones."""
    space, slo = worlds.space(max_devices=3), "ttft=150ms,tpot=8ms"
    found = []
    for thorough in (False, True):
        wish = worlds.wish(slo, num_draws=5, num_requests=30, thorough=thorough)
        found.append(plan(worlds.trace(num=30, rate=14.0), space, wish))
    pruned, whole = found
    assert pruned.chosen.candidate.name == whole.chosen.candidate.name
    assert pruned.chosen.probability == whole.chosen.probability
    assert pruned.num_runs < whole.num_runs
    assert len(whole.rows) == whole.num_candidates


def test_the_frontier_has_nothing_that_is_beaten(simple: Plan) -> None:
    edge = frontier(simple.rows)
    assert edge
    for row in edge:
        beaten = [
            other
            for other in simple.rows
            if other.usd_per_million < row.usd_per_million
            and other.trial.strain <= row.trial.strain
        ]
        assert not beaten
    picture = plot(simple)
    assert picture.startswith("<svg xmlns=")
    assert picture.count('<circle class="s') == len(
        [row for row in simple.rows if row.trial.strain <= MOST_STRAIN]
    )
    assert picture.count('<circle class="ring"') == 1
    assert f">chosen: {simple.chosen.candidate.layout} Box</text>" in picture
    assert ">unified</text>" in picture
    assert len(runners_up(simple)) >= 2


def test_the_file_is_the_configuration_that_ran(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(plan_yaml(worlds.split(2, 3), 600, "./model", ["why: because"]))
    config = load_config(file)
    assert config.launch.layout == "2P3D"
    assert config.launch.needs is not None
    assert "5 devices where a machine has 4" in config.launch.needs
    assert config.engine.max_num_batched_tokens == 512
    assert config.model.path == "./model"
    assert "# why: because" in file.read_text()


def test_what_baton_cannot_run_is_named() -> None:
    assert needs(worlds.unified(2)) is None
    wide = worlds.kind(parallel=Parallel(2))
    assert needs(worlds.unified(1, wide)) == "tensor parallelism"
    other = worlds.kind(worlds.offer("Other"))
    assert needs(worlds.split(1, 1, second=other)) == (
        "unlike devices in one layout (Box and Other)"
    )


def _ask(candidate: Candidate, wish: Wish, drawn: Sequence[Ratios] = ({},)) -> list[Trial]:
    bench = Bench(wish.slo, wish.attainment, 1)
    bench.traces[""] = worlds.trace()
    return bench.ask([Question(candidate, ratios=ratios) for ratios in drawn])
