"""Decision logs: a long random run replays without a difference, another policy does not."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import pytest
from sim_engine import SimWorker, make_config, make_request

from baton.core import decision_log as log
from baton.core.decision_log import BadLog, LoggedRouter, LoggedScheduler
from baton.core.replay import ReplayReport, replay
from baton.core.router import WorkerInfo
from baton.errors import ConfigError, Unavailable
from baton.types import Handoff, Role

CONFIG = make_config(num_blocks=9, num_frames=12, max_num_batched_tokens=8, lease_ttl_s=3.0)


def _traffic(worker: SimWorker, source: SimWorker | None, seed: int, num_steps: int) -> None:
    """Random requests, aborts, failures; with a `source`, also takes over its handoffs."""
    rng = random.Random(seed)
    handoffs: list[Handoff] = []
    now = 0.0
    for step in range(num_steps):
        now += rng.random()
        if rng.random() < 0.6:
            prompt = [rng.randrange(2) for _ in range(rng.randrange(1, 9))]
            request = make_request(
                f"r{step}",
                prompt,
                rng.randrange(1, 9),
                hand_off=rng.random() < 0.4,
                deadline_s=rng.choice([None, 3.0]),
                salt=rng.choice([b"", b"t"]),
                alone=step % 10 == 7,
            )
            if source is not None and rng.random() < 0.7:
                split = make_request(f"r{step}", prompt, 6, hand_off=True)
                source.scheduler.add(split, now)
                token = None
                for _ in range(3):
                    update = source.step(now)
                    while source.exports:
                        update.handoffs += source.finish_export(0, now).handoffs
                    token = next((d.token_ids for d in update.deltas), token)
                    for handoff in update.handoffs:
                        request = make_request(
                            f"r{step}", prompt, 6, handoff=handoff, emitted=token or ()
                        )
            worker.scheduler.add(request, now)
        if rng.random() < 0.1:
            worker.scheduler.abort((f"r{rng.randrange(step + 1)}", 0, 0))
        update = worker.step(now)
        handoffs += update.handoffs
        for told in update.alone:
            worker.scheduler.proceed((told.request_id, told.choice, told.attempt))
        while worker.exports and rng.random() < 0.7:
            position = rng.randrange(len(worker.exports))
            handoffs += worker.finish_export(position, now, ok=rng.random() < 0.95).handoffs
        while worker.imports and rng.random() < 0.7:
            position = rng.randrange(len(worker.imports))
            worker.finish_import(position, source or worker, now)
        if handoffs and rng.random() < 0.3:
            worker.scheduler.renew((rng.choice(handoffs).grant.grant_id,), now)
        if handoffs and rng.random() < 0.3:
            worker.scheduler.release((handoffs.pop().grant.grant_id, "unknown"))
    worker.scheduler.drain()


def _worker_log(
    seed: int = 0, num_steps: int = 600, with_imports: bool = False, depth: int = 1
) -> bytes:
    parts: list[bytes] = []
    make = partial(LoggedScheduler, sink=parts.append)
    worker = SimWorker(CONFIG, make_scheduler=make, depth=depth)
    roomy = make_config(num_blocks=64, num_frames=64, lease_ttl_s=0.5)
    source = SimWorker(roomy, "source") if with_imports else None
    _traffic(worker, source, seed, num_steps)
    assert num_steps < 600 or worker.scheduler.counters["preemptions"]
    assert depth == 1 or worker.runner.num_unknown
    assert num_steps < 600 or worker.scheduler.counters["prefix_hit_tokens"]
    assert worker.scheduler.counters["imported_blocks"] or not with_imports
    return b"".join(parts)


def _router_log(num_calls: int = 600) -> bytes:
    rng = random.Random(3)
    parts: list[bytes] = []
    router = LoggedRouter("gateway", parts.append)
    with pytest.raises(Unavailable):
        router.place("early", 0, 5, [])
    roles = {"p0": Role.PREFILL, "p1": Role.PREFILL, "d0": Role.DECODE, "u": Role.UNIFIED}
    for name, role in roles.items():
        router.join(WorkerInfo(name, role, 1, 8, 4))
    for n in range(num_calls):
        keys = [bytes([rng.randrange(4), i]) for i in range(rng.randrange(4))]
        router.place(f"r{rng.randrange(n + 1)}", 0, rng.randrange(1, 99), keys)
        router.prefilled(f"r{rng.randrange(n + 1)}", 0)
        router.finished(f"r{rng.randrange(n + 1)}", 0)
        if n % 100 == 99:
            router.leave("p1")
            router.join(WorkerInfo("p1", Role.PREFILL, n, 8, 4))
    return b"".join(parts)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("with_imports", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_scheduler_replays_without_difference(seed: int, with_imports: bool, depth: int) -> None:
    report = replay(_worker_log(seed, with_imports=with_imports, depth=depth))
    assert report.num_decisions == 600
    assert (report.num_differences, report.first, report.parted) == (0, None, None)
    assert report.source == "worker"


def test_router_replays_without_difference() -> None:
    report = replay(_router_log())
    assert (report.num_decisions, report.num_differences) == (601, 0)
    assert report.source == "gateway"


@pytest.mark.parametrize(
    "changes",
    [
        {"max_num_batched_tokens": 5},
        {"max_num_seqs": 2},
        {"num_blocks": 8},
        {"prefix_cache": 0},
        {"num_frames": 4},
    ],
)
def test_another_policy_differs(changes: dict[str, int]) -> None:
    report = replay(_worker_log(), changes)
    assert report.num_differences > 0
    assert report.first is not None


def test_a_changed_decision_shows() -> None:
    data = _router_log()
    header, records = log.read(data)
    changed = [log.frame(header)]
    for number, record in enumerate(records):
        if isinstance(record, log.Placed) and number > 50:
            record = msgspec.structs.replace(record, num_tokens=record.num_tokens + 1)
        changed.append(log.frame(record))
    assert replay(b"".join(changed)).num_differences > 0


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"block_size": 3}, "no number `block_size`"),
        ({"fingerprint": 3}, "no number `fingerprint`"),
        ({"num_blocks": 0}, "num_blocks cannot be 0"),
        ({"max_num_batched_tokens": -1}, "max_num_batched_tokens cannot be -1"),
    ],
)
def test_impossible_changes_are_refused(changes: dict[str, int], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        replay(_worker_log(num_steps=60), changes)


def test_a_cut_log_replays_up_to_the_cut() -> None:
    data = _worker_log(num_steps=100)
    counts = [replay(data[: len(data) - cut]) for cut in range(1, 200, 7)]
    assert all(report.num_differences == 0 for report in counts)
    assert counts[-1].num_records < replay(data).num_records


def test_damage_is_never_taken_for_a_clean_log() -> None:
    """Whatever byte is hit: an error that says so, a report, but no other exception."""
    rng = random.Random(5)
    data = _worker_log(num_steps=30)
    outcomes = {"error": 0, "report": 0}
    for _ in range(200):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        try:
            assert isinstance(replay(bytes(damaged)), ReplayReport)
            outcomes["report"] += 1
        except BadLog:
            outcomes["error"] += 1
    assert outcomes["error"] > 30
    assert outcomes["report"] > 30


def _with_version() -> bytes:
    return log.frame(log.RouterHeader(log.VERSION + 1, "g"))


def _mixed() -> bytes:
    return log.frame(log.RouterHeader(log.VERSION, "g")) + log.frame(log.Drained())


def _mixed_other_way() -> bytes:
    return log.frame(log.WorkerHeader(log.VERSION, "w", 1, CONFIG)) + log.frame(log.Left("w"))


def test_an_impossible_worker_is_damage() -> None:
    for name in ("num_blocks", "max_num_batched_tokens", "max_num_seqs"):
        config = msgspec.structs.replace(CONFIG, **{name: 0})
        with pytest.raises(BadLog):
            replay(log.frame(log.WorkerHeader(log.VERSION, "w", 1, config)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: b"",
        lambda: b"not a log at all",
        lambda: b"\xff" * 40,
        lambda: log.frame(log.Drained()),
        _with_version,
        _mixed,
        _mixed_other_way,
        lambda: _worker_log(num_steps=60) + (1 << 31).to_bytes(4, "little") + b"x" * 9,
        lambda: _worker_log(num_steps=60) + b"\x03\0\0\0abc",
    ],
)
def test_what_is_not_a_log_is_refused(make: Callable[[], bytes]) -> None:
    with pytest.raises(BadLog):
        replay(make())


def test_the_log_holds_inputs_and_hashes_only() -> None:
    header, records = log.read(_worker_log(num_steps=60))
    assert isinstance(header, log.WorkerHeader)
    kinds: dict[str, Any] = {}
    for record in records:
        kinds[type(record).__name__] = record
    assert set(kinds) >= {"Added", "Scheduled", "Updated", "Exported", "Aborted", "Drained"}
    assert len(kinds["Scheduled"].decision) == 8
