"""Every interleaving and crash point of handoff, lease and attempt, breadth first.

Two workers, a gateway, one request, two blocks (see `handoff_world`). In every state the books of
both workers agree; every token that reaches the client is the expected one, each once; wherever
nothing moves any more, the request has ended exactly once and no block, frame, credit or lease is
left. Each scenario bounds what may go wrong, so that the search ends; together they cover the
pairs of mishaps that meet in one handoff.
"""

from __future__ import annotations

from collections import deque

import pytest
import sim_engine
from handoff_world import World
from sim_engine import SimWorker

from baton.core.attempts import AttemptMemory
from baton.core.exports import ExportState, ExportTable

MAX_STATES = 60_000


class Found(AssertionError):
    """An invariant failed; the message holds the shortest way there."""


def explore(budget: dict[str, int]) -> tuple[int, int]:
    """Visit every state; returns how many there are and how many of them are ends.

    Raises:
        Found: with the shortest history that breaks an invariant.
    """
    start = World(budget)
    seen = {start.key()}
    queue: deque[tuple[World, tuple[tuple[str, int], ...]]] = deque([(start, ())])
    num_ends = 0
    while queue:
        world, history = queue.popleft()
        progress = list(world.progress())
        try:
            if not progress:
                num_ends += 1
                mishaps = {kind for kind, _ in history} & set(budget)
                failed = "copy_fails" in mishaps
                _settled(world).check_end(failed=failed, disturbed=bool(mishaps - {"repeat"}))
        except Exception as error:
            raise Found(f"{error!r} after {history}") from error
        for action in (*progress, *world.mishaps()):
            child = world.copy()
            try:
                child.act(*action)
            except Exception as error:
                raise Found(f"{error!r} after {(*history, action)}") from error
            key = child.key()
            if key not in seen:
                seen.add(key)
                queue.append((child, (*history, action)))
        assert len(seen) < MAX_STATES, "the scenario is too big to search"
    return len(seen), num_ends


def _settled(world: World) -> World:
    """Leases that nobody renews any more, say of a lost release, run out."""
    settled = world.copy()
    if settled.client.ended:
        settled.now += 100.0
        for worker in (settled.prefill, settled.decode):
            worker.step(settled.now)
    return settled


SCENARIOS = {
    "nothing": {},
    "crashes": {"crash_prefill": 2, "crash_decode": 2},
    "abort and crashes": {"abort": 1, "crash_prefill": 1, "crash_decode": 1},
    "frozen worker": {"give_up": 1, "crash_decode": 1},
    "time": {"tick": 4, "crash_prefill": 1},
    "time and abort": {"tick": 4, "abort": 1},
    "damage": {"rot": 1, "copy_fails": 1, "crash_decode": 1, "abort": 1},
    "abort while frozen": {"give_up": 1, "abort": 1},
    "repeats": {"repeat": 2, "crash_decode": 1, "abort": 1},
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_interleaving(name: str) -> None:
    num_states, num_ends = explore(SCENARIOS[name])
    print(f"{name}: {num_states} states, {num_ends} ends")
    assert num_ends


def test_finds_commit_before_the_last_seal(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ExportTable.commit

    def commit(self: ExportTable, seq_id: object, now: float) -> object:
        export = self._exports[seq_id]  # type: ignore[index]
        if export.state is ExportState.SEALING:
            export.num_unsealed = 0
            for part in export.parts:
                part.digest = part.digest or b"0000"
        return original(self, seq_id, now)  # type: ignore[arg-type]

    monkeypatch.setattr(ExportTable, "commit", commit)
    monkeypatch.setattr(SimWorker, "check_commit", lambda self, handoff: None)
    monkeypatch.setattr(sim_engine, "digests_match", lambda frame, digest: True)
    with pytest.raises(Found, match="a fallback without a reason"):
        explore({})


def test_finds_a_reader_that_ignores_the_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of a key from before the crash must not be taken from the store of after."""

    def fetch(order: object, store: object, kv: object) -> tuple[str, ...]:
        for want in order.wanted:  # type: ignore[attr-defined]
            frame = store.frames[want.frame]  # type: ignore[attr-defined]
            kv.blocks[want.block] = list(frame.slots) or [sim_engine.POISON] * 2  # type: ignore[attr-defined]
        return ("ok",) * len(order.wanted)  # type: ignore[attr-defined]

    monkeypatch.setattr(sim_engine, "fetch", fetch)
    with pytest.raises(Found, match="wrong tokens|nobody wrote"):
        explore({"crash_prefill": 1})


def test_finds_a_repeat_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    original = AttemptMemory.__init__
    monkeypatch.setattr(AttemptMemory, "__init__", lambda self: original(self, 0))
    with pytest.raises(Found, match="a stale attempt runs"):
        explore({"repeat": 1})


def test_finds_a_hold_that_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExportTable, "abandon", lambda self, seq_id: None)
    with pytest.raises(Found):
        explore({"abort": 1})
