"""What a plan writes down of itself, and that serve reads it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from plan_worlds import LINK, kind, offer, space, split, trace, wish

from baton.config import load_config
from baton.core.cost import HeldOut
from baton.planner.plan.assumptions import assumptions, deciles, profiles_of, rate_range
from baton.planner.plan.flips import Flip
from baton.planner.plan.plan_file import plan_yaml
from baton.planner.plan.traffic import busiest
from baton.planner.plan.verdict import Plan, plan
from baton.types import Role


@pytest.fixture(scope="module")
def found() -> Plan:
    return plan(trace(), space(max_devices=4, links=(LINK,)), wish())


def test_a_plan_can_be_read_back(found: Plan, tmp_path: Path) -> None:
    window = busiest(trace(), 60)
    assumed = assumptions(found, window, {"profile_file": "/somewhere/plan.profile.json"})
    assert assumed.profile_file == "/somewhere/plan.profile.json"
    assert assumed.rate == pytest.approx(4.0)
    assert assumed.prompt_tokens == " ".join(["400"] * 9)
    assert assumed.output_tokens == " ".join(["30"] * 9)
    assert (assumed.slo, assumed.attainment) == ("ttft=1s,tpot=50ms", 0.9)
    assert (assumed.prompt_step_error, assumed.decode_step_error) == (0.1, 0.1)
    assert assumed.predicted_attainment == found.chosen.trial.attainment
    assert assumed.predicted_tpot_s == pytest.approx(found.chosen.trial.tpot_s, rel=1e-3)
    assert assumed.max_rate is not None and assumed.max_rate >= 4.0
    file = tmp_path / "plan.yaml"
    file.write_text(plan_yaml(found.chosen.candidate, 430, "m", (), assumed))
    assert load_config(file).plan == assumed
    assert {field: each.device for field, each in profiles_of(found).items()} == {
        "profile_file": "Box"
    }


def test_roles_of_unlike_profiles_are_written_apart(found: Plan) -> None:
    prefill, decode = offer("Box").profile, offer("Slow", flops=5e11).profile
    worse = HeldOut("step", 10, 0.2, 0.4, (0.5, 1.5))
    decode = msgspec.structs.replace(decode, held_out=(worse,))
    both = msgspec.structs.replace(offer("Box"), own={Role.DECODE: decode})
    candidate = split(1, 1, kind(both), kind(both))
    other = msgspec.structs.replace(
        found, chosen=msgspec.structs.replace(found.chosen, candidate=candidate)
    )
    assert profiles_of(other) == {
        "prefill_profile_file": prefill, "decode_profile_file": decode,
    }  # fmt: skip
    files = {"prefill_profile_file": "/p.json", "decode_profile_file": "/d.json"}
    assumed = assumptions(other, busiest(trace(), 60), files)
    assert (assumed.prompt_step_error, assumed.decode_step_error) == (0.1, 0.4)
    assert assumed.profile_files() == files
    assert assumed.profile_field(Role.PREFILL) == "prefill_profile_file"
    assert assumed.profile_field(Role.UNIFIED) == "profile_file"


@pytest.mark.parametrize(
    ("headroom", "flips", "low", "high"),
    [
        ([(1.1, True), (1.5, True), (2.0, False), (3.0, True)], [], None, 1.5),
        ([(1.1, False)], [], None, 1.0),
        ([], None, None, 1.0),
        ([(1.1, True), (3.0, True)], [("rate", 2.2), ("rate", 0.4)], 0.4, 2.2),
        ([(1.1, True)], [("prompt", 2.0), ("link", 0.1)], None, 1.1),
    ],
)
def test_rates_at_which_it_flips(
    found: Plan,
    headroom: list[tuple[float, bool]],
    flips: list[tuple[str, float]] | None,
    low: float | None,
    high: float,
) -> None:
    told = None if flips is None else [Flip(what, factor, "split") for what, factor in flips]
    changed = msgspec.structs.replace(found, headroom=headroom, flips=told)
    rate = found.traffic.rate
    least, most = rate_range(changed)
    assert least == (None if low is None else pytest.approx(low * rate))
    assert most == pytest.approx(high * rate)


def test_deciles_of_lengths() -> None:
    assert deciles(range(101)) == "10 20 30 40 50 60 70 80 90"
    assert deciles([7]) == " ".join(["7"] * 9)
