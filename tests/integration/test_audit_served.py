"""Predicted beside measured in a real deployment: metrics, a plan gone stale, a plan made anew."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from faults.served import SMALL, Victim, make_model, prompt_of
from integration.deployment import Deployment

from baton.cli.main import main
from baton.config import load_config
from baton.core.cost import Coefficients, HeldOut, Profile, model_shape
from baton.model_spec import load_model_spec
from baton.observe.audit import StageError
from baton.observe.audit_view import AuditView
from baton.planner.plan.assumptions import deciles
from baton.planner.profiles import read_profile
from baton.types import Role

SHORT, LONG, ANSWERS = (8, 24), (100, 140), (40, 56)
BATCH = 40
MAX_BATCHES = 40
TWIN = ("--num-requests", "40", "--draws", "2", "--processes", "1", "--budgets", "2048")
SLO = "ttft=30s,tpot=5s"


def _too_fast(model: Path) -> Profile:
    """A machine that computes this model in no time, by a cost model that is sure of it."""
    rates = Coefficients(1e13, 1e12, 1e13, 1e12, step_s=5e-5)
    held_out = (HeldOut("step", 100, 0.05, 0.1, (0.9, 1.0, 1.1)),)
    shape = model_shape(load_model_spec(model), model.name)
    return Profile("baton", "test box", shape, rates, held_out, "made up", "2026-01-01", True)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    home = tmp_path_factory.mktemp("audit")
    model = make_model(home / "org-tiny")
    (home / "wrong.json").write_bytes(_too_fast(model).to_json())
    (home / "plan.yaml").write_text(
        f"""\
plan:
  profile_file: {home / "wrong.json"}
  rate: 0.5
  max_rate: 1.0
  prompt_tokens: {deciles(range(*SHORT))}
  output_tokens: {deciles(range(*ANSWERS))}
  slo: {SLO}
  attainment: 0.9
  prompt_step_error: 0.1
  decode_step_error: 0.1
