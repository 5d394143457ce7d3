"""Predicted beside measured: pairs, windows, and what is not believed."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from baton.core.predicted import Predicted
from baton.core.step_cost import MeasuredStep, StepShape
from baton.observe.audit import WINDOW, Audit, Stage, StageError, quantile
from baton.types import Role, StageTimes

DECODE = StepShape(4, 4, 4, 400, 400.0)
PROMPT = StepShape(64, 1, 1, 64, 2048.0)


class Cost:
    """Ten microseconds a token."""

    def step_s(self, shape: StepShape) -> float:
        return 1e-5 * shape.num_tokens


def times(**fields: Any) -> StageTimes:
    return StageTimes("r", 0, 0, **fields)


def audit(cost: Cost | None = None) -> Audit:
    made = Audit({} if cost is None else dict.fromkeys(Role, cost))
    made.join("p0", Role.PREFILL)
    made.join("d0", Role.DECODE)
    return made


def found(made: Audit) -> dict[tuple[str, Stage], StageError]:
    return {(each.worker, each.stage): each for each in made.errors()}


def test_a_first_leg_is_compared_at_the_worker_that_ran_it() -> None:
    made = audit()
    predicted = Predicted(queue_s=0.1, prefill_s=0.2, transfer_s=9.0, decode_step_s=0.01)
    made.leg("p0", predicted, times(queue_s=0.2, prefill_s=0.1), took_over=False)
    errors = found(made)
    assert set(errors) == {("p0", Stage.QUEUE), ("p0", Stage.PREFILL)}
    queue, prefill = errors["p0", Stage.QUEUE], errors["p0", Stage.PREFILL]
    assert (queue.median, queue.ratio, queue.role) == (1.0, 2.0, Role.PREFILL)
    assert (prefill.median, prefill.ratio) == (0.5, 0.5)
    assert (prefill.predicted_s, prefill.measured_s) == (0.2, 0.1)


def test_a_leg_that_took_over_has_a_transfer_and_gaps() -> None:
    made = audit()
    predicted = Predicted(queue_s=9.0, prefill_s=9.0, transfer_s=0.01, decode_step_s=0.01)
    told = times(queue_s=0.5, prefill_s=0.5, import_s=0.02, decode_s=0.3, num_decoded=20)
    made.leg("d0", predicted, told, took_over=True)
    errors = found(made)
    assert set(errors) == {("d0", Stage.TRANSFER), ("d0", Stage.DECODE)}
    assert errors["d0", Stage.TRANSFER].ratio == 2.0
    assert errors["d0", Stage.DECODE].measured_s == pytest.approx(0.015)


def test_a_request_that_stays_has_all_but_a_transfer() -> None:
    made = audit()
    predicted = Predicted(queue_s=0.1, prefill_s=0.1, transfer_s=0.1, decode_step_s=0.1)
    told = times(queue_s=0.1, prefill_s=0.1, decode_s=0.1, num_decoded=1)
    made.leg("p0", predicted, told, took_over=False)
    assert {stage for _, stage in found(made)} == {Stage.QUEUE, Stage.PREFILL, Stage.DECODE}


def test_what_was_not_predicted_is_not_compared() -> None:
    made = audit()
    made.leg("p0", Predicted(), times(queue_s=1.0, prefill_s=1.0), took_over=False)
    assert made.errors() == []


def test_next_to_nothing_is_no_error() -> None:
    made = audit()
    made.leg("p0", Predicted(queue_s=0.0), times(queue_s=0.0009), took_over=False)
    assert found(made)["p0", Stage.QUEUE].median == 0.0
    made.leg("p0", Predicted(queue_s=0.0), times(queue_s=0.004), took_over=False)
    assert found(made)["p0", Stage.QUEUE].p90 == pytest.approx(0.9 * 3)


def test_median_and_tail_of_a_bounded_window() -> None:
    made = audit()
    for i in range(WINDOW + 50):
        # Of the last 256, the 29 youngest are off by 1, the others by 0.1.
        ratio = 2.0 if i >= WINDOW + 21 else 1.1
        made.leg("p0", Predicted(prefill_s=0.1), times(prefill_s=0.1 * ratio), took_over=False)
    (error,) = (each for each in made.errors() if each.stage is Stage.PREFILL)
    assert (error.count, error.num_recent) == (WINDOW + 50, WINDOW)
    assert error.median == pytest.approx(0.1)
    assert error.p90 == pytest.approx(1.0)
    assert error.ratio == pytest.approx(1.1)


def test_steps_are_compared_with_the_cost_model_and_kept() -> None:
    made = audit(Cost())
    made.step("d0", MeasuredStep(DECODE, 6e-5))
    made.step("p0", MeasuredStep(PROMPT, 32e-5))
    errors = found(made)
    assert errors["d0", Stage.DECODE_STEP].ratio == pytest.approx(1.5)
    assert errors["p0", Stage.PROMPT_STEP].ratio == pytest.approx(0.5)
    assert [(each.worker, each.role, each.step.shape) for each in made.steps()] == [
        ("d0", Role.DECODE, DECODE),
        ("p0", Role.PREFILL, PROMPT),
    ]


def test_steps_are_compared_with_the_cost_model_of_their_role() -> None:
    class Dear(Cost):
        def step_s(self, shape: StepShape) -> float:
            return 4 * super().step_s(shape)

    made = Audit({Role.PREFILL: Cost(), Role.DECODE: Dear()})
    for name, role in (("p0", Role.PREFILL), ("d0", Role.DECODE), ("u0", Role.UNIFIED)):
        made.join(name, role)
        made.step(name, MeasuredStep(DECODE, 4e-5))
    ratios = {each.worker: each.ratio for each in made.errors()}
    assert ratios == {"p0": pytest.approx(1.0), "d0": pytest.approx(0.25)}
    assert len(list(made.steps())) == 3  # kept of all, to calibrate with


def test_steps_without_a_cost_model_are_kept_up_to_the_window() -> None:
    made = audit()
    for _ in range(WINDOW + 9):
        made.step("d0", MeasuredStep(DECODE, 1.0))
    assert made.errors() == []
    assert len(list(made.steps())) == WINDOW


@pytest.mark.parametrize(
    "step",
    [
        MeasuredStep(DECODE, 0.0),
        MeasuredStep(DECODE, -1.0),
        MeasuredStep(DECODE, math.nan),
        MeasuredStep(DECODE, math.inf),
        MeasuredStep(msgspec.structs.replace(DECODE, num_tokens=0), 1.0),
        MeasuredStep(msgspec.structs.replace(DECODE, num_tokens=-4), 1.0),
        MeasuredStep(msgspec.structs.replace(DECODE, num_tokens=1 << 62), 1.0),
        MeasuredStep(msgspec.structs.replace(DECODE, kv_tokens=-1), 1.0),
        MeasuredStep(msgspec.structs.replace(DECODE, attention_pairs=math.nan), 1.0),
        MeasuredStep(msgspec.structs.replace(DECODE, attention_pairs=math.inf), 1.0),
    ],
)
def test_no_worker_can_put_nonsense_in(step: MeasuredStep) -> None:
    made = audit(Cost())
    made.step("d0", step)
    assert made.errors() == []
    assert list(made.steps()) == []


@pytest.mark.parametrize("seconds", [math.nan, math.inf])
def test_no_leg_can_put_nonsense_in(seconds: float) -> None:
    made = audit()
    told = times(queue_s=seconds, prefill_s=seconds)
    made.leg("p0", Predicted(queue_s=1.0, prefill_s=1.0), told, took_over=False)
    assert made.errors() == []


def test_what_is_known_of_a_worker_goes_with_it() -> None:
    made = audit(Cost())
    made.step("d0", MeasuredStep(DECODE, 1.0))
    made.leave("d0")
    assert made.errors() == []
    made.step("d0", MeasuredStep(DECODE, 1.0))  # a report that crossed its end
    assert list(made.steps()) == []
    made.join("d0", Role.DECODE)
    made.step("d0", MeasuredStep(DECODE, 1.0))
    assert found(made)["d0", Stage.DECODE_STEP].count == 1


def test_quantiles_lie_between_values() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([1.0, 2.0], 0.75) == 1.75
    assert quantile([5.0], 0.9) == 5.0
