"""`baton explain` of requests of a real deployment, by the ids that the client got."""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from integration.deployment import Deployment
from integration.runs import EXTRA

from baton.cli.explain import request_id
from baton.planner.explain.explanation import Explanation, explain
from baton.planner.explain.logs import Logs

NUM_REQUESTS, AT_A_TIME = 24, 3
NEAR = 2.0
"""The twin knows of no other process on the cores, and the cores here have others."""


def run_explain(*args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "baton", "explain", *args],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.stderr, done.returncode) == ("", 0)
    return done.stdout


async def ask_all(served: Deployment) -> list[str]:
    """Ids of the answers, in the order of the requests."""
    rng = random.Random(11)
    few = asyncio.Semaphore(AT_A_TIME)
    async with served.async_client() as client:

        async def ask(number: int) -> str:
            prompt = [rng.randrange(256) for _ in range(rng.randrange(150, 500))]
            async with few:
                reply = await client.completions.create(
                    model=served.model,
                    prompt=prompt,
                    max_tokens=40 + number,
                    temperature=0,
                    extra_body=EXTRA,
                )
            return str(reply.id)

        return list(await asyncio.gather(*(ask(number) for number in range(NUM_REQUESTS))))


@pytest.fixture(scope="module")
def explained(
    demo_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], list[dict[str, Any]], Path]:
    """Ids, waterfalls of the gateway by request, and the logs."""
    logs = tmp_path_factory.mktemp("explain")
    flags = (
        "--engine.threads",
        "1",
        "--engine.max-num-batched-tokens",
        "128",
        "--decision-log",
        str(logs),
    )
    with Deployment.start(demo_model, "2P2D", *flags) as served:
        ids = asyncio.run(ask_all(served))
        by_id = {each["request_id"]: each for each in served.requests()}
        live = run_explain(ids[5], "--url", served.admin_url)
        waterfalls = [by_id[request_id(name)] for name in ids]
        assert f"{1000 * waterfalls[5]['ttft_s']:.3g} ms" in live
    return ids, waterfalls, logs


@pytest.mark.timeout(300)
def test_a_request_is_explained_by_the_id_of_its_answer(
    explained: tuple[list[str], list[dict[str, Any]], Path],
) -> None:
    ids, waterfalls, logs = explained
    out = run_explain(ids[12], "--logs", str(logs), "--json", str(logs / "found.json"))
    waterfall = waterfalls[12]
    taken = f"{waterfall['prefill_worker']} > {waterfall['decode_worker']}"
    assert f"\n{taken} * " in out
    found = json.loads((logs / "found.json").read_bytes())
    (attempt,) = found["attempts"]
    assert attempt["replays"]
    assert len(attempt["candidates"]) == 4 + 2
    placement = attempt["placement"]
    assert placement["prefill"] == waterfall["prefill_worker"]
    assert placement["decode"] == waterfall["decode_worker"]
    parts = {part["name"]: part for part in found["parts"]}
    for part, stage in (
        ("queue", "queue_s"),
        ("prefill", "prefill_s"),
        ("first token", "ttft_s"),
        ("export", "export_s"),
        ("wait to import", "import_wait_s"),
        ("transfer", "transfer_s"),
        ("end to end", "e2e_s"),
    ):
        assert parts[part]["measured_s"] == pytest.approx(waterfall[stage], abs=1e-9), part
    # By now both workers have told what a prompt and a token take.
    for part in ("queue", "prefill", "first token", "decode, each token", "end to end"):
        assert parts[part]["predicted_s"] is not None, part
    assert len(found["twin"]) == 6 and found["no_twin"] == ""
    assert found["num_output_tokens"] == waterfall["num_generated_tokens"] == 52


@pytest.mark.timeout(300)
def test_the_twin_is_near_what_was_measured(
    explained: tuple[list[str], list[dict[str, Any]], Path],
) -> None:
    ids, _, logs = explained
    found: list[Explanation] = [
        explain(Logs(logs), (request_id(name), 0), {}, 1000) for name in ids[8:20:2]
    ]
    ratios: dict[str, list[float]] = {"ttft_s": [], "tpot_s": [], "e2e_s": []}
    for each in found:
        assert each.measured is not None and each.measured.num_others >= AT_A_TIME - 1
        (chosen,) = [turn.served for turn in each.twin if turn.is_chosen]
        assert chosen.failure == ""
        for figure, of_all in ratios.items():
            of_all.append(getattr(chosen, figure) / getattr(each.measured, figure))
        assert len(each.held_out) == 4 and any(each.held_out.values())
    for figure, of_all in ratios.items():
        print(figure, [round(each, 2) for each in of_all])
        assert 1 / NEAR < statistics.median(of_all) < NEAR, (figure, of_all)
    # With a prompt on it, a decode worker's answers wait: the twin sees that as well.
    alone = [
        turn.served.others_itl_s
        for each in found
        for turn in each.twin
        if not turn.candidate.prefill
    ]
    split = [
        turn.served.others_itl_s for each in found for turn in each.twin if turn.candidate.prefill
    ]
    assert statistics.mean(filter(None, alone)) > statistics.mean(filter(None, split))
