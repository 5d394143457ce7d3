"""`baton plan --from-live`: from what a gateway says to a plan, and what it lacks as a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from plan_worlds import MODEL, offer

from baton.cli.main import main
from baton.config import Config, EngineConfig, LaunchConfig, ModelConfig, PlanConfig, load_config
from baton.core.cost import ChunkShape, Profile, StepShape
from baton.core.step_cost import MeasuredStep
from baton.observe.audit import WorkerStep
from baton.observe.audit_view import AuditView
from baton.observe.events import Waterfall
from baton.observe.plan_watch import Finding, Reason
from baton.planner.profiles import read_profile

URL = "http://127.0.0.1:8001"
PROFILE = msgspec.structs.replace(offer().profile, device="H100")
STEPS = [StepShape.of([ChunkShape(1, 10 * i, True)] * (1 + i % 8)) for i in range(60)] + [
    StepShape.of([ChunkShape(100 + i, 0, True)]) for i in range(40)
]


def view(**changes: Any) -> AuditView:
    """A deployment whose steps take twice as long as its profile says."""
    cost = PROFILE.cost()
    config = Config(
        model=ModelConfig(path="/models/toy"),
        engine=EngineConfig(max_num_batched_tokens=640),
        launch=LaunchConfig(layout="2P1D"),
        plan=PlanConfig(slo="ttft=2s,tpot=80ms", attainment=0.8),
    )
    fields: dict[str, Any] = {
        "config": config,
        "shape": MODEL,
        "profile": PROFILE,
        "findings": [Finding(Reason.RATE_HIGH, 2.0, True, "9 requests/s"),
                     Finding(Reason.ATTAINMENT, 0.5, False, "all is well")],
        "errors": [],
        "steps": [WorkerStep("d0", MeasuredStep(s, 2 * cost.step_s(s))) for s in STEPS],
    }  # fmt: skip
    return AuditView(**fields | changes)


def waterfalls(num: int = 60) -> list[Waterfall]:
    return [
        Waterfall(
            request_id=str(i), choice=0, num_prompt_tokens=200, num_generated_tokens=20,
            received_unix_s=1.7e9 + i * 0.25, ttft_s=0.1, e2e_s=0.5,
        )
        for i in reversed(range(num))
    ]  # fmt: skip


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What it answers, by path."""
    answers: dict[str, Any] = {"/audit": view(), "/requests": waterfalls()}

    def get(url: str, **options: Any) -> httpx.Response:
        request = httpx.Request("GET", url)
        if not url.startswith(URL):
            raise httpx.ConnectError("refused", request=request)
        answer = answers[url.removeprefix(URL)]
        content = answer if isinstance(answer, bytes) else msgspec.json.encode(answer)
        return httpx.Response(200, content=content, request=request)

    monkeypatch.setattr("baton.cli.plan_live.httpx.get", get)
    return answers


def plan(tmp_path: Path, *more: str, url: str = URL) -> int:
    return main([
        "plan", "--from-live", url, "--draws", "2", "--num-requests", "30", "--processes", "1",
        "--budgets", "2048", "--max-devices", "8", "--write", str(tmp_path / "plan.yaml"), *more,
    ])  # fmt: skip


def test_a_plan_from_what_was_measured(
    gateway: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(tmp_path) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith("Verdict: ")
    assert "keep ttft=2s,tpot=80ms" in printed
    assert "Today's 2P1D H100, 640 tokens" in printed
    assert "moving saves $" in printed
    assert "100 measured steps took 2.00 times as long as predicted (median error 100%)" in printed
    assert "The plan that is served is stale: 9 requests/s." in printed
    assert "all is well" not in printed
    config = load_config(tmp_path / "plan.yaml")
    assert config.model.path == "/models/toy"
    assert config.plan.attainment == 0.8
    assert config.plan.prompt_tokens == " ".join(["200"] * 9)
    assert config.plan.rate == pytest.approx(4.0)
    # The errors are now those of the measured steps.
    assert config.plan.decode_step_error is not None
    assert config.plan.decode_step_error < 0.1
    assert config.plan.profile_file == str(tmp_path / "plan.profile.json")
    written = read_profile(Path(config.plan.profile_file))
    for shape in STEPS[::10]:
        assert written.cost().step_s(shape) == pytest.approx(
            2 * PROFILE.cost().step_s(shape), rel=0.05
        )


def test_what_is_given_is_not_asked_for(
    gateway: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway["/audit"] = view(profile=None, steps=[])
    (tmp_path / "p.json").write_bytes(PROFILE.to_json())
    assert plan(
        tmp_path, "--profile", str(tmp_path / "p.json"), "--slo", "ttft=5s", "--today", "4U",
        "--attainment", "0.7", "--rate", "2",
    ) == 0  # fmt: skip
    printed = " ".join(capsys.readouterr().out.split())
    assert "keep ttft=5s" in printed
    assert "Today's 4U H100" in printed
    assert "0 measured steps are too few to recalibrate with" in printed
    assert load_config(tmp_path / "plan.yaml").plan.rate == pytest.approx(2.0)


def test_a_machine_that_is_in_no_list_is_taken_for_one_that_is(
    gateway: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile: Profile = msgspec.structs.replace(PROFILE, device="my box")
    gateway["/audit"] = view(profile=profile)
    assert plan(tmp_path) == 2
    assert "runs on 'my box', whose memory and price are not known here" in capsys.readouterr().err
    assert plan(tmp_path, "--hardware", "Server CPU") == 0
    assert "Today's 2P1D Server CPU" in " ".join(capsys.readouterr().out.split())


def test_further_hardware_is_compared(
    gateway: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(tmp_path, "--hardware", "H100,L4") == 0
    printed = capsys.readouterr().out
    assert "\nL4: $" in printed
    assert printed.count("\nH100: $") == 1


@pytest.mark.parametrize(
    ("path", "answer", "says"),
    [
        ("/audit", view(profile=None), "the deployment has no cost model (plan.profile_file)"),
        ("/audit", view(shape=None), "does not say what it serves: give --model"),
        ("/audit", b"<html>", "is no audit of this version of Baton"),
        ("/audit", b'{"config": 3}', "is no audit of this version of Baton"),
        ("/requests", [], "holds no requests"),
        ("/requests", b'[{"request_id": 3}]', "entry 1"),
    ],
)
def test_what_is_missing_gets_a_sentence(
    gateway: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str,
    answer: Any, says: str,
) -> None:  # fmt: skip
    gateway[path] = answer
    assert plan(tmp_path) in (1, 2)
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "more", "says"),
    [
        ("http://127.0.0.1:9", [], "no gateway answers at http://127.0.0.1:9/audit (refused)"),
        ("127.0.0.1:8001", [], "must begin with http:// or https://"),
        (URL, ["--trace", "t.jsonl"], "--trace and --from-live are two traffics"),
    ],
)
def test_bad_input(
    gateway: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], url: str,
    more: list[str], says: str,
) -> None:  # fmt: skip
    assert plan(tmp_path, *more, url=url) in (1, 2)
    assert says in capsys.readouterr().err


def test_a_deployment_without_a_promise(
    gateway: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway["/audit"] = view(config=Config(launch=LaunchConfig(layout="1U")))
    assert plan(tmp_path) == 2
    assert "a plan needs a promise to keep" in capsys.readouterr().err
