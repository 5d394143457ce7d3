"""One request explained: its placements and why, measured beside predicted, and what else it
might have got.

`explain` needs the decision logs of the run; `from_waterfall` makes what can be told without them.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from baton.core.candidate import Candidate, e2e_s, ttft_s
from baton.core.cost import Profile
from baton.core.decision_log import BadLog
from baton.core.predicted import Predicted
from baton.core.router import Pair
from baton.errors import ConfigError
from baton.observe.events import Waterfall
from baton.planner.explain.history import Attempt, History, Key
from baton.planner.explain.logs import Logs
from baton.planner.explain.reasons import reasons
from baton.planner.explain.what_if import (
    NoTwin,
    Served,
    WhatIf,
    World,
    num_output_tokens,
)
from baton.types import Role, StageTimes

MAX_ALTERNATIVES = 24
"""What is asked of the twin; the router's own candidates first."""


class Part(msgspec.Struct, frozen=True):
    """A stage of the waterfall, in seconds; None: not measured, or not predicted."""

    name: str
    measured_s: float | None
    predicted_s: float | None = None

    @property
    def error(self) -> float | None:
        """Of the prediction, as a share of what was measured."""
        if self.predicted_s is None or not self.measured_s:
            return None
        return self.predicted_s / self.measured_s - 1


class Turn(msgspec.Struct, frozen=True):
    """What the twin says of one candidate. is_chosen: it is the one that was taken."""

    candidate: Candidate
    is_chosen: bool
    served: Served


class Explanation(msgspec.Struct, frozen=True):
    """All that is told of one choice of a request.

    attempts: placements, in order, with their candidates; why: sentences for each of them. parts:
    of the last one. measured: as the gateway saw it; twin: what the twin says, none with the
    reason in `no_twin`. held_out: median error of the cost of steps, by worker. num_before:
    requests that led the twin to the placement.
    """

    request_id: str
    choice: int
    num_prompt_tokens: int
    num_output_tokens: int
    attempts: list[Attempt]
    why: list[list[str]]
    parts: list[Part]
    measured: Served | None = None
    twin: list[Turn] = []
    no_twin: str = ""
    held_out: dict[str, float | None] = {}
    num_before: int = 0
    notes: list[str] = []


def explain(
    logs: Logs, wanted: Key, profiles: Mapping[Role, Profile], max_before: int
) -> Explanation:
    """Explain a request from the logs of its run.

    Raises:
        BadLog: a gateway's log cannot be read.
        BatonError: no log knows the request, or its log begins too late.
    """
    history = logs.history(wanted)
    world = World(history, {}, wanted, profiles)
    no_twin, what_if = "", None
    try:
        world = World(history, logs.facts(history), wanted, profiles)
        what_if = WhatIf(world, max_before)
    except (NoTwin, ConfigError, BadLog) as error:
        no_twin = str(error)
    passed = history.passed.get(wanted)
    num_tokens = num_output_tokens(world, wanted) or _num_told(history, wanted)
    explanation = Explanation(
        *wanted,
        history.attempts[0].num_tokens if passed is None else passed.num_tokens,
        num_tokens,
        history.attempts,
        [reasons(attempt) for attempt in history.attempts],
        _parts(history, wanted, num_tokens),
        no_twin=no_twin,
        notes=_notes(history, world),
    )
    if what_if is None:
        return explanation
    attempt = next(attempt for attempt in history.attempts if attempt.placement)
    return msgspec.structs.replace(
        explanation,
        measured=what_if.measured(),
        twin=_turns(what_if, attempt),
        held_out={
            name: None if error is None else error.median
            for name, error in what_if.held_out.items()
        },
        num_before=what_if.num_before,
    )


def from_waterfall(found: Waterfall) -> Explanation:
    """What happened, as the gateway keeps it of the last requests."""
    took_over = found.prefill_worker is not None
    parts = [
        Part("queue", found.queue_s),
        Part("prefill", found.prefill_s),
        Part("first token", found.ttft_s or None),
    ]
    if took_over:
        parts += [
            Part("export", found.export_s),
            Part("wait to import", found.import_wait_s),
            Part("transfer", found.transfer_s),
        ]
    parts += [Part("decode", found.decode_s), Part("end to end", found.e2e_s)]
    way = found.decode_worker or "nowhere"
    if found.prefill_worker is not None:
        way = f"{found.prefill_worker} > {way}"
    notes = [
        f"placed on {way} at attempt {found.attempt}; work predicted before its first token: "
        f"{found.predicted_tokens:,} prompt tokens"
    ]
    if found.error:
        notes.append(f"it ended in an error: {found.error}")
    return Explanation(
        found.request_id,
        found.choice,
        found.num_prompt_tokens,
        found.num_generated_tokens,
        [],
        [],
        parts,
        no_twin="candidates and other turns are told from decision logs: serve with "
        "--decision-log DIR, and give --logs DIR here",
        notes=notes,
    )


