"""What the planner may choose from, and what arithmetic leaves out before the twin runs."""

from __future__ import annotations

import pytest
from unit import plan_worlds as worlds

from baton.core.cost import Link
from baton.errors import ConfigError
from baton.observe.slo import Slo
from baton.planner.hardware import find_device
from baton.planner.models import find_model
from baton.planner.plan.bounds import Arithmetic
from baton.planner.plan.candidates import Style, Way
from baton.planner.plan.kinds import kinds, offers
from baton.planner.plan.search import check, simplest, survey
from baton.planner.plan.today import parse_today
from baton.planner.plan.traffic import Traffic, busiest
from baton.planner.plan.trials import Bench, Question
from baton.twin.workload import TraceRequest
from baton.types import Role

SLO = Slo.parse("ttft=1s,tpot=50ms")


def arithmetic(rate: float = 4.0, **lengths: int) -> Arithmetic:
    trace = worlds.trace(rate=rate, **lengths)
    return Arithmetic(Traffic.of(trace, rate), 0.9)


# What there is ----------------------------------------------------------------------------------


def test_a_worker_is_as_wide_as_the_model_needs() -> None:
    model = find_model("Llama-3.1-70B")  # 141 GB
    found = kinds(model, offers(["H100"], model), longest=4096, budgets=(512,))
    assert {each.parallel.tensor for each in found} == {4, 8}
    free = 0.9 * find_device("H100").memory_bytes * 4 - model.num_weights * 2
    assert found[0].kv_tokens == int(free / model.kv_bytes_per_token)


def test_a_model_that_fits_nowhere_gets_a_sentence() -> None:
    model = find_model("DeepSeek-V3")
    with pytest.raises(ConfigError, match=r"DeepSeek-V3 fits nowhere.*L4 has 206 GB in a node"):
        kinds(model, offers(["L4"], model), longest=4096)


def test_hardware_that_is_not_known_or_has_no_price() -> None:
    with pytest.raises(ConfigError, match=r"'H1000' is not known; did you mean"):
        offers(["H1000"], worlds.MODEL)
    with pytest.raises(ConfigError, match=r"has no price here: give --price .*=USD"):
        offers(["A30"], worlds.MODEL)
    assert offers(["A30"], worlds.MODEL, prices={"a30": 0.5})[0].usd_per_hour == 0.5


def test_candidates_are_unified_split_and_mixed_over_all_pairs_of_hardware() -> None:
    space = worlds.space(worlds.offer("Fast", flops=4e12), worlds.offer("Wide", memory=4e11))
    found = survey(space, arithmetic(), SLO)
    names = [each.candidate.name for each in found.all]
    assert len(names) == len(set(names)) == found.num_candidates
    assert {each.candidate.style for each in found.all} == set(Style)
    split = {
        tuple(kind.offer.name for kind, _ in each.candidate.workers.values())
        for each in found.all
        if each.candidate.style is Style.SPLIT
    }
    assert split == {(a, b) for a in ("Fast", "Wide") for b in ("Fast", "Wide")}


def test_links_and_codecs_are_tried() -> None:
    links = (Link(1e9), Link(1e8))
    space = worlds.space(links=links, codecs=(("raw", 1.0), ("int8", 0.5)))
    ways = {each.candidate.way for each in survey(space, arithmetic(), SLO).all} - {None}
    assert ways == {
        Way(link, codec, share) for link in links for codec, share in (("raw", 1.0), ("int8", 0.5))
    }


def test_no_candidate_has_more_devices_than_allowed() -> None:
    space = worlds.space(max_devices=2)
    found = survey(space, arithmetic(), SLO)
    assert found.num_candidates
    assert all(each.candidate.num_devices <= 2 for each in found.all)


# What arithmetic says ---------------------------------------------------------------------------


