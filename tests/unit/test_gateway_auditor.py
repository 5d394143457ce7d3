"""What the gateway says of its predictions: once a change, in the log, as metrics and as JSON."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import httpx
import msgspec
import pytest
from plan_worlds import offer
from test_gateway_placement import Harness, begin, delta

from baton.config import Config, PlanConfig
from baton.core.predicted import Predicted
from baton.core.step_cost import MeasuredStep, StepShape
from baton.errors import ConfigError
from baton.gateway.app import create_admin_app
from baton.gateway.auditor import Auditor
from baton.gateway.worker_metrics import export_audit
from baton.observe.audit import Stage
from baton.observe.audit_view import AuditView
from baton.observe.events import Waterfall
from baton.observe.metrics import (
    PLAN_STALE,
    PLAN_STRAIN,
    PREDICTION_ERROR,
    PREDICTION_RATIO,
    PREDICTIONS,
    Metrics,
)
from baton.observe.metrics_docs import REASONS, STAGES
from baton.observe.plan_watch import WINDOW, Reason
from baton.types import FinishReason, Role, StageTimes

PROFILE = offer().profile
DECODE = StepShape(4, 4, 4, 400, 400.0)


def auditor(plan: PlanConfig | None = None) -> Auditor:
    profiles = dict.fromkeys(Role, PROFILE)
    made = Auditor(Config(plan=plan or PlanConfig()), PROFILE.model, profiles)
    made.joined("u0", Role.UNIFIED)
    return made


def ended(count: int, made: Auditor, tokens: int = 100, error: str | None = None) -> None:
    for i in range(count):
        made.finished(
            Waterfall(
                request_id=str(i),
                choice=0,
                num_prompt_tokens=tokens,
                num_generated_tokens=0 if error else 10,
                error=error,
            )
        )


def test_each_change_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    made = auditor(PlanConfig(prompt_tokens="100 " * 9))
    caplog.set_level(logging.INFO)
    now = 0.0

    def seconds(count: int) -> list[str]:
        nonlocal now
        caplog.clear()
        for _ in range(count):
            now += 1.5
            made.tick(now)
        mine = (record for record in caplog.records if record.name == Auditor.__module__)
        return [record.getMessage() for record in mine]

    ended(WINDOW, made)
    assert seconds(5) == []
    ended(WINDOW, made, tokens=4000)
    (said,) = seconds(5)
    assert said.startswith(
        "plan is stale reason=prompt_lengths: the median of the last 300 requests"
    )
    assert said.endswith("baton plan --from-live http://127.0.0.1:8001")
    ended(WINDOW, made)
    (said,) = seconds(5)
    assert said.startswith("plan holds again reason=prompt_lengths: ")


def test_a_tick_is_cheap_until_it_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made = auditor(PlanConfig(prompt_tokens="100 " * 9))
    made.tick(10.0)
    ended(WINDOW, made, tokens=4000)
    made.tick(10.9)
    assert made.findings() == []
    made.tick(11.1)
    assert [each.is_stale for each in made.findings()] == [True]


def test_what_a_request_that_nobody_waited_for_says() -> None:
    made = auditor(PlanConfig(slo="ttft=1s", attainment=0.9))
    left = Waterfall(request_id="r", choice=0, num_prompt_tokens=1, finish="abort")
    for _ in range(WINDOW):
        made.finished(left)
    made.tick(0.0)
    assert made.findings() == []
    ended(WINDOW, made, error="the worker is gone")
    made.tick(2.0)
    assert [(each.reason, each.is_stale) for each in made.findings()] == [(Reason.ATTAINMENT, True)]


def test_errors_as_metrics() -> None:
    made, metrics = auditor(PlanConfig(decode_step_error=0.1)), Metrics()
    predicted_s = PROFILE.cost().step_s(DECODE)
    for ratio in [1.0] * 30 + [1.2] * 30 + [3.0] * 40:
        made.stepped("u0", MeasuredStep(DECODE, predicted_s * ratio))
    made.tick(0.0)
    export_audit(made, metrics)
    step = {"worker": "u0", "stage": "decode_step"}
    assert metrics.value(PREDICTIONS, **step) == 100
    assert metrics.value(PREDICTION_RATIO, **step) == pytest.approx(1.2)
    assert metrics.value(PREDICTION_ERROR, **step, quantile="0.5") == pytest.approx(0.2)
    assert metrics.value(PREDICTION_ERROR, **step, quantile="0.9") == pytest.approx(2.0)
    assert metrics.value(PLAN_STALE, reason="step_error") == 1
    assert metrics.value(PLAN_STRAIN, reason="step_error") == pytest.approx(2.0)
    made.lost("u0")
    made.tick(2.0)
    export_audit(made, metrics)
    text = metrics.exposition().decode()
    assert 'baton_predictions_total{stage="decode_step",worker="u0"} 100.0' in text
    for gauge in (PREDICTION_ERROR, PREDICTION_RATIO, PLAN_STALE, PLAN_STRAIN):
        assert f"{gauge.name}{{" not in text


def test_every_label_is_documented() -> None:
    assert STAGES.keys() == set(Stage)
    assert REASONS.keys() == set(Reason)


def test_the_view_can_be_read_again() -> None:
    made = auditor(PlanConfig(rate=3.0))
    made.stepped("u0", MeasuredStep(DECODE, 0.5))
    app = create_admin_app(metrics=Metrics(), audit=made.view)

    async def ask() -> bytes:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            return (await client.get("/audit")).raise_for_status().content

    view = msgspec.json.decode(asyncio.run(ask()), type=AuditView)
    assert view == made.view()
    assert view.config.plan.rate == 3.0
    assert view.profiles == dict.fromkeys(Role, PROFILE)
    assert [each.step.elapsed_s for each in view.steps] == [0.5]
    assert [each.stage for each in view.errors] == [Stage.DECODE_STEP]


def test_a_profile_that_cannot_be_read(tmp_path: Path) -> None:
    spec = Path(__file__).parents[2] / "models" / "baton-demo"
    missing = Config(plan=PlanConfig(profile_file=str(tmp_path / "none.json")))
    with pytest.raises(ConfigError, match="plan.profile_file: cannot read .*none.json"):
        Auditor.open(missing, spec)
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(ConfigError, match="no profile of this version"):
        Auditor.open(missing, spec)
    (tmp_path / "none.json").write_bytes(PROFILE.to_json())
    made = Auditor.open(missing, spec)
    assert made.view().shape is not None
    assert made.view().profiles == dict.fromkeys(Role, PROFILE)


def test_a_role_may_have_a_profile_of_its_own(tmp_path: Path) -> None:
    spec = Path(__file__).parents[2] / "models" / "baton-demo"
    other = msgspec.structs.replace(PROFILE, notes="on fewer cores")
    for name, profile in (("all.json", PROFILE), ("decode.json", other)):
        (tmp_path / name).write_bytes(profile.to_json())
    plan = PlanConfig(
        profile_file=str(tmp_path / "all.json"),
        decode_profile_file=str(tmp_path / "decode.json"),
        prefill_profile_file="",
    )
    view = Auditor.open(Config(plan=plan), spec).view()
    assert view.profiles == {Role.PREFILL: PROFILE, Role.DECODE: other, Role.UNIFIED: PROFILE}
    own = msgspec.structs.replace(plan, profile_file=None)
    assert Auditor.open(Config(plan=own), spec).view().profiles == {Role.DECODE: other}
    lost = msgspec.structs.replace(plan, decode_profile_file=str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match="plan.decode_profile_file: cannot read .*none.json"):
        Auditor.open(Config(plan=lost), spec)


def test_legs_go_to_the_worker_that_tells_of_them() -> None:
    from baton.core.life import Life
    from baton.core.router import Placement
    from baton.types import Request, SamplingParams

    made = auditor()
    life = Life(Request("r", (1, 2), SamplingParams(4)), 0.0)
    told = StageTimes("r", 0, 0, queue_s=0.1, prefill_s=0.3)
    made.leg("u0", life, told, took_over=False)  # nothing was placed
    assert made.errors() == []
    predicted = Predicted(queue_s=0.1, prefill_s=0.2)
    life.placed(Placement("u0", None, 2, predicted=predicted), 0, "")
    made.leg("u0", life, told, took_over=False)
    found = {each.stage: each.ratio for each in made.errors()}
    assert found == {Stage.QUEUE: 1.0, Stage.PREFILL: pytest.approx(1.5)}


def test_the_dispatcher_tells_of_all_that_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The router learns from the first request what it predicts of the second one."""

    async def serve(here: Harness) -> None:
        tokens = here.read()
        asked = await begin(tokens)
        here.report("u0", deltas=(delta(0),))
        await asked
        told = StageTimes("r", 0, 0, 0.5, 2.0, decode_s=0.1, num_prompt_computed=8, num_decoded=1)
        here.report("u0", times=(told,), deltas=(delta(1, finish=FinishReason.LENGTH),))
        _ = [each async for each in tokens]

    async def run() -> None:
        here = Harness(monkeypatch, "u0")
        await serve(here)
        # An empty queue needs no rate to be predicted by.
        assert [each.stage for each in here.dispatcher.auditor.errors()] == [Stage.QUEUE]
        await serve(here)
        here.report("u0", step=MeasuredStep(DECODE, 0.5))
        found = {each.stage: each for each in here.dispatcher.auditor.errors()}
        assert found.keys() == {Stage.QUEUE, Stage.PREFILL, Stage.DECODE}
        assert found[Stage.DECODE].measured_s == pytest.approx(0.1)
        assert len(here.dispatcher.auditor.view().steps) == 1
        here.lose("u0")
        assert here.dispatcher.auditor.errors() == []

    asyncio.run(run())


def test_the_dispatcher_tells_the_plan_of_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        here = Harness(monkeypatch, "u0")
        told: list[str] = []
        auditor = here.dispatcher.auditor
        monkeypatch.setattr(auditor, "arrived", lambda now: told.append("arrived"))
        monkeypatch.setattr(auditor, "finished", lambda waterfall: told.append(waterfall.finish))
        monkeypatch.setattr(auditor, "tick", lambda now: told.append("tick"))
        tokens = here.read()
        asked = await begin(tokens)
        here.report("u0", deltas=(delta(0, finish=FinishReason.LENGTH),))
        await asked
        await tokens.aclose()  # type: ignore[attr-defined]
        assert told == ["arrived", "length", "tick"]

    asyncio.run(run())
