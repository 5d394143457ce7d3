"""What the twin says that other placements of a request would have done.

The twin serves the requests of the gateway's log at the instants at which they were placed, with
the lengths that they had and the prompt blocks that they shared, from a moment on at which nothing
was under way. Up to the request in question each goes where it really went; that one goes where
it is told; those after it go where the router then sends them. So the twin is led to the same
state by the same decisions, not copied into it: what caches held before that moment is not there.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import msgspec

from baton.core.cost import CostModel, HeldOut, Link, Profile
from baton.core.life import HandoffPolicy
from baton.core.router import Pair, Router
from baton.errors import BatonError, ConfigError
from baton.observe.results import RequestResult
from baton.planner.explain.facts import Facts
from baton.planner.explain.history import History, Key, Passed
from baton.planner.explain.logged_cost import fit_logged
from baton.twin.deployment import Deployment, WorkerSetup
from baton.twin.links import Port
from baton.twin.prompts import VOCAB_SIZE
from baton.twin.setup import COPY_BYTES_PER_S, HOST, MESSAGE_S
from baton.twin.simulator import Simulator
from baton.twin.workload import TraceRequest
from baton.types import Role

HORIZON = 2.0
"""Requests that came later than so many times the life of the one in question are left out."""
TIMEOUT_S = 3600.0
"""Of a request in the twin: what really ended there is not to time out here."""
MAX_MESSAGE_S = 0.02
"""Where a message seems to take longer, or less than nothing, the clocks are not one host's."""


class NoTwin(BatonError):
    """The twin cannot be led to this placement; the message says why."""


class Served(msgspec.Struct, frozen=True):
    """What one placement did, or would do: seconds, None where there is nothing to tell.

    others_itl_s, others_ttft_s: means over the `num_others` requests that were under way while
    this one was; itl is the mean gap of each.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None
    others_itl_s: float | None = None
    others_ttft_s: float | None = None
    num_others: int = 0
    failure: str = ""


class World(msgspec.Struct, frozen=True):
    """All that the twin must know. history, facts by worker; wanted: the request in question."""

    history: History
    facts: Mapping[str, Facts]
    wanted: Key
    profiles: Mapping[Role, Profile] = {}

    @property
    def life(self) -> Passed:
        return self.history.passed[self.wanted]


class WhatIf:
    """The twin at one placement; `serve` turns it one way or another.

    held_out: by worker, the error of its steps' cost on steps that the fit had not seen.
    num_before: requests that are served before the one in question.

    Raises:
        NoTwin: it cannot be led there.
        ConfigError: too few steps were logged, and no profile is given; or profiles are given, and
            none for the workers of a role.
    """

    def __init__(self, world: World, max_before: int) -> None:
        _check(world)
        self._world = world
        self._keys = _window(world, max_before)
        self.num_before = self._keys.index(world.wanted)
        self.held_out: dict[str, HeldOut | None] = {}
        costs = self._costs()
        self._deployment = _deployment(world, costs)
        self._trace = _trace(world, self._keys)
        self._others = _others(world, self._keys)

    def serve(self, pair: Pair) -> Served:
        """What the request gets if it is placed so."""
        pinned: dict[Key, Pair] = {}
        passed = self._world.history.passed
        for key, asked in zip(self._keys, self._trace[: self.num_before], strict=False):
            first = passed[key].placements[0]
            pinned[asked.id, 0] = Pair(first.prefill, first.decode)
        pinned[self._trace[self.num_before].id, 0] = pair
        run = Simulator(self._deployment, self._trace, router=Router(pinned)).run()
        found = dict(zip(self._keys, run.requests, strict=True))
        return served(found[self._world.wanted], [found[key] for key in self._others])

    def measured(self) -> Served:
        """What it really got, by the gateway's clock."""
        results = [_result(self._world, key) for key in (self._world.wanted, *self._others)]
        return served(results[0], results[1:])

    def _costs(self) -> dict[str, CostModel]:
        world = self._world
        roles = {name: info.role for name, info in world.history.workers.items()}
        if world.profiles:
            for role in dict.fromkeys(roles.values()):
                if role not in world.profiles:
                    raise ConfigError(
                        f"{role.value} workers have no profile: give --profile FILE for all, or "
                        f"--profile {role.value}=FILE"
                    )
            return {name: world.profiles[role].cost() for name, role in roles.items()}
        costs: dict[str, CostModel] = {}
        pauses = [each.pause_s for each in world.facts.values() if each.pause_s is not None]
        usual_s = statistics.median(pauses) if pauses else 0.0
        for name, (cost, error) in fit_logged(
            {name: each.steps for name, each in world.facts.items()}
        ).items():
            self.held_out[name] = error
            pause_s = world.facts[name].pause_s
            fixed_s = cost.fixed_s + (usual_s if pause_s is None else pause_s)
            costs[name] = msgspec.structs.replace(cost, fixed_s=fixed_s)
        return costs


