"""`Scheduler.advance` is so many updates: two schedulers, one that jumps and one that walks.

Both with one step in flight at a time, and with the next one planned while it runs; and with the
one that jumps telling a sequence's tokens together, which brings the same ones.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sim_engine import make_config, make_request

from baton.core.lease import LeaseTable
from baton.core.limits import SchedulerConfig
from baton.core.plan import Chunk, ExportOrder, StepOutput, StepPlan
from baton.core.scheduler import Scheduler
from baton.core.sequence import Sequence, SequenceId
from baton.core.store_index import StoreIndex
from baton.types import TokenDelta

STEP_S = 0.25

configs = st.builds(
    make_config,
    block_size=st.sampled_from((1, 2, 3, 8)),
    num_blocks=st.sampled_from((10, 14, 20, 40, 200)),
    num_frames=st.sampled_from((0, 3, 16)),
    max_num_seqs=st.integers(1, 6),
    max_num_batched_tokens=st.integers(3, 20),
    max_model_len=st.sampled_from((24, 40)),
    prefix_cache=st.booleans(),
    keep_blocks=st.booleans(),
)
arrivals = st.lists(
    st.tuples(
        st.integers(0, 6),  # turns to wait
        st.lists(st.integers(0, 1), min_size=1, max_size=9),
        st.integers(1, 30),
        st.sampled_from((None, None, 5.0)),
        st.sampled_from((0, 0, 0, 1, 2)),  # tokens of the answer that were drawn elsewhere
    ),
    min_size=2,
    max_size=12,
)
jumps = st.lists(st.integers(1, 40), min_size=1, max_size=8)


def token(seq: Sequence, index: int) -> int:
    """What is drawn after `index` tokens; runs of equal ones, so that answers share blocks."""
    return (index // 4 + len(seq.request.prompt)) % 3


class Walker:
    """A scheduler with what it brought, all deltas of a sequence joined."""

    def __init__(self, config: SchedulerConfig, *, tells_each: bool = True) -> None:
        self.index = StoreIndex(config.num_frames)
        leases = LeaseTable("w", 1, bytes(32), self.index)
        self.scheduler = Scheduler(config, leases, self.index, tells_each=tells_each)
        self.num_deltas = 0
        self.told: dict[tuple[str, int, int], list[Any]] = {}
        self.exports: list[ExportOrder] = []
        self.times: list[Any] = []
        self.in_flight: deque[StepPlan] = deque()

    def schedule(self, now: float) -> bool:
        """Plan a step; whether there was anything to plan."""
        plan = self.scheduler.schedule(now)
        if plan.chunks:
            self.in_flight.append(plan)
        return bool(plan.chunks)

    def collect(self) -> None:
        update = self.scheduler.take()
        self.num_deltas += len(update.deltas)
        for delta in update.deltas:
            self._join(delta)
        self.exports += update.exports
        self.times += update.times
        assert not (update.sealed or update.landed or update.handoffs)

    def _join(self, delta: TokenDelta) -> None:
        key = (delta.request_id, delta.choice, delta.attempt)
        joined = self.told.setdefault(key, [delta.first_index, (), None, None, None])
        assert delta.first_index == joined[0] + len(joined[1]), "a gap or a repeat"
        joined[1] += delta.token_ids
        joined[2] = delta.finish
        joined[3] = delta.error
        joined[4] = delta.num_cached if joined[4] is None else joined[4]

    def walk(self, nows: list[float]) -> None:
        for number, now in enumerate(nows):
            plan = self.in_flight.popleft()
            drawn = [[token(c.seq, c.end)] if c.samples else [] for c in plan.chunks]
            self.scheduler.update(plan, StepOutput(drawn, [None] * len(drawn), STEP_S), now)
            if number < len(nows) - 1:
                self.schedule(now)
        self.collect()

    def jump(self, nows: list[float]) -> None:
        plan = self.in_flight.popleft()
        tokens = [[token(c.seq, c.end + i) for i in range(len(nows))] for c in plan.chunks]
        self.in_flight.clear()
        ahead = self.scheduler.advance(plan, tokens, nows)
        if ahead is not None:
            self.in_flight.append(ahead)
        self.collect()

    def copy(self, count: int, now: float) -> None:
        for order in self.exports[:count]:
            self.scheduler.exported(order.key, order.key[:4], now)
        del self.exports[:count]

    def state(self) -> dict[str, Any]:
        """All that a later call could depend on."""
        scheduler, pool, index = self.scheduler, self.scheduler.pool, self.index
        books, planned = scheduler.books, scheduler._next_step
        return {
            "refs": pool._refs,
            "keys": pool._key_of,
            "empty": pool._empty,
            "cached": list(pool._cached),
            "evictions": pool.num_evictions,
            "slots": {k: (s.frame, s.state, s.num_holds) for k, s in index._slots.items()},
            "store": (index._free, list(index._cached), index.num_evictions),
            "copying": scheduler.exports._copying,
            "sequences": {i: _values(seq) for i, seq in books.sequences.items()},
            "running": list(books.running),
            "waiting": [seq.id for seq in books.waiting],
            "counters": scheduler.counters,
            "step": planned.number,
            "lengths": scheduler.admission.lengths._counts,
            "in_flight": {step: _chunks(c) for step, c in books.in_flight._steps.items()},
            "planned": _chunks(planned.chunks) if len(books.in_flight) else [],
            "plans": [(p.step, [(c.seq.id, *_chunk(c)) for c in p.chunks]) for p in self.in_flight],
            "told": self.told,
            "exports": self.exports,
            "times": self.times,
        }


def _values(seq: Sequence) -> dict[str, Any]:
    return {name: getattr(seq, name) for name in Sequence.__slots__}


def _chunks(chunks: dict[SequenceId, Chunk]) -> list[Any]:
    return [(seq_id, *_chunk(chunk)) for seq_id, chunk in chunks.items()]


def _chunk(chunk: Chunk) -> tuple[int, int, bool]:
    return chunk.start, chunk.num_tokens, chunk.samples


def race(
    config: SchedulerConfig, arrivals: list[Any], jumps: list[int], depth: int, seen: Counter[str],
    *, tells_each: bool = True,
) -> None:  # fmt: skip
    """Both do the same work; after every stretch they are in the same state."""
    jumper, walker = Walker(config, tells_each=tells_each), Walker(config)
    due = {}
    turn = 0
    for number, (wait, prompt, max_tokens, deadline_s, num_emitted) in enumerate(arrivals):
        turn += wait
        emitted = tuple(prompt[:num_emitted])
        due.setdefault(turn, []).append(
            make_request(
                f"r{number}", prompt, max_tokens + 2, deadline_s=deadline_s, emitted=emitted
            )
        )
    now = 0.0
    for turn in range(300):
        for each in (jumper, walker):
            each.copy(turn % 4, now)
            for request in due.get(turn, ()):
                each.scheduler.add(request, now)
        planned = jumper.schedule(now)
        assert walker.schedule(now) is planned
        num_ahead = len(jumper.in_flight) - 1
        if num_ahead < 0:
            for each in (jumper, walker):
                each.collect()
            if turn > max(due):
                break
            continue
        if planned and num_ahead < depth - 1:
            continue
        foreseen = 1
        if num_ahead == depth - 1:
            foreseen = jumper.scheduler.steady_steps(jumper.in_flight[0])
        steps = min(jumps[turn % len(jumps)], foreseen)
        nows = [now + STEP_S * (i + 1) for i in range(steps)]
        deadline = jumper.scheduler.next_deadline()
        while len(nows) > 1 and deadline is not None and nows[-2] >= deadline:
            nows.pop()
        _count(seen, jumper, jumper.in_flight[0], len(nows))
        if foreseen > 1:
            jumper.jump(nows)
        else:
            jumper.walk(nows)
        walker.walk(nows)
        now = nows[-1]
        mine, other = jumper.state(), walker.state()
        if not tells_each:
            seen["kept back"] += mine["told"] != other["told"]
            seen["preempted"] += any(s["num_preemptions"] for s in mine["sequences"].values())
            for name, told in other["told"].items():
                if told[2] is not None:  # it has ended
                    assert mine["told"][name] == told, "an end tells what was kept back"
            if turn % 5 == 4:
                jumper.scheduler.tell_rest()
                jumper.collect()
                mine, other = jumper.state(), walker.state()
            else:
                del mine["told"], other["told"]
                for values in mine["sequences"].values():
                    values["num_told"] = other["sequences"][values["id"]]["num_told"]
            for values in mine["sequences"].values():
                values["tells_each"] = True
        assert mine == other
        jumper.scheduler.check()
    seen["deltas"] += jumper.num_deltas
    seen["deltas of a walk"] += walker.num_deltas


def _count(seen: Counter[str], jumper: Walker, plan: StepPlan, steps: int) -> None:
    if steps == 1:
        return
    size = jumper.scheduler.config.kv_format.block_size
    seen["jumps"] += 1
    seen["several"] += len(plan.chunks) > 1
    for chunk in plan.chunks:
        end = chunk.start + steps
        seen["borders"] += end // size > chunk.start // size
        seen["at_a_border"] += end % size == 0
        seen["ends"] += end + 1 >= len(chunk.seq.request.prompt) + (
            chunk.seq.request.sampling.max_tokens
        )
    seen["waiting"] += bool(len(jumper.scheduler.books.waiting))
    seen["first_tokens"] += any(not chunk.seq.prefilled for chunk in plan.chunks)
    seen["evicting"] += jumper.scheduler.pool.num_cached > 0 == len(jumper.scheduler.pool._empty)
    seen["kept"] += bool(jumper.scheduler.config.keep_blocks and jumper.index.num_frames)


@pytest.mark.parametrize("tells_each", [True, False])
@pytest.mark.parametrize("depth", [1, 2])
def test_jumping_is_walking(depth: int, tells_each: bool) -> None:
    seen: Counter[str] = Counter()

    @settings(
        max_examples=500,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(config=configs, arrivals=arrivals, jumps=jumps)
    def run(config: SchedulerConfig, arrivals: list[Any], jumps: list[int]) -> None:
        race(config, arrivals, jumps, depth, seen, tells_each=tells_each)

    run()
    for name in ("several", "borders", "at_a_border", "ends", "waiting", "evicting", "kept"):
        if name != "ends" or depth == 1:  # with a step ahead, an end is walked to
            assert seen[name] > 20, f"hardly any {name}: {seen}"
    assert seen["first_tokens"] or depth == 2, seen
    if not tells_each:
        assert seen["kept back"] > 20 and seen["preempted"] > 20, seen
        assert seen["deltas"] < 0.5 * seen["deltas of a walk"], seen