def _turns(what_if: WhatIf, attempt: Attempt) -> list[Turn]:
    """The chosen one first, then the router's others, then what it does not consider."""
    placement = attempt.placement
    assert placement is not None
    chosen = Pair(placement.prefill, placement.decode)

    def order(candidate: Candidate) -> tuple[bool, bool, int, int, str]:
        is_other = Pair(candidate.prefill, candidate.decode) != chosen
        work = candidate.work, candidate.context_tokens, candidate.name
        return is_other, not candidate.considered, *work

    turns = []
    for candidate in sorted(attempt.candidates, key=order)[:MAX_ALTERNATIVES]:
        pair = Pair(candidate.prefill, candidate.decode)
        turns.append(Turn(candidate, pair == chosen, what_if.serve(pair)))
    return turns


def _parts(history: History, wanted: Key, num_tokens: int) -> list[Part]:
    """The waterfall of the last placement; instants are the gateway's, the rest the workers'."""
    passed = history.passed.get(wanted)
    attempt = next((each for each in reversed(history.attempts) if each.placement), None)
    if passed is None or attempt is None or attempt.placement is None:
        return []
    placement = attempt.placement
    legs = {worker: told for worker, told in passed.legs if told.attempt == attempt.number}
    first = legs.get(placement.prefill or placement.decode)
    second = legs.get(placement.decode) if placement.prefill else None
    predicted = placement.predicted
    parts = _first_parts(first, predicted, placement.lender is not None) if first else []
    if attempt.number == 0 and passed.first_token_s is not None:
        measured_s = passed.first_token_s - passed.placed_s
        known = sum(part.measured_s or 0.0 for part in parts)
        if first is not None:
            parts.append(Part("messages, and between steps", max(0.0, measured_s - known)))
        parts.append(Part("first token", measured_s, ttft_s(predicted)))
    if first is not None and placement.prefill:
        parts.append(Part("export", first.export_s))
    if second is not None:
        parts.append(Part("wait to import", second.queue_s))
        parts.append(Part("transfer", second.import_s, predicted.transfer_s))
    last = second if placement.prefill else first
    if last is not None and last.num_decoded:
        step_s = last.decode_s / last.num_decoded
        parts.append(Part("decode, each token", step_s, predicted.decode_step_s))
    if passed.ended_s is not None and attempt.number == 0 and num_tokens:
        whole_s = passed.ended_s - passed.placed_s
        parts.append(Part("end to end", whole_s, e2e_s(predicted, num_tokens)))
    return parts


def _num_told(history: History, wanted: Key) -> int:
    """Tokens of the answer by what the last leg told: one was drawn before it could count."""
    passed = history.passed.get(wanted)
    return 1 + passed.legs[-1][1].num_decoded if passed and passed.legs else 0


def _first_parts(first: StageTimes, predicted: Predicted, borrows: bool) -> list[Part]:
    parts = [Part("queue", first.queue_s, predicted.queue_s)]
    if borrows or first.import_s:
        parts.append(Part("borrowed blocks", first.import_s))
    parts.append(Part("prefill", first.prefill_s, predicted.prefill_s))
    return parts


def _notes(history: History, world: World) -> list[str]:
    measured = {
        (profile.model.name, profile.model.num_layers, facts.config.kv_format.num_layers)
        for name, facts in world.facts.items()
        if (profile := world.profiles.get(history.workers[name].role)) is not None
    }
    return [
        f"the profile is of {model}, which has {theirs} layers, and what was served has {ours}: "
        "the twin's steps cost what those of that model do"
        for model, theirs, ours in sorted(measured)
        if theirs != ours
    ] + [
        f"attempt {each.number}: this version of Baton would decide otherwise than the log says; "
        "what is shown is this version's decision"
        for each in history.attempts
        if not each.replays
    ]
