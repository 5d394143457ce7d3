"""`baton plan --from-live`: from what a gateway says to a plan, and what it lacks as a sentence."""

from __future__ import annotations

import json
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
from baton.observe.block_ids import BlockIds
from baton.observe.events import Waterfall
from baton.observe.plan_watch import Finding, Reason
from baton.planner.profiles import read_profile
from baton.types import Role

URL = "http://127.0.0.1:8001"
PROFILE = msgspec.structs.replace(offer().profile, device="H100")
STEPS = [StepShape.of([ChunkShape(1, 10 * i, True)] * (1 + i % 8)) for i in range(60)] + [
    StepShape.of([ChunkShape(100 + i, 0, True)]) for i in range(40)
]


def told(worker: str, role: Role, shape: StepShape, factor: float) -> WorkerStep:
    """A step that took so many times as long as the profile says."""
    return WorkerStep(worker, role, MeasuredStep(shape, factor * PROFILE.cost().step_s(shape)))


def view(**changes: Any) -> AuditView:
    """A deployment whose steps take twice as long as its profile says."""
    config = Config(
        model=ModelConfig(path="/models/toy"),
        engine=EngineConfig(max_num_batched_tokens=640),
        launch=LaunchConfig(layout="2P1D"),
        plan=PlanConfig(slo="ttft=2s,tpot=80ms", attainment=0.8),
    )
    fields: dict[str, Any] = {
        "config": config,
        "shape": MODEL,
        "profiles": dict.fromkeys(Role, PROFILE),
        "findings": [Finding(Reason.RATE_HIGH, 2.0, True, "9 requests/s"),
                     Finding(Reason.ATTAINMENT, 0.5, False, "all is well")],
        "errors": [],
        "steps": [told("d0", Role.DECODE, s, 2.0) for s in STEPS[:60]]
        + [told("p0", Role.PREFILL, s, 2.0) for s in STEPS[60:]],
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
    for says in ("40 measured steps of prefill workers", "60 measured steps of decode workers"):
        assert f"{says} took 2.00 times as long as predicted (median error 100%)" in printed
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
    (written,) = (read_profile(Path(file)) for file in set(config.plan.profile_files().values()))
    for shape in STEPS[::10]:
        assert written.cost().step_s(shape) == pytest.approx(
            2 * PROFILE.cost().step_s(shape), rel=0.05
        )


def test_roles_that_cost_unlike_are_planned_and_written_apart(
    gateway: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps of decode workers take 8 times as long: only what was split from prompts shows it."""
    rows = [told("p0", Role.PREFILL, s, 1.0) for s in STEPS[60:]]
    rows += [told("d0", Role.DECODE, s, 8.0) for s in STEPS[:60]]
    gateway["/audit"] = view(steps=rows)
    plan(tmp_path, "--json", str(tmp_path / "plan.json"))
    printed = " ".join(capsys.readouterr().out.split())
    assert "H100, prefill workers: cost model: " in printed
    assert "H100, decode workers: cost model: " in printed
    found = json.loads((tmp_path / "plan.json").read_text())
    today = found["today"]["arithmetic"]["tpot_s"]
    gateway["/audit"] = view(steps=[*rows[:40], *(told("d0", Role.DECODE, s, 1.0) for s in STEPS)])
    plan(tmp_path, "--json", str(tmp_path / "plan.json"))
    quick = json.loads((tmp_path / "plan.json").read_text())["today"]["arithmetic"]["tpot_s"]
    assert today > 5 * quick


def test_unlike_profiles_by_role_are_todays_devices(
    gateway: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = msgspec.structs.replace(PROFILE, device="L40S")
    gateway["/audit"] = view(profiles={Role.PREFILL: PROFILE, Role.DECODE: slow}, steps=[])
    assert plan(tmp_path) in (0, 1)
    printed = " ".join(capsys.readouterr().out.split())
    assert "Today's 2P1D H100 > L40S" in printed


def prefixed(ids: BlockIds, num: int = 60) -> list[Waterfall]:
    """Prompts that have all but their last 8 tokens in common."""
    found = waterfalls(num)
    for each in found:
        each.block_size, each.num_cached_tokens = 16, 150
        each.prompt_blocks = ids.of([b"the same %d" % i for i in range(200 // 16)])
    return found


def test_prompts_that_begin_alike_are_planned_as_such(
    gateway: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway["/requests"] = prefixed(BlockIds())
    plan(tmp_path)
    printed = " ".join(capsys.readouterr().out.split())
    # All but the first: 59/60 of 192 in 200 tokens.
    assert (
        "94% of the prompt tokens begin as those of an earlier request do, and the plan counts "
        "with it; today's caches spared 75%."
    ) in printed
    written = (tmp_path / "plan.yaml").read_text()
    assert "94% of the prompt tokens begin as those" in written


def test_what_is_not_known_of_sharing_is_said(
    gateway: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = waterfalls()
    for each in found:
        each.num_cached_tokens = 50
    gateway["/requests"] = found
    plan(tmp_path)
    printed = " ".join(capsys.readouterr().out.split())
    assert "today's caches spared 25% of the prompt tokens, but which prompts begin" in printed
    assert "takes every prompt for new" in printed


def test_what_is_given_is_not_asked_for(
    gateway: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway["/audit"] = view(profiles={}, steps=[])
    (tmp_path / "p.json").write_bytes(PROFILE.to_json())
    assert plan(
        tmp_path, "--profile", str(tmp_path / "p.json"), "--slo", "ttft=5s", "--today", "4U",
        "--attainment", "0.7", "--rate", "2",
    ) == 0  # fmt: skip
    printed = " ".join(capsys.readouterr().out.split())
    assert "keep ttft=5s" in printed
    assert "Today's 4U H100" in printed
    assert "0 measured steps of unified" not in printed
    assert "0 measured steps of decode workers are too few to recalibrate with" in printed
    assert "left out" not in printed
    assert load_config(tmp_path / "plan.yaml").plan.rate == pytest.approx(2.0)
    gateway["/audit"] = view(steps=[told("u0", Role.UNIFIED, STEPS[0], 1.0)])
    plan(tmp_path)
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 measured steps are of workers that 2P1D has none of: left out." in printed


def test_a_machine_that_is_in_no_list_is_taken_for_one_that_is(
    gateway: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile: Profile = msgspec.structs.replace(PROFILE, device="my box")
    gateway["/audit"] = view(profiles=dict.fromkeys(Role, profile))
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
        ("/audit", view(profiles={}), "prefill workers have no cost model (plan.profile_file)"),
        ("/audit", view(shape=None), "does not say what it serves: give --model"),
        ("/audit", b"<html>", "is no audit of this version of Baton"),
        ("/audit", b'{"config": 3}', "is no audit of this version of Baton"),
        ("/requests", [], "holds no requests"),
        ("/requests", b'[{"request_id": 3}]', "entry 1"),
        (
            "/requests",
            [msgspec.structs.replace(waterfalls(1)[0], block_size=16, prompt_blocks=bytes(91))],
            "entry 1: 13 blocks of block_size 16 are no beginning of 200 prompt tokens",
        ),
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
