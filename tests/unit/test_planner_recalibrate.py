"""A profile that was wrong, put right by steps of real traffic, with the error that it then has."""

from __future__ import annotations

import random

import msgspec
import pytest
from plan_worlds import offer

from baton.core.cost import ChunkShape, StepShape
from baton.core.step_cost import MeasuredStep
from baton.planner.recalibrate import MIN_STEPS, recalibrate, recalibrate_roles, slower
from baton.types import Role

WRONG = offer(flops=4e12, memory=2e11).profile
"""What is believed."""
TRUE = offer(flops=1e12, memory=1e11).profile.cost()
"""What the machine is: 4 times slower at arithmetic, twice at memory."""


def steps(count: int, noise: float = 0.03, seed: int = 1) -> list[MeasuredStep]:
    """Chat: small decode batches, prompts of a few hundred tokens."""
    rng = random.Random(seed)
    found = []
    for i in range(count):
        decodes = [ChunkShape(1, rng.randint(50, 800), True) for _ in range(rng.randint(1, 8))]
        prompt = [ChunkShape(rng.randint(50, 400), 0, True)] if i % 3 == 0 else []
        shape = StepShape.of([*decodes, *prompt])
        found.append(MeasuredStep(shape, TRUE.step_s(shape) * rng.lognormvariate(0, noise)))
    return found


def test_it_predicts_what_it_has_not_seen() -> None:
    found = recalibrate(WRONG, steps(200))
    assert found is not None
    assert found.ratio > 1.4
    assert found.before > 0.4
    cost = found.profile.cost()
    for each in steps(60, noise=0.0, seed=2):
        assert cost.step_s(each.shape) == pytest.approx(TRUE.step_s(each.shape), rel=0.08)
    # Beyond what was served it is at least nearer than it was.
    far = StepShape.of([ChunkShape(1, 8000, True)] * 64)
    assert cost.step_s(far) == pytest.approx(TRUE.step_s(far), rel=0.3)
    assert WRONG.cost().step_s(far) < 0.6 * TRUE.step_s(far)


def test_the_held_out_error_is_that_of_the_steps() -> None:
    found = recalibrate(WRONG, steps(200, noise=0.2))
    assert found is not None
    held = found.profile.error("step")
    assert held is not None
    assert held.num_points == 200
    # |lognormal(0.2) - 1|: median 13 %, nine tenths 35 %.
    assert 0.09 < held.median < 0.2
    assert 0.25 < held.p90 < 0.5
    assert {each.kind for each in found.profile.held_out} == {"step", "prefill", "decode"}
    assert "200 measured steps of prefill workers took" in found.says("prefill workers")
    assert f"p90 {held.p90:.0%}" in found.says("all")


def test_few_steps_change_nothing() -> None:
    assert recalibrate(WRONG, steps(MIN_STEPS - 1)) is None
    assert recalibrate(WRONG, []) is None


def test_one_shape_alone_scales_the_whole() -> None:
    """Nothing tells the coefficients apart: all steps become slower alike."""
    shape = StepShape.of([ChunkShape(1, 100, True)])
    measured = [MeasuredStep(shape, 3 * WRONG.cost().step_s(shape))] * 60
    found = recalibrate(WRONG, measured)
    assert found is not None
    for other in (shape, StepShape.of([ChunkShape(512, 0, True)])):
        ratio = found.profile.cost().step_s(other) / WRONG.cost().step_s(other)
        assert ratio == pytest.approx(3, rel=0.02)


def test_what_was_not_served_stays_as_it_was() -> None:
    """Answers of one at a time say nothing of long prompts, and noise must not seem to."""
    rng = random.Random(3)
    measured = []
    for _ in range(120):
        shape = StepShape.of([ChunkShape(1, rng.randint(50, 800), True)] * rng.randint(1, 3))
        measured.append(MeasuredStep(shape, TRUE.step_s(shape) * rng.lognormvariate(0, 0.15)))
    found = recalibrate(WRONG, measured)
    assert found is not None
    for shape in (
        StepShape.of([ChunkShape(2048, 0, True)]),
        StepShape.of([ChunkShape(1, 30_000, True)] * 16),
    ):
        ratio = found.profile.cost().step_s(shape) / WRONG.cost().step_s(shape)
        assert ratio == pytest.approx(found.ratio, rel=0.35)


