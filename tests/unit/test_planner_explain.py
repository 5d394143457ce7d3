"""Explaining a request from decision logs, against runs in which every turn can be looked up."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from explain_worlds import chat, rewrite, serve_logged, serve_pinned
from twin_worlds import Linear, deployment

from baton.cli.main import main
from baton.core import decision_log as log
from baton.core.candidate import Candidate
from baton.core.cost import ChunkShape, StepShape
from baton.core.predicted import Predicted
from baton.core.router import Pair, Placement, Router
from baton.errors import BatonError, ConfigError
from baton.observe.events import Waterfall
from baton.observe.results import RequestResult
from baton.planner.calibrate import Observation
from baton.planner.explain import what_if
from baton.planner.explain.explanation import Explanation, explain
from baton.planner.explain.facts import MAX_KEPT, Thinned
from baton.planner.explain.history import Attempt
from baton.planner.explain.logged_cost import fit_logged
from baton.planner.explain.logs import Logs
from baton.planner.explain.reasons import reasons
from baton.twin.failures import Failure
from baton.twin.workload import TraceRequest
from baton.types import Role

WANTED = 20
PLENTY = 1000
EXACT = {"rel": 0.03}


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    return tmp_path / "decisions"


@pytest.fixture
def run(logs: Path, monkeypatch: pytest.MonkeyPatch) -> list[RequestResult]:
    """40 requests on 2P2D, with their logs."""
    return serve_logged(monkeypatch, logs, deployment(2, 2), chat())


def told(logs: Path, number: int = WANTED, max_before: int = PLENTY) -> Explanation:
    return explain(Logs(logs), (f"r{number}", 0), {}, max_before)


def placements(logs: Path) -> dict[tuple[str, int], Pair]:
    """Where everybody went."""
    found = {}
    for key, each in Logs(logs).history((f"r{WANTED}", 0)).passed.items():
        (placement,) = each.placements
        found[key] = Pair(placement.prefill, placement.decode)
    return found


# What was decided, and what happened --------------------------------------------------------------


def test_candidates_are_all_pairs_and_the_taken_one_is_as_it_was(
    logs: Path, run: list[RequestResult]
) -> None:
    found = told(logs)
    (attempt,) = found.attempts
    assert [each.name for each in attempt.candidates] == [
        "prefill-0 > decode-0",
        "prefill-0 > decode-1",
        "prefill-1 > decode-0",
        "prefill-1 > decode-1",
        "decode-0",
        "decode-1",
    ]
    assert [each.considered for each in attempt.candidates] == [True] * 4 + [False] * 2
    assert attempt.placement is not None and attempt.replays
    taken = (attempt.placement.prefill, attempt.placement.decode)
    (chosen,) = [each for each in attempt.candidates if (each.prefill, each.decode) == taken]
    assert chosen.predicted == attempt.placement.predicted
    assert chosen.work == attempt.placement.predicted_tokens
    assert chosen.work == min(each.work for each in attempt.candidates if each.considered)
    assert None not in msgspec.structs.astuple(chosen.predicted), "the rates are learned by now"


def test_the_waterfall_adds_up_to_what_the_client_saw(logs: Path, run: list[RequestResult]) -> None:
    real, found = run[WANTED], told(logs)
    parts = {part.name: part for part in found.parts}
    # The client's clock is the gateway's, and sees the last token when it was drawn.
    assert parts["first token"].measured_s == pytest.approx(real.ttft_s, abs=1e-6)
    assert parts["end to end"].measured_s == pytest.approx(real.e2e_s, abs=0.002)
    first = [parts[name].measured_s for name in ("queue", "prefill", "messages, and between steps")]
    assert sum(each or 0.0 for each in first) == pytest.approx(real.ttft_s)
    assert (found.num_prompt_tokens, found.num_output_tokens) == (
        real.prompt_tokens,
        real.output_tokens,
    )
    step = parts["decode, each token"]
    assert step.measured_s == pytest.approx(real.tpot_s, rel=0.2)
    assert step.error is not None and abs(step.error) < 0.5
    assert parts["end to end"].predicted_s is not None


def test_every_request_of_the_run_is_measured_on_the_workers_it_was_placed_on(
    logs: Path, run: list[RequestResult]
) -> None:
    history = Logs(logs).history((f"r{WANTED}", 0))
    assert len(history.passed) == len(run)
    for passed in history.passed.values():
        (placement,) = passed.placements
        assert [worker for worker, _ in passed.legs] == [placement.prefill, placement.decode]


# Other turns --------------------------------------------------------------------------------------


def test_the_twin_agrees_with_what_each_turn_really_does(
    logs: Path, run: list[RequestResult]
) -> None:
    """The costs are fitted to the logs, nothing else is told; the truth is another real run."""
    found = told(logs)
    assert found.no_twin == "" and found.measured is not None
    where = placements(logs)
    before = {key: pair for number, (key, pair) in enumerate(where.items()) if number < WANTED}
    assert len(found.twin) == 6
    for turn in found.twin:
        pair = Pair(turn.candidate.prefill, turn.candidate.decode)
        really = serve_pinned(deployment(2, 2), chat(), {**before, (f"r{WANTED}", 0): pair})[WANTED]
        assert turn.served.ttft_s == pytest.approx(really.ttft_s, **EXACT), turn.candidate.name
        assert turn.served.tpot_s == pytest.approx(really.tpot_s, **EXACT), turn.candidate.name
        assert turn.served.e2e_s == pytest.approx(really.e2e_s, **EXACT), turn.candidate.name
    whole = {round(turn.served.e2e_s or 0.0, 2) for turn in found.twin}
    assert len(whole) > 1, "the turns are told apart"
    (chosen,) = [turn.served for turn in found.twin if turn.is_chosen]
    assert found.twin[0].served == chosen
    assert chosen.num_others == found.measured.num_others > 0
    assert chosen.others_itl_s == pytest.approx(found.measured.others_itl_s, rel=0.05)
    assert chosen.others_ttft_s == pytest.approx(found.measured.others_ttft_s, rel=0.05)


def test_a_prompt_on_a_decode_worker_is_seen_to_hold_up_those_who_decode_there(
    logs: Path, run: list[RequestResult]
) -> None:
    found = told(logs)
    itl = {turn.candidate.name: turn.served.others_itl_s or 0.0 for turn in found.twin}
    split = min(itl[turn.candidate.name] for turn in found.twin if turn.candidate.prefill)
    assert max(itl["decode-0"], itl["decode-1"]) > split


def test_the_history_of_the_twin_can_be_cut_at_a_moment_of_rest(
    logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gap = [msgspec.structs.replace(each, arrival_s=each.arrival_s + 60) for each in chat(10)]
    trace = [*chat(10), *gap]
    serve_logged(monkeypatch, logs, deployment(1, 1), trace)
    everything, little, none = (told(logs, 15, most) for most in (PLENTY, 5, 0))
    assert everything.num_before == 15
    assert little.num_before == 5, "the earliest moment of rest that is not too far back"
    assert none.num_before <= 5
    assert everything.measured is not None and everything.measured.ttft_s is not None
    ttft_s = everything.measured.ttft_s
    assert everything.twin[0].served.ttft_s == pytest.approx(ttft_s, rel=0.05)
    # The prompts of the first half are those of the second: what it does not see is not cached.
    for each in (little, none):
        assert each.twin[0].served.ttft_s > 1.2 * ttft_s  # type: ignore[operator]


def test_unified_workers_have_themselves_for_candidates(
    logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_logged(monkeypatch, logs, deployment(1, 1, 1), chat(12))
    found = told(logs, 6)
    names = [each.name for each in found.attempts[0].candidates]
    assert names == ["unified-0", "prefill-0 > decode-0", "decode-0"]
    assert len(found.twin) == 3
    assert "the least work before the first token" in found.why[0][0]


def test_a_worker_that_goes_leaves_attempts_but_no_other_turns(
    logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = [TraceRequest(0.1 * i, 300, 60) for i in range(8)]
    failures = [Failure.parse("kill:decode-0@0.5")]
    serve_logged(monkeypatch, logs, deployment(1, 2), trace, failures=failures)
    again = [found for i in range(8) if len((found := told(logs, i)).attempts) > 1]
    assert again
    for found in again:
        first, second = found.attempts
        assert (first.number, second.number) == (0, 1)
        assert second.placed_s > first.placed_s
        assert {each.decode for each in first.candidates} == {"decode-0", "decode-1"}
        assert {each.decode for each in second.candidates} == {"decode-1"}
        assert found.no_twin.startswith("decode-0 went") and not found.twin
        assert len(found.why) == 2


def test_a_second_attempt_is_not_in_its_own_way(
    logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [Failure.parse("kill:prefill-0@0.02")]
    serve_logged(monkeypatch, logs, deployment(2, 1), [TraceRequest(0, 300, 9)], failures=failures)
    first, second = told(logs, 0).attempts
    assert first.placement is not None and first.placement.prefill == "prefill-0"
    (only,) = [each for each in second.candidates if each.considered]
    assert (only.name, only.context_tokens, only.num_requests) == ("prefill-1 > decode-0", 0, 0)


def test_the_twin_starts_after_the_last_worker_came(
    logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = [TraceRequest(at, 300, 9) for at in (0, 1, 2, 30, 31, 32)]
    failures = [Failure.parse("kill:decode-0@5")]
    serve_logged(monkeypatch, logs, deployment(1, 2), trace, failures=failures)
    assert told(logs, 5).num_before == 2
    assert told(logs, 2).num_before == 2, "what comes later is nothing to it"


def test_earlier_requests_go_where_they_went_and_later_ones_where_they_are_sent(
    logs: Path, run: list[RequestResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[tuple[str, int], Pair]] = []

    def router(pinned: dict[tuple[str, int], Pair]) -> Router:
        seen.append(pinned)
        return Router(pinned)

    monkeypatch.setattr(what_if, "Router", router)
    found = told(logs)
    where = list(placements(logs).values())
    assert len(seen) == len(found.twin)
    for pinned, turn in zip(seen, found.twin, strict=True):
        assert list(pinned.values())[:-1] == where[:WANTED][-found.num_before :]
        assert pinned[f"r{WANTED}/0", 0] == (turn.candidate.prefill, turn.candidate.decode)


def test_a_profile_takes_the_place_of_the_logged_steps(
    logs: Path, run: list[RequestResult], tmp_path: Path
) -> None:
    from test_twin_cli import MODEL, RATES

    from baton.core.cost import Profile

    slow = Profile("baton", "test", MODEL, RATES, (), "by hand", "2026-01-01", False)
    found = explain(Logs(logs), (f"r{WANTED}", 0), dict.fromkeys(Role, slow), PLENTY)
    assert not found.held_out
    assert found.twin[0].served != told(logs).twin[0].served


def test_a_profile_of_some_roles_and_of_another_model(logs: Path, run: list[RequestResult]) -> None:
    from test_twin_cli import MODEL, RATES

    from baton.core.cost import Profile

    model = msgspec.structs.replace(MODEL, name="other", num_layers=77)
    other = Profile("baton", "test", model, RATES, (), "by hand", "2026-01-01", False)
    wanted = (f"r{WANTED}", 0)
    found = explain(Logs(logs), wanted, {Role.PREFILL: other}, PLENTY)
    assert not found.twin
    assert found.no_twin.startswith("decode workers have no profile: give --profile FILE for all")
    (note,) = explain(Logs(logs), wanted, dict.fromkeys(Role, other), PLENTY).notes
    assert note.startswith("the profile is of other, which has 77 layers, and what was served has ")


def test_of_a_very_long_log_an_even_part_is_kept() -> None:
    thinned: Thinned[int] = Thinned()
    for i in range(10 * MAX_KEPT):
        thinned.put(i)
    assert MAX_KEPT / 2 <= len(thinned.kept) <= MAX_KEPT
    gaps = {b - a for a, b in pairwise(thinned.kept)}
    assert gaps == {16} and thinned.kept[0] == 0
    assert thinned.kept[-1] >= 10 * MAX_KEPT - 16


# Steps' costs -------------------------------------------------------------------------------------


def steps(scale: float, *, prompts: bool, decodes: bool) -> list[Observation]:
    shapes = []
    if prompts:
        shapes += [StepShape.of([ChunkShape(n, c, True)]) for n in (32, 64, 256) for c in (0, 500)]
    if decodes:
        shapes += [
            StepShape.of([ChunkShape(1, c, True)] * n) for n in (1, 2, 4, 8) for c in (50, 400)
        ]
    return [
        Observation(shape, scale * Linear().step_s(shape), "step", shape) for shape in shapes * 6
    ]


def test_costs_are_found_and_what_a_worker_never_ran_is_taken_from_the_others() -> None:
    prompt = StepShape.of([ChunkShape(200, 0, True)])
    token = StepShape.of([ChunkShape(1, 300, True)] * 3)
    found = fit_logged(
        {"p": steps(1.0, prompts=True, decodes=False), "d": steps(1.0, prompts=False, decodes=True)}
    )
    for worker in ("p", "d"):
        cost, error = found[worker]
        assert cost.step_s(prompt) == pytest.approx(Linear().step_s(prompt), rel=0.1)
        assert cost.step_s(token) == pytest.approx(Linear().step_s(token), rel=0.1)
        assert error is not None and error.median < 0.05


def test_each_worker_has_its_own_pace() -> None:
    both = {"prompts": True, "decodes": True}
    found = fit_logged({"slow": steps(3.0, **both), "fast": steps(1.0, **both)})
    token = StepShape.of([ChunkShape(1, 300, True)] * 3)
    slow, fast = (found[name][0].step_s(token) for name in ("slow", "fast"))
    assert slow / fast == pytest.approx(3.0, rel=0.1)


def test_a_few_wild_steps_count_in_the_total_and_do_not_bend_the_shape() -> None:
    own = [
        msgspec.structs.replace(each, seconds=each.seconds * (20 if number % 10 == 0 else 1))
        for number, each in enumerate(steps(1.0, prompts=True, decodes=True))
    ]
    cost, _ = fit_logged({"w": own})["w"]
    total = sum(each.seconds for each in own)
    assert sum(cost.step_s(each.shape) for each in own) == pytest.approx(total)
    prompt = StepShape.of([ChunkShape(200, 0, True)])
    token = StepShape.of([ChunkShape(1, 300, True)] * 3)
    ratio = Linear().step_s(prompt) / Linear().step_s(token)
    assert cost.step_s(prompt) / cost.step_s(token) == pytest.approx(ratio, rel=0.1)


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match="too few"):
        fit_logged({"p": steps(1.0, prompts=True, decodes=False)[:5]})


# Reasons ------------------------------------------------------------------------------------------


def attempt(*candidates: Candidate, placement: Placement | None) -> Attempt:
    return Attempt(0, 0.0, 10, candidates, placement, "" if placement else "nobody is there", True)


def test_reasons_name_what_was_compared() -> None:
    found = reasons(
        attempt(
            Candidate("p0", "d0", queue_tokens=5, prefill_tokens=10, context_tokens=70),
            Candidate("p1", "d0", queue_tokens=0, prefill_tokens=10, context_tokens=70),
            Candidate(None, "d0", considered=False),
            placement=Placement("d0", "p1", 10, lender="p0", first_lent=2),
        )
    )
    assert found == [
        "p1: the least work before the first token: 10 prompt tokens (p0 15)",
        "d0: nobody else could; context to keep: 70 tokens",
        "p0 is asked to lend the prompt's blocks from number 2 on: fetching them is taken to be "
        "faster than computing",
    ]


def test_reasons_tell_of_ties_and_refusals() -> None:
    tie = [Candidate(None, f"u{n}", prefill_tokens=10) for n in range(7)]
    (said,) = reasons(attempt(*tie, placement=Placement("u0", None, 10)))
    assert "no less work" in said and "and 2 more" in said
    assert said.endswith("; of equals fewer requests, then the name")
    assert reasons(attempt(placement=None)) == ["refused: nobody is there"]
    unified = [Candidate("p0", "d0", prefill_tokens=20), Candidate(None, "u0", prefill_tokens=10)]
    said_too = reasons(attempt(*unified, placement=Placement("u0", None, 10)))
    assert said_too[1:] == ["u0 answers it as well: no handoff"]
    even = [Candidate("p0", "d0", prefill_tokens=10), Candidate(None, "u0", prefill_tokens=10)]
    assert (
        "of equals a pair before a unified worker, "
        in reasons(attempt(*even, placement=Placement("d0", "p0", 10)))[0]
    )


# What cannot be told ------------------------------------------------------------------------------


def fails(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(["explain", *args]) in (1, 2)
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.startswith("baton explain: ") and out.err.count("\n") == 1
    return out.err


def test_unknown_requests_and_missing_logs_are_told_apart(
    logs: Path, run: list[RequestResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "knows request cafe.0:" in fails(capsys, "cmpl-cafe", "--logs", str(logs))
    assert "choice 3" in fails(capsys, "r3", "--choice", "3", "--logs", str(logs))
    (tmp_path / "empty").mkdir()
    for nothing in ("empty", "nowhere"):
        said = fails(capsys, "r3", "--logs", str(tmp_path / nothing))
        assert "--decision-log DIR" in said
    assert "give --logs or --url" in fails(capsys, "r3", "--logs", "x", "--url", "http://y")
    assert "must begin with http" in fails(capsys, "r3", "--url", "y")


def test_damage_is_told_with_the_file(
    logs: Path, run: list[RequestResult], capsys: pytest.CaptureFixture[str]
) -> None:
    file = logs / "gateway.log"
    whole = file.read_bytes()
    file.write_bytes(whole[:400] + b"\xff\xff\xff\x7f" + whole[404:])
    assert "gateway.log: " in fails(capsys, "r20", "--logs", str(logs))
    file.write_bytes(b"nonsense" * 20)
    assert "gateway.log: " in fails(capsys, "r20", "--logs", str(logs))


def test_a_log_that_begins_after_the_request_says_so(
    logs: Path, run: list[RequestResult], capsys: pytest.CaptureFixture[str]
) -> None:
    def without(record: Any) -> Any:
        is_it = isinstance(record, log.Placed) and record.request_id == "r20"
        return None if is_it else record

    rewrite(logs / "gateway.log", without)
    assert "begins after request r20 was placed" in fails(capsys, "r20", "--logs", str(logs))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda logs: (logs / "prefill-0-1.log").unlink(), "there is no log of prefill-0"),
        (lambda logs: _later_start(logs / "decode-1-1.log"), "are of other starts than the one"),
        (lambda logs: _damaged(logs / "decode-0-1.log"), "decode-0-1.log: "),
        (lambda logs: _otherwise(logs / "decode-0-1.log"), "does not replay: "),
        (lambda logs: _another_plan(logs / "decode-0-1.log"), "another step would be planned"),
    ],
)
def test_without_a_workers_log_the_rest_is_told_all_the_same(
    logs: Path, run: list[RequestResult], spoil: Any, reason: str
) -> None:
    spoil(logs)
    found = told(logs)
    assert reason in found.no_twin and not found.twin
    assert found.num_output_tokens == run[WANTED].output_tokens
    assert {part.name for part in found.parts} >= {"queue", "first token", "transfer", "end to end"}


def _later_start(file: Path) -> None:
    header, records = log.read(file.read_bytes())
    assert isinstance(header, log.WorkerHeader)
    moved = [msgspec.structs.replace(header, epoch=header.epoch + 1), *records]
    file.write_bytes(b"".join(map(log.frame, moved)))


def _damaged(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] + b"\xff" * 8 + data[len(data) // 2 + 8 :])


def _otherwise(file: Path) -> None:
    header, records = log.read(file.read_bytes())
    assert isinstance(header, log.WorkerHeader)
    config = msgspec.structs.replace(header.config, max_num_seqs=1)
    changed = [msgspec.structs.replace(header, config=config), *records]
    file.write_bytes(b"".join(map(log.frame, changed)))


def _another_plan(file: Path) -> None:
    def changed(record: Any) -> Any:
        if isinstance(record, log.Scheduled):
            return msgspec.structs.replace(record, decision=bytes(8))
        return record

    rewrite(file, changed)


def test_a_request_that_has_not_ended_has_no_other_turns(
    logs: Path, run: list[RequestResult]
) -> None:
    def cut(record: Any) -> Any:
        return None if isinstance(record, log.Finished) else record

    rewrite(logs / "gateway.log", cut)
    found = told(logs)
    assert "ends before the request does" in found.no_twin
    assert "end to end" not in {part.name for part in found.parts}


def test_another_decision_than_the_logs_is_noted(logs: Path, run: list[RequestResult]) -> None:
    def changed(record: Any) -> Any:
        if isinstance(record, log.Placed) and record.request_id == "r20":
            return msgspec.structs.replace(record, decision=bytes(8))
        return record

    rewrite(logs / "gateway.log", changed)
    assert "would decide otherwise" in told(logs).notes[0]


# The command --------------------------------------------------------------------------------------


def test_prints_tables_and_json(
    logs: Path, run: list[RequestResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", "r20", "--logs", str(logs), "--json", str(tmp_path / "x")]) == 0
    out = capsys.readouterr().out
    for words in (
        "Request r20:",
        "prefill-0 > decode-1",
        "What happened",
        "What the twin says",
        "measured",
        "the twin's own error",
        "others were under way",
    ):
        assert words in out
    assert max(map(len, out.splitlines())) <= 100
    (taken,) = {line.split(" *")[0] for line in out.splitlines() if " * " in line}
    document = json.loads((tmp_path / "x").read_bytes())
    placement = document["attempts"][0]["placement"]
    assert taken == f"{placement['prefill']} > {placement['decode']}"
    assert len(document["twin"]) == 6
    assert main(["explain", "r20", "--logs", str(logs), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == document


def test_the_running_gateway_tells_the_waterfall(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = Waterfall(
        request_id="abc.1",
        choice=0,
        num_prompt_tokens=9,
        num_generated_tokens=5,
        prefill_worker="prefill-0",
        decode_worker="decode-1",
        queue_s=1.25,
        transfer_s=0.022,
        decode_s=0.033,
        ttft_s=0.044,
        e2e_s=0.055,
    )

    def get(url: str, **_: object) -> httpx.Response:
        assert url == "http://127.0.0.1:8001/requests"
        body = msgspec.json.encode([kept])
        return httpx.Response(200, content=body, request=httpx.Request("GET", url))

    monkeypatch.setattr(httpx, "get", get)
    assert main(["explain", "chatcmpl-abc.1"]) == 0
    out = capsys.readouterr().out
    for words in (
        "prefill-0 > decode-1",
        "1.25 s",
        "22 ms",
        "33 ms",
        "44 ms",
        "55 ms",
        "--logs DIR",
    ):
        assert words in out
    assert "no request abc.0 among the last 1" in fails(capsys, "chatcmpl-abc")


def test_a_gateway_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "admin listener" in fails(capsys, "abc", "--url", "http://127.0.0.1:1")


def test_predictions_are_none_until_something_was_learned(
    logs: Path, run: list[RequestResult]
) -> None:
    placement = told(logs, 0).attempts[0].placement
    assert placement is not None
    # Nothing is ahead of it, and that takes no time whatever the rates.
    assert placement.predicted == Predicted(queue_s=0.0)


def test_bad_numbers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "whole numbers" in fails(capsys, "abc", "--history", "-1")
    assert issubclass(log.BadLog, BatonError)