def served(mine: RequestResult, others: Sequence[RequestResult]) -> Served:
    """From results to means; gaps are those between first and last token, on average."""
    return Served(
        mine.ttft_s,
        mine.tpot_s,
        None if mine.failure else mine.e2e_s,
        _mean([each.tpot_s for each in others]),
        _mean([each.ttft_s for each in others]),
        len(others),
        mine.failure or "",
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _check(world: World) -> None:
    history = world.history
    if world.wanted not in history.passed:
        raise NoTwin("it was placed nowhere")
    if world.life.ended_s is None:
        raise NoTwin("the gateway's log ends before the request does")
    if history.change:
        raise NoTwin(f"{history.change} while it was served, and the twin is not told when")
    if len({info.key_class for info in history.workers.values()}) > 1:
        raise NoTwin("the workers are unlike each other, which is not read from logs yet")
    if not history.idle:
        raise NoTwin(
            "since a worker last came or went there was always a request under way before this "
            "one: there is no moment to start from"
        )


def _window(world: World, max_before: int) -> list[Key]:
    """From the earliest idle moment that is not too far back, or the last one, to the horizon."""
    keys = list(world.history.passed)
    position, idle, life = keys.index(world.wanted), world.history.idle, world.life
    near = [number for number in idle if position - number <= max_before]
    assert life.ended_s is not None
    last_s = life.placed_s + HORIZON * (life.ended_s - life.placed_s)
    after = [key for key in keys[position + 1 :] if world.history.passed[key].placed_s <= last_s]
    return keys[near[0] if near else idle[-1] : position + 1] + after


def _others(world: World, keys: Sequence[Key]) -> list[Key]:
    """Who was under way at the same time, from its placement to its end, and drew a token."""
    mine = world.life
    assert mine.ended_s is not None
    found = []
    for key in keys:
        other = world.history.passed[key]
        if key == world.wanted or other.ended_s is None or other.first_token_s is None:
            continue
        if other.placed_s < mine.ended_s and other.ended_s > mine.placed_s:
            found.append(key)
    return found


def num_output_tokens(world: World, key: Key) -> int:
    """What was drawn for it, by whichever worker drew last."""
    return max((facts.num_tokens.get(key, 0) for facts in world.facts.values()), default=0)


def _result(world: World, key: Key) -> RequestResult:
    passed = world.history.passed[key]
    end_s = passed.placed_s if passed.ended_s is None else passed.ended_s
    first_s = passed.first_token_s
    return RequestResult(
        index=0,
        planned_s=passed.placed_s,
        sent_s=passed.placed_s,
        end_s=end_s,
        event_s=() if first_s is None else (first_s, end_s),
        output_tokens=num_output_tokens(world, key),
    )


def _trace(world: World, keys: Sequence[Key]) -> list[TraceRequest]:
    names: dict[bytes, int] = {}
    begin = world.history.passed[keys[0]].placed_s
    size = next(iter(world.history.workers.values())).block_size
    trace = []
    for request_id, choice in keys:
        passed = world.history.passed[request_id, choice]
        trace.append(
            TraceRequest(
                passed.placed_s - begin,
                passed.num_tokens,
                max(1, num_output_tokens(world, (request_id, choice))),
                id=f"{request_id}/{choice}",
                blocks=tuple(names.setdefault(key, len(names)) for key in passed.keys),
                block_size=size,
            )
        )
    return trace


def _deployment(world: World, costs: Mapping[str, CostModel]) -> Deployment:
    """All workers in one place; what their links take is in the time of a block."""
    profiles, facts = list(world.profiles.values()), world.facts
    fetches = [fetch_s for each in facts.values() for fetch_s in each.fetches]
    fetch_s = max((each.import_s for each in profiles), default=0.0)
    if not fetch_s and fetches:
        fetch_s = statistics.median(fetches)
    workers = []
    for name, info in world.history.workers.items():
        mine = facts[name]
        copy_s = world.profiles[info.role].export_s if profiles else mine.copy_s
        workers.append(
            WorkerSetup(
                name,
                info.role,
                msgspec.structs.replace(mine.config, vocab_size=VOCAB_SIZE),
                costs[name],
                mine.depth,
                Link(1e15, per_block_s=copy_s) if copy_s else Link(COPY_BYTES_PER_S),
                HOST,
                world.profiles[info.role].rests if profiles else (),
            )
        )
    took_early = any(each.took_early for each in facts.values())
    policy = HandoffPolicy(workers[0].limits.lease_ttl_s, fetch_early=took_early)
    return Deployment(
        tuple(workers),
        {HOST: Port(COPY_BYTES_PER_S, 1e15 if fetch_s else COPY_BYTES_PER_S)},
        policy,
        Link(0.0, per_block_s=fetch_s),
        message_s=_message_s(world),
        request_timeout_s=TIMEOUT_S,
        max_queued_requests=1 << 30,
    )


def _message_s(world: World) -> float:
    """What legs take from the gateway to an engine that has nothing else to do."""
    waits = []
    for facts in world.facts.values():
        for (request_id, choice, attempt), received in facts.received.items():
            passed = world.history.passed.get((request_id, choice))
            if passed is None or attempt or passed.placements[0].lender is not None:
                continue
            first = passed.placements[0]
            if facts.worker_id == (first.prefill or first.decode):
                waits.append(received - passed.placed_s)
    if not waits:
        return MESSAGE_S
    usual_s = statistics.median(waits)
    return usual_s if 0.0 <= usual_s <= MAX_MESSAGE_S else MESSAGE_S