def test_prefill_capacity_is_rate_times_seconds() -> None:
    kind = worlds.kind()
    one = arithmetic(rate=1.0).predict(worlds.split(1, 4)).load
    four = arithmetic(rate=4.0).predict(worlds.split(4, 4)).load
    assert one == pytest.approx(four, rel=0.01)
    many = arithmetic(rate=200.0)
    least = many.least_workers(kind, Role.PREFILL)
    assert many.predict(worlds.split(least, 99)).load < 1.06
    assert many.predict(worlds.split(max(1, least // 2), 99)).load >= 1


def test_a_slow_link_bounds_a_split() -> None:
    predicted = arithmetic()
    fast = predicted.predict(worlds.split(1, 1, link=Link(1e9)))
    slow = predicted.predict(worlds.split(1, 1, link=Link(1e6)))
    assert fast.may_hold(SLO)
    assert slow.load >= 1
    assert not slow.may_hold(SLO)


def test_least_latencies_grow_with_prompts_and_batches() -> None:
    short = arithmetic(prompt=100).predict(worlds.unified(1))
    long = arithmetic(prompt=500).predict(worlds.unified(1))
    assert long.least_ttft_s > 3 * short.least_ttft_s
    assert arithmetic(rate=20.0).predict(worlds.unified(2)).tpot_s > short.tpot_s


def test_what_arithmetic_leaves_out_fails_in_the_twin_too() -> None:
    """Over loads from idle to lost: nothing that keeps the promise may be thrown away."""
    slo = Slo.parse("ttft=300ms,tpot=12ms")
    kept = lost = 0
    for rate in (1.0, 8.0, 20.0, 40.0, 80.0):
        trace = worlds.trace(num=150, rate=rate)
        bench = Bench(slo, 0.9, 1)
        bench.traces[""] = trace
        predicted = Arithmetic(Traffic.of(trace, rate), 0.9)
        for candidate in (worlds.unified(1), worlds.unified(2), worlds.split(1, 1)):
            [trial] = bench.ask([Question(candidate)])
            if predicted.predict(candidate).may_hold(slo):
                kept += trial.attainment >= 0.9
            else:
                lost += 1
                assert trial.attainment < 0.9, (rate, candidate.name, trial)
    assert kept
    assert lost


def test_prefix_hits_lighten_prefill() -> None:
    alone = [TraceRequest(i / 4, 400, 30) for i in range(60)]
    shared = [
        TraceRequest(i / 4, 400, 30, blocks=tuple(range(24)), block_size=16) for i in range(60)
    ]
    loads = [
        Arithmetic(Traffic.of(each, 4.0), 0.9).predict(worlds.split(1, 1)).least_ttft_s
        for each in (alone, shared)
    ]
    assert loads[1] < loads[0] / 3


def test_the_busiest_window_is_what_is_planned_for() -> None:
    calm = [TraceRequest(float(i), 10, 5) for i in range(20)]
    rush = [TraceRequest(20 + i / 10, 10, 5) for i in range(20)]
    window = busiest([*calm, *rush], 15)
    assert len(window) == 15
    assert window[0].arrival_s == 0
    assert Traffic.of(window, 1.0).rate == pytest.approx(10)


# Refusals ---------------------------------------------------------------------------------------


def test_a_trace_without_a_rate_gets_a_sentence() -> None:
    with pytest.raises(ConfigError, match="has no rate: its requests all come at once"):
        Traffic.of([TraceRequest(0.0, 10, 5), TraceRequest(0.0, 10, 5)], 1.0)


def test_an_impossible_slo_says_what_the_fastest_reaches() -> None:
    space, predicted = worlds.space(), arithmetic()
    slo = Slo.parse("ttft=1us,tpot=50ms")
    with pytest.raises(ConfigError, match=r"no layout here can keep .*ttft=0\.\d+s.*raise the lim"):
        check(survey(space, predicted, slo), space, predicted, slo)


def test_too_few_devices_says_how_many() -> None:
    space, predicted = worlds.space(max_devices=1), arithmetic(rate=300.0)
    with pytest.raises(ConfigError, match=r"needs at least \d+ devices, and --max-devices is 1"):
        check(survey(space, predicted, SLO), space, predicted, SLO)


def test_ties_go_to_the_simpler_style() -> None:
    assert simplest({Style.SPLIT: 1.0, Style.UNIFIED: 1.02}) is Style.UNIFIED
    assert simplest({Style.SPLIT: 1.0, Style.UNIFIED: 1.05}) is Style.SPLIT
    assert simplest({}) is None


def test_todays_layout() -> None:
    offered = [worlds.offer("Box"), worlds.offer("Other")]
    made = worlds.space(*offered).kinds
    with pytest.raises(ConfigError, match="is not known"):
        parse_today("4U:Nothing", offered, made, ())
    found = parse_today("4U", offered, made, ())
    assert found.usd_per_hour == 4
    assert found.style is Style.UNIFIED
    with pytest.raises(ConfigError, match=r"launch\.layout '4X'"):
        parse_today("4X", offered, made, ())