def test_slower_is_slower_in_every_term() -> None:
    rates = msgspec.structs.replace(
        WRONG.coefficients, activation_bytes_per_s=1e11, layer_s=1e-5, sequence_s=1e-5,
        sample_s=1e-5,
    )  # fmt: skip
    before = msgspec.structs.replace(WRONG, coefficients=rates).cost()
    after = msgspec.structs.replace(WRONG, coefficients=slower(rates, 2.5)).cost()
    for each in steps(20):
        assert after.step_s(each.shape) == pytest.approx(2.5 * before.step_s(each.shape))


def longer(measured: list[MeasuredStep], factor: float) -> list[MeasuredStep]:
    return [MeasuredStep(each.shape, factor * each.elapsed_s) for each in measured]


def test_each_role_is_fitted_to_its_own_steps() -> None:
    """Decode workers on half of the cores: one fit for all would be wrong of both."""
    told = {Role.PREFILL: steps(120), Role.DECODE: longer(steps(120, seed=4), 2.0)}
    found = recalibrate_roles(dict.fromkeys(told, WRONG), told)
    fast, slow = (found.by_role[role].cost() for role in told)
    for each in steps(30, noise=0.0, seed=2):
        true_s = TRUE.step_s(each.shape)
        assert fast.step_s(each.shape) == pytest.approx(true_s, rel=0.1)
        assert slow.step_s(each.shape) == pytest.approx(2 * true_s, rel=0.1)
    # Workers of another role on this device: somewhere between.
    (together,) = found.together.values()
    shape = StepShape.of([ChunkShape(1, 100, True)] * 4)
    assert fast.step_s(shape) < together.cost().step_s(shape) < slow.step_s(shape)
    assert [" ".join(note.split()[:6]) for note in found.notes] == [
        "120 measured steps of prefill workers", "120 measured steps of decode workers",
    ]  # fmt: skip


def test_a_role_of_which_too_little_is_known_has_what_all_ask_for() -> None:
    told = {Role.PREFILL: steps(MIN_STEPS - 1, seed=5), Role.DECODE: steps(100)}
    found = recalibrate_roles(dict.fromkeys(told, WRONG), told)
    (together,) = found.together.values()
    assert found.by_role[Role.PREFILL] == together != found.by_role[Role.DECODE]
    assert f"{MIN_STEPS - 1} measured steps of prefill workers are too few" in found.notes[0]
    assert found.notes[0].endswith("their cost model is that of all workers together")
    alone = recalibrate_roles({Role.UNIFIED: WRONG}, {})
    assert alone.by_role[Role.UNIFIED] == alone.together["Box"] == WRONG
    assert alone.notes[0].endswith("their cost model is as it was")


def test_roles_on_unlike_hardware_are_not_mixed() -> None:
    other = msgspec.structs.replace(WRONG, device="Other")
    told = {Role.PREFILL: longer(steps(60), 3.0), Role.DECODE: []}
    found = recalibrate_roles({Role.PREFILL: WRONG, Role.DECODE: other}, told)
    assert found.together == {"Box": found.by_role[Role.PREFILL], "Other": other}
    assert found.by_role[Role.DECODE] == other  # nothing was told of it


def test_two_profiles_of_one_device_say_what_other_workers_are_taken_for() -> None:
    fewer = msgspec.structs.replace(WRONG, notes="on half of the cores")
    found = recalibrate_roles({Role.PREFILL: WRONG, Role.DECODE: fewer}, {})
    assert found.together == {"Box": WRONG}
    assert found.notes[-1] == "unified workers on Box are taken to cost what prefill ones do"
