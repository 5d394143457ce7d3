"""Why the router placed a request as it did, in sentences, from what it had to choose between."""

from __future__ import annotations

from collections.abc import Mapping

from baton.core.candidate import Candidate
from baton.core.router import Placement
from baton.planner.explain.history import Attempt

MAX_NAMED = 4
"""Rivals that are named; the others are counted."""


def reasons(attempt: Attempt) -> list[str]:
    """One sentence for each decision of one placement."""
    placement = attempt.placement
    if placement is None:
        return [f"refused: {attempt.refusal}"]
    considered = [each for each in attempt.candidates if each.considered]
    works = {each.prefill or each.decode: each.work for each in considered}
    first = placement.prefill or placement.decode
    kinds = {each.prefill is None for each in considered}
    ties = "a pair before a unified worker, " if len(kinds) > 1 else ""
    found = [_least(first, works, "work before the first token", "prompt tokens", ties)]
    if placement.prefill is not None:
        found.append(_decode_reason(placement, considered))
    elif any(each.prefill for each in considered):
        found.append(f"{first} answers it as well: no handoff")
    if placement.lender is not None:
        found.append(
            f"{placement.lender} is asked to lend the prompt's blocks from number "
            f"{placement.first_lent} on: fetching them is taken to be faster than computing"
        )
    return found


def _decode_reason(placement: Placement, considered: list[Candidate]) -> str:
    contexts = {each.decode: each.context_tokens for each in considered if each.prefill}
    return _least(placement.decode, contexts, "context to keep", "tokens")


def _least(name: str, figures: Mapping[str, int], what: str, unit: str, ties: str = "") -> str:
    mine = figures.get(name, 0)
    others = sorted((figure, other) for other, figure in figures.items() if other != name)
    said = f"{mine:,} {unit}"
    if not others:
        return f"{name}: nobody else could; {what}: {said}"
    rivals = ", ".join(f"{other} {figure:,}" for figure, other in others[:MAX_NAMED])
    if len(others) > MAX_NAMED:
        rivals += f", and {len(others) - MAX_NAMED} more"
    if others[0][0] == mine:
        order = f"{ties}fewer requests, then the name"
        return f"{name}: no less {what} anywhere: {said} ({rivals}); of equals {order}"
    return f"{name}: the least {what}: {said} ({rivals})"