"""
    )
    flags = ("--config", str(home / "plan.yaml"), "--model.max-model-len", "256")
    with Victim.start(model, "1P1D", *SMALL, *flags) as deployment:
        assert isinstance(deployment, Victim)
        yield deployment


def _send(served: Victim, lengths: tuple[int, int], seed: int) -> None:
    """A batch of requests, four at a time; none begins like another one."""
    rng = random.Random(seed)

    async def run() -> None:
        few = asyncio.Semaphore(4)
        async with served.async_client() as client:

            async def ask(number: int) -> None:
                async with few:
                    await client.completions.create(
                        model=served.model,
                        prompt=prompt_of(rng.randrange(*lengths), number),
                        max_tokens=rng.randrange(*ANSWERS),
                        extra_body={"ignore_eos": True},
                    )

            await asyncio.gather(*(ask(BATCH * seed + i) for i in range(BATCH)))

    asyncio.run(run())


def _audit(served: Deployment) -> AuditView:
    answer = httpx.get(f"{served.admin_url}/audit", timeout=20, trust_env=False)
    return msgspec.json.decode(answer.raise_for_status().content, type=AuditView)


def _metric(served: Deployment, name: str, **labels: str) -> float | None:
    return served.metrics().get((name, tuple(sorted(labels.items()))))


def _errors(served: Deployment) -> dict[tuple[str, str], StageError]:
    return {(each.worker, each.stage.value): each for each in _audit(served).errors}


@pytest.fixture(scope="module")
def short_traffic(served: Victim) -> int:
    """Requests as planned for, but for their rate, until enough steps were told; how many."""
    for seed in range(MAX_BATCHES):
        _send(served, SHORT, seed)
        errors = _errors(served)
        steps = [errors.get(("prefill-0", "prompt_step")), errors.get(("decode-0", "decode_step"))]
        if all(each is not None and each.num_recent >= 60 for each in steps):
            return BATCH * (seed + 1)
    raise AssertionError(f"too few steps were told: {steps}")


def test_every_stage_is_measured_beside_its_prediction(served: Victim, short_traffic: int) -> None:
    errors = _errors(served)
    assert errors.keys() == {
        ("prefill-0", "queue"),
        ("prefill-0", "prefill"),
        ("prefill-0", "prompt_step"),
        ("decode-0", "transfer"),
        ("decode-0", "decode"),
        ("decode-0", "decode_step"),
    }
    for key, each in errors.items():
        assert 0 < each.predicted_s < 1, (key, each)
        assert 0 < each.measured_s < 1, (key, each)
        assert 0 <= each.median <= each.p90, (key, each)
    # What the router has learnt of this very deployment is not far off.
    for key in (("prefill-0", "prefill"), ("decode-0", "decode")):
        assert 0.2 < errors[key].ratio < 5, errors[key]
        # All but the first ones, of which nothing was learnt yet.
        assert 0.5 * short_traffic <= errors[key].count < short_traffic, errors[key]
    # And the profile is far too fast.
    for key in (("prefill-0", "prompt_step"), ("decode-0", "decode_step")):
        assert errors[key].ratio > 1.5, errors[key]
    gap, step = errors["decode-0", "decode"], errors["decode-0", "decode_step"]
    assert 0.2 < step.measured_s / gap.measured_s < 2, (gap, step)


def test_the_errors_are_metrics(served: Victim, short_traffic: int) -> None:
    for (worker, stage), each in _errors(served).items():
        labels = {"worker": worker, "stage": stage}
        assert _metric(served, "baton_predictions_total", **labels) == each.count
        median = _metric(served, "baton_prediction_error_ratio", **labels, quantile="0.5")
        assert median == pytest.approx(each.median)
        ratio = _metric(served, "baton_prediction_measured_ratio", **labels)
        assert ratio == pytest.approx(each.ratio)


def _stale(served: Deployment) -> dict[str, float | None]:
    reasons = ("rate_high", "prompt_lengths", "output_lengths", "attainment", "step_error")
    return {each: _metric(served, "baton_plan_stale", reason=each) for each in reasons}


def test_the_plan_goes_stale_with_the_traffic(served: Victim, short_traffic: int) -> None:
    """The rate and the steps are wrong from the start; the lengths are, when they change."""
    served.wait_for_line("plan is stale reason=rate_high")
    served.wait_for_line("plan is stale reason=step_error")
    as_planned = {"prompt_lengths": 0.0, "output_lengths": 0.0, "attainment": 0.0}
    assert _stale(served) == {"rate_high": 1.0, "step_error": 1.0, **as_planned}
    for seed in range(5):
        _send(served, LONG, 1000 + seed)
    line = served.wait_for_line("plan is stale reason=prompt_lengths")
    assert "planned for 15.5" in line
    assert f"baton plan --from-live {served.admin_url}" in line
    assert _stale(served)["prompt_lengths"] == 1.0
    assert _stale(served)["output_lengths"] == 0.0
    for reason in ("rate_high", "step_error", "prompt_lengths"):
        assert served.output.count(f"plan is stale reason={reason}") == 1
    assert "plan is stale reason=output_lengths" not in served.output


def test_a_plan_from_what_was_measured(
    served: Victim, short_traffic: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.yaml"
    code = main([
        "plan", "--from-live", served.admin_url, "--hardware", "Server CPU", "--max-devices", "4",
        "--write", str(file), *TWIN,
    ])  # fmt: skip
    printed = " ".join(capsys.readouterr().out.split())
    assert code == 0, printed
    assert "Verdict: stay unified: 1U Server CPU" in printed
    assert "Today's 1P1D Server CPU" in printed and "moving saves $" in printed
    for role in ("prefill", "decode"):
        assert f"measured steps of {role} workers took" in printed
    assert "The plan that is served is stale: " in printed
    plan = load_config(file).plan
    assert plan.slo == SLO
    assert plan.profile_file is not None
    view = _audit(served)
    before = _off(view, view.profiles[Role.DECODE])
    after = _off(view, read_profile(Path(plan.profile_file)))
    assert after < 0.5 < before, (before, after)
    assert plan.decode_step_error is not None and plan.decode_step_error > 0


def _off(view: AuditView, profile: Profile) -> float:
    """The median of |measured / predicted - 1| over the steps that were told."""
    cost: Any = profile.cost(view.shape)
    errors = [abs(e.step.elapsed_s / cost.step_s(e.step.shape) - 1) for e in view.steps]
    return sorted(errors)[len(errors) // 2]
