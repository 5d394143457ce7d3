"""An engine without a model: the real core, a KV pool that tells lies apart, a store, a gateway.

A slot of the fake KV holds (token, position, chain), where `chain` digests the slot before it as
the block table reads it back. The next token is a digest of every slot of the context, read back
the same way and of nothing else. So a block that is stale, foreign, half written or out of order
changes the output, as it does with a real model; `expected_tokens` says what comes out when
nothing is wrong.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from baton.core.in_flight import may_run_ahead
from baton.core.lease import LeaseTable, verify_mac
from baton.core.limits import SchedulerConfig
from baton.core.plan import (
    Chunk,
    ExportOrder,
    ImportOrder,
    SourceBlock,
    StepOutput,
    StepPlan,
    Update,
    WantedBlock,
)
from baton.core.prompt_order import PASSING, rank
from baton.core.scheduler import Scheduler
from baton.core.sequence import SequenceId, Status
from baton.core.store_index import StoreIndex
from baton.types import FinishReason, Handoff, KvFormat, Request, SamplingParams, TokenDelta

VOCAB = 1 << 20
Slot = tuple[int, int, int]
POISON: Slot = (-7, -7, -7)
SECRET = b"secret of a test"


def make_config(
    *,
    block_size: int = 2,
    num_blocks: int = 16,
    num_frames: int = 16,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 16,
    max_model_len: int = 64,
    prefix_cache: bool = True,
    lease_ttl_s: float = 10.0,
    keep_blocks: bool = False,
) -> SchedulerConfig:
    """A small worker."""
    kv_format = KvFormat(block_size, "fake", 1, 1, 1, 24 * block_size)
    return SchedulerConfig(
        kv_format,
        num_blocks,
        num_frames,
        max_num_seqs,
        max_num_batched_tokens,
        max_model_len,
        VOCAB,
        b"weights",
        "exact",
        prefix_cache,
        lease_ttl_s,
        keep_blocks,
    )


def make_request(
    name: str,
    prompt: Sequence[int],
    max_tokens: int = 4,
    *,
    stop: Sequence[int] = (),
    **fields: Any,
) -> Request:
    """A greedy request."""
    sampling = SamplingParams(max_tokens, temperature=0.0, stop_token_ids=tuple(stop))
    return Request(name, tuple(prompt), sampling, **fields)


def _digest(values: Sequence[int], start: int = 0) -> int:
    return zlib.crc32(array("q", values).tobytes(), start)


def before_first(salt: bytes) -> Slot:
    """What stands before position 0; it makes a block of another tenant visible."""
    return (0, 0, zlib.crc32(salt))


def write_slot(token: int, position: int, before: Slot) -> Slot:
    """What the KV of `token` at `position` is, given the slot before it as it was read back."""
    return (token, position, _digest((token, position, *before)))


def next_token(context: Sequence[Slot]) -> int:
    """What a model draws from this context."""
    return _digest([value for slot in context for value in slot]) % VOCAB


def expected_tokens(prompt: Sequence[int], num_tokens: int, salt: bytes = b"") -> list[int]:
    """The next `num_tokens` tokens after `prompt`, worked out without a pool."""
    context: list[Slot] = []
    for position, token in enumerate(prompt):
        context.append(write_slot(token, position, context[-1] if context else before_first(salt)))
    drawn: list[int] = []
    for _ in range(num_tokens):
        token = next_token(context)
        drawn.append(token)
        context.append(write_slot(token, len(context), context[-1]))
    return drawn


class FakeKv:
    """A pool's slots, [block][offset]."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.block_size = config.kv_format.block_size
        self.blocks: list[list[Slot]] = [[POISON] * self.block_size] * config.num_blocks

    def read(self, table: Sequence[int], position: int) -> Slot:
        return self.blocks[table[position // self.block_size]][position % self.block_size]

    def write(self, table: Sequence[int], position: int, slot: Slot) -> None:
        block = list(self.blocks[table[position // self.block_size]])
        block[position % self.block_size] = slot
        self.blocks[table[position // self.block_size]] = block

    def poison(self, block: int) -> None:
        self.blocks[block] = [POISON] * self.block_size


class Crashed(Exception):
    """A step has taken its worker along; `batch` is what was under way."""

    def __init__(self, batch: tuple[SequenceId, ...]) -> None:
        super().__init__()
        self.batch = batch


class FakeRunner:
    """Implements `core.plan.Runner`, as a device would: what a plan needs is taken over when it is
    submitted, but it is carried out as late as can be. With depth 1 that is no difference."""

    def __init__(self, kv: FakeKv, limits: SchedulerConfig, depth: int = 1) -> None:
        self.kv = kv
        self.depth = depth
        self.progress = 0
        self.num_computed = 0
        self.num_unknown = 0
        self.poison: dict[str, int] = {}  # by request id, from which position on it takes it along
        self._limits = limits
        self._work: list[tuple[StepPlan, list[tuple[list[int], list[int]]]]] = []
        self._drawn: dict[int, int] = {}  # by id of the sequence, of the step before

    @property
    def pending(self) -> int:
        return len(self._work)

    def submit(self, plan: StepPlan) -> None:
        assert self.pending < self.depth
        assert plan.num_tokens <= self._limits.max_num_batched_tokens, "over the token budget"
        assert len(plan.chunks) <= self._limits.max_num_seqs, "over the number of sequences"
        assert len({chunk.seq.id for chunk in plan.chunks}) == len(plan.chunks)
        flying = {id(chunk.seq): chunk for before, _ in self._work for chunk in before.chunks}
        written = [block for chunk in plan.chunks for block in self._written(chunk)]
        assert len(set(written)) == len(written), "two chunks write into one block"
        for before, taken in self._work:
            for used, (table, _) in zip(before.chunks, taken, strict=True):
                for chunk in plan.chunks:
                    shared = chunk.seq is not used.seq and set(table) & set(self._written(chunk))
                    assert not shared, "a block that a step in flight uses is written"
        taken = []
        for chunk in plan.chunks:
            seq, last = chunk.seq, flying.get(id(chunk.seq))
            assert chunk.num_tokens > 0, "a chunk without tokens"
            assert chunk.start == (seq.num_computed if last is None else last.end)
            num_tokens = seq.num_tokens + (last is not None and last.samples)
            assert chunk.end <= num_tokens
            assert chunk.end <= len(seq.blocks) * self.kv.block_size, "outside the block table"
            assert chunk.samples == (chunk.end == num_tokens)
            taken.append((list(seq.blocks), seq.token_ids[chunk.start : chunk.end]))
        self._work.append((plan, taken))

    def _written(self, chunk: Chunk) -> list[int]:
        size = self.kv.block_size
        return chunk.seq.blocks[chunk.start // size : -(-chunk.end // size)]

    def batch(self) -> tuple[SequenceId, ...]:
        """What is under way."""
        return tuple({chunk.seq.id: None for plan, _ in self._work for chunk in plan.chunks})

    def collect(self) -> StepOutput:
        for chunk in self._work[0][0].chunks:
            if chunk.end > self.poison.get(chunk.seq.request.id, chunk.end):
                raise Crashed(self.batch())
        plan, taken = self._work.pop(0)
        drawn: list[list[int]] = []
        for chunk, (table, tokens) in zip(plan.chunks, taken, strict=True):
            if not tokens:
                self.num_unknown += 1
                tokens = [self._drawn[id(chunk.seq)]]
            for position, token in enumerate(tokens, chunk.start):
                first = before_first(chunk.seq.request.salt)
                before = self.kv.read(table, position - 1) if position else first
                self.kv.write(table, position, write_slot(token, position, before))
            self.num_computed += chunk.num_tokens
            self.progress += 1
            drawn.append([])
            if chunk.samples:
                context = [self.kv.read(table, position) for position in range(chunk.end)]
                assert POISON not in context, "a step read KV that nobody wrote, or that was freed"
                drawn[-1].append(next_token(context))
        self._drawn = {
            id(chunk.seq): token
            for chunk, tokens in zip(plan.chunks, drawn, strict=True)
            for token in tokens
        }
        return StepOutput(drawn, [None] * len(drawn), 0.0)


@dataclass
class Frame:
    """One frame of a fake store; empty `key` is an invalid header."""

    key: bytes = b""
    slots: list[Slot] = field(default_factory=list)

    @property
    def digest(self) -> bytes:
        flat = [value for slot in self.slots for value in slot]
        return _digest(flat).to_bytes(4, "little")


class FakeFabric:
    """The bytes of one worker's block store, of one epoch."""

    def __init__(self, config: SchedulerConfig, epoch: int) -> None:
        self.epoch = epoch
        self.frames = [Frame() for _ in range(config.num_frames)]

    def copy(self, order: ExportOrder, kv: FakeKv) -> bytes:
        """Copy a block out of the pool as it is now; returns its digest."""
        frame = Frame(order.key, list(kv.blocks[order.block]))
        self.frames[order.frame] = frame
        return frame.digest


def fetch(order: ImportOrder, store: FakeFabric, kv: FakeKv) -> tuple[str, ...]:
    """Copy the wanted blocks into the pool; one word each, as the real transport answers."""
    results = ["ok"] * len(order.wanted)
    if order.recut is None:
        for turn, want in enumerate(order.wanted):
            results[turn], slots = _read(order, store, want)
            if slots:
                kv.blocks[want.block] = slots
        return tuple(results)
    for source in order.recut.blocks:
        word, slots = _read(order, store, source)
        for piece in source.pieces:
            block = order.wanted[piece.turn].block
            into = list(kv.blocks[block])
            end = piece.start + piece.num_tokens
            into[piece.slot : piece.slot + piece.num_tokens] = slots[piece.start : end]
            if slots:
                kv.blocks[block] = into
            if results[piece.turn] == "ok":
                results[piece.turn] = word
    return tuple(results)


def _read(
    order: ImportOrder, store: FakeFabric, want: WantedBlock | SourceBlock
) -> tuple[str, list[Slot]]:
    frame = store.frames[want.frame]
    grant = order.grant  # None: a worker reads its own store
    if grant is not None and (grant.epoch != store.epoch or not verify_mac(SECRET, grant)):
        return "stale_epoch", []
    if frame.key != want.key:
        return "missing", []
    return "ok" if digests_match(frame, want.digest) else "corrupt", list(frame.slots)


def digests_match(frame: Frame, digest: bytes) -> bool:
    return frame.digest == digest


class Before:
    """What a scheduler had before it planned a step.

    `ranks` are those of prompts, `late_ranks` of what waits for fetches, if these are given up now.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.suspect = scheduler.books.suspects.running()
        self.running = list(scheduler.books.running.values())
        self.waiting = list(scheduler.books.waiting)
        self.arriving = list(scheduler.fetches.arriving.values())
        self.decodes = [seq for seq in self.running if seq.num_unscheduled == 1]
        self.awaited = {seq.id for seq in self.running if seq.num_expected > seq.num_tokens}
        prompts = [seq for seq in self.running if seq.num_unscheduled > 1]
        self.ranks = {seq.id: rank(seq) for seq in (*prompts, *self.waiting)}
        self.late_ranks = {seq.id: rank(seq) for seq in self.arriving}
        for seq in scheduler.books.sequences.values():
            if seq.status is Status.IMPORTING:  # it comes back as one that was preempted
                self.late_ranks[seq.id] = (False, 0, seq.order)


class SimWorker:
    """One worker: the real scheduler over fake KV, a fake store, and copies that take their time.

    With depth 2 a step is planned and submitted before the one before it is collected.
    `exports` and `imports` are under way until `finish_export` and `finish_import` are called.
    With `check`, every invariant is verified after every call.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        name: str = "worker",
        epoch: int = 1,
        *,
        check: bool = True,
        depth: int = 1,
        make_scheduler: Callable[..., Scheduler] = Scheduler,
    ) -> None:
        self.config = config
        self.index = StoreIndex(config.num_frames)
        self.leases = LeaseTable(name, epoch, SECRET, self.index)
        self.scheduler = make_scheduler(config, self.leases, self.index)
        self.kv = FakeKv(config)
        self.runner = FakeRunner(self.kv, config, depth)
        self.store = FakeFabric(config, epoch)
        self.exports: list[ExportOrder] = []
        self.imports: list[ImportOrder] = []
        self._plans: list[StepPlan] = []
        self._check = check
        self._came: dict[SequenceId, int] = {}  # tokens admitted when a sequence came
        self._num_admitted = 0

    def step(self, now: float) -> Update:
        """One turn of the engine's loop."""
        before = Before(self.scheduler)
        plan = self.scheduler.schedule(now)
        self._check_plan(before, plan)
        self.imports += plan.imports
        self.poison_free()
        if plan.chunks:
            self.runner.submit(plan)
            self._plans.append(plan)
        if self.runner.pending == self.runner.depth or (self.runner.pending and not plan.chunks):
            self.scheduler.update(self._plans.pop(0), self.runner.collect(), now)
        return self.settle()

    def finish_steps(self, now: float) -> Update:
        """Collect what is in flight, without beginning anything."""
        while self.runner.pending:
            self.scheduler.update(self._plans.pop(0), self.runner.collect(), now)
        return self.settle()

    def _check_plan(self, before: Before, plan: StepPlan) -> None:
        scheduler = self.scheduler
        planned = {chunk.seq.id for chunk in plan.chunks}
        for seq_id in planned & scheduler.books.suspects.keys():
            beside = {chunk.seq.id for before, _ in self.runner._work for chunk in before.chunks}
            assert planned | beside == {seq_id}, "a suspect is not alone"
            assert scheduler.books.suspects[seq_id].leave, "a suspect did not wait for leave"
        asks = any(told.begins for told in scheduler.books.update.alone)
        assert not (asks and self.runner.pending), "leave is asked for beside a step in flight"
        active = (Status.RUNNING, Status.IMPORTING)
        assert sum(s.status in active for s in scheduler.books.suspects.values()) <= 1
        if before.suspect is not None and before.suspect.status is Status.RUNNING:
            assert planned <= {before.suspect.id}
            waits = before.suspect.leave is False or self.runner.pending
            assert planned or waits, "it has the step, and does not use it"
            return
        returning = scheduler.books.in_flight.num_returning()
        for seq in before.decodes:
            known = seq.id not in before.awaited or may_run_ahead(seq, self.config)
            starved = known and seq.status is Status.RUNNING and seq.id not in planned
            assert not starved or returning, "a decode was starved"
        if not self.runner.pending:
            self._check_oldest(before, planned)
        self._check_turns(before, plan)

    def _check_oldest(self, before: Before, planned: set[SequenceId]) -> None:
        """Whoever runs longest goes on, unless blocks in transfer leave it no room.

        A prompt may also be passed, by one that ranks before it.
        """
        alive = [seq for seq in before.running if seq.status is not Status.FINISHED]
        if alive and alive[0].status is Status.WAITING:
            assert not planned & {seq.id for seq in alive}, "the oldest was preempted by another"
            assert not any(seq.status is Status.RUNNING for seq in alive)
            sched = self.scheduler
            elsewhere = [s for s in sched.books.sequences.values() if s.status is Status.EXPORTING]
            others = sched.num_transfers + sched.fetches.num_given_up
            assert elsewhere or others, "nothing else held blocks"
        elif alive and alive[0].id not in planned:
            ranks = before.late_ranks | before.ranks
            passing = [ranks[seq_id] for seq_id in planned & set(ranks)]
            first = before.ranks.get(alive[0].id)
            assert first is not None, "the oldest did not progress"
            assert any(other < first for other in passing), "the oldest did not progress"

    def _check_turns(self, before: Before, plan: StepPlan) -> None:
        """No prompt, waiting or begun, is passed by one that came later than it has to bear."""
        for seq in (*before.waiting, *before.arriving):
            self._came.setdefault(seq.id, self._num_admitted)
        admitted = [s for s in before.waiting if s.status in (Status.RUNNING, Status.IMPORTING)]
        self._num_admitted += sum(seq.num_tokens for seq in admitted)
        chunks = [chunk.seq for chunk in plan.chunks if chunk.seq.id in before.ranks]
        waiting = [seq for seq in before.waiting if seq.status is Status.WAITING]
        paused = [
            seq
            for seq in before.running
            if seq.status is Status.RUNNING and seq.id in before.ranks and seq not in chunks
        ]
        for seq in (*admitted, *chunks):
            for other in (*waiting, *paused):
                bound = self._came[other.id] + PASSING * other.num_tokens
                assert seq.num_preemptions or self._came[seq.id] < bound, "passed for too long"
        for seq in admitted:
            preempted = any(other.num_preemptions for other in waiting)
            assert seq.num_preemptions or not preempted, "a new one passed one that was preempted"

    def settle(self) -> Update:
        """Collect what happened, poison what was freed, verify."""
        update = self.scheduler.take()
        self.exports += update.exports
        for handoff in update.handoffs:
            self.check_commit(handoff)
        self.poison_free()
        if self._check:
            self.check()
        return update

    def check_commit(self, handoff: Handoff) -> None:
        """A commit record names sealed, leased blocks only."""
        num_blocks = self.config.num_blocks_for(handoff.num_tokens)
        assert len(handoff.keys) == len(handoff.digests) == len(handoff.frames) == num_blocks
        assert handoff.grant.grant_id in self.leases
        assert set(self.leases.keys(handoff.grant.grant_id)) == set(handoff.keys)
        for key, digest, frame in zip(handoff.keys, handoff.digests, handoff.frames, strict=True):
            entry = self.index.lookup(key)
            assert entry is not None, "committed, but not in the store"
            assert entry.sealed, "committed before it was sealed"
            assert (entry.frame, entry.digest) == (frame, digest)

    def poison_free(self) -> None:
        for block in self.scheduler.pool._empty:
            self.kv.poison(block)

    def finish_export(self, position: int, now: float, *, ok: bool = True) -> Update:
        """Carry out one copy that was ordered, and acknowledge it."""
        order = self.exports.pop(position)
        digest = self.store.copy(order, self.kv) if ok else None
        if not ok:
            self.store.frames[order.frame] = Frame()
        self.scheduler.exported(order.key, digest, now)
        return self.settle()

    def finish_import(
        self,
        position: int,
        source: SimWorker,
        now: float,
        spoil: Callable[[tuple[str, ...]], tuple[str, ...]] = lambda results: results,
    ) -> Update:
        """Carry out one fetch and acknowledge it; `spoil` may turn results into failures."""
        order = self.imports.pop(position)
        store = self.store if order.grant is None else source.store
        results = spoil(fetch(order, store, self.kv))
        for want, result in zip(order.wanted, results, strict=True):
            if result not in ("ok", "corrupt"):
                self.kv.poison(want.block)
        self.scheduler.imported(order.number, results, now)
        return self.settle()

    def num_fallbacks(self) -> int:
        counters = self.scheduler.counters
        return sum(n for name, n in counters.items() if name.startswith("fallback_"))

    def check(self) -> None:
        """Pool, store, sequences and transfers agree."""
        scheduler = self.scheduler
        scheduler.check()
        self.index.check()
        copying = {order.key for order in self.exports}
        copying |= {order.key for order in scheduler.books.update.exports}
        assert set(scheduler.exports._copying) == copying
        fetching = {order.number for order in (*self.imports, *scheduler.fetches.orders)}
        assert {*scheduler.fetches.imports._orders, *scheduler.fetches.early._orders} == fetching
        credits = sum(e.credits for e in scheduler.exports._exports.values())
        assert self.index.num_reserved == credits, "a credit leaked"
        for seq in scheduler.books.sequences.values():
            places = (scheduler.fetches.arriving, scheduler.books.waiting, scheduler.books.running)
            states = (Status.ARRIVING, Status.WAITING, Status.RUNNING)
            for place, status in zip(places, states, strict=True):
                assert (seq.id in place) == (seq.status is status)
            assert seq.status not in (Status.ARRIVING, Status.WAITING) or not seq.blocks
            if seq.status is Status.ARRIVING:
                assert len(scheduler.fetches.early), "it waits for nothing"
            assert len(seq.blocks) * seq.block_size >= seq.num_computed
            if seq.status is Status.IMPORTING:
                assert seq.id in scheduler.fetches.imports._imports
        assert set(scheduler.exports._exports) <= set(scheduler.books.sequences)

    def check_empty(self) -> None:
        """Nothing is left but caches."""
        scheduler = self.scheduler
        self.check()
        assert not scheduler.num_sequences
        assert not scheduler.num_transfers
        assert not len(scheduler.exports)
        assert not scheduler.exports._waiting
        assert scheduler.pool.num_free == scheduler.pool.num_blocks, "a block leaked"
        assert not len(self.leases), "a lease leaked"
        assert not self.index.num_reserved, "a credit leaked"
        assert self.index.num_used == self.index.num_cached, "a hold leaked"


@dataclass
class Client:
    """What a gateway keeps of one request, and the rules that a stream must obey.

    Tokens of the current attempt only, each index once and in order, every one the expected one,
    exactly one end.
    """

    request: Request
    received: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    handoff: Handoff | None = None
    aborted: bool = False
    leg_ended: bool = False

    def __post_init__(self) -> None:
        request = self.request
        tokens = expected_tokens(request.prompt, request.sampling.max_tokens, request.salt)
        stops = [i for i, t in enumerate(tokens) if t in self.request.sampling.stop_token_ids]
        self.expected = tokens[: stops[0] + 1] if stops else tokens

    @property
    def ended(self) -> bool:
        return self.finish is not None or self.aborted

    @property
    def id(self) -> tuple[str, int, int]:
        return (self.request.id, self.request.choice, self.request.attempt)

    def next_leg(self, **changes: Any) -> Request:
        """The request as it is placed next, with what was received."""
        fields: dict[str, Any] = {
            name: getattr(self.request, name) for name in self.request.__struct_fields__
        }
        self.request = Request(**{**fields, "emitted": tuple(self.received), **changes})
        self.leg_ended = False
        return self.request

    def take(self, delta: TokenDelta) -> None:
        if delta.attempt != self.request.attempt:
            assert delta.attempt < self.request.attempt
            return
        assert not self.aborted, "a delta after the abort"
        assert not self.leg_ended, "a delta after the end"
        assert delta.first_index == len(self.received), "a repeat or a gap"
        self.received += delta.token_ids
        assert self.received == self.expected[: len(self.received)], "wrong tokens"
        if delta.finish is not None:
            self.finish = delta.finish
            self.leg_ended = True
            assert (delta.finish is FinishReason.ERROR) == (delta.error is not None)
            if delta.finish is not FinishReason.ERROR:
                assert self.received == self.expected, "ended too early"
                stopped = self.received[-1] in self.request.sampling.stop_token_ids
                assert delta.finish is (FinishReason.STOP if stopped else FinishReason.LENGTH)

    def take_handoff(self, handoff: Handoff) -> None:
        assert handoff.attempt == self.request.attempt
        assert not self.leg_ended, "two ends"
        assert self.request.hand_off
        assert len(self.received) == len(self.request.emitted) + 1
        self.leg_ended = True
        self.handoff = handoff


def run_alone(
    worker: SimWorker, requests: Sequence[Request], max_steps: int = 1000
) -> list[Client]:
    """Run requests to their ends on one worker, copies done at once."""
    clients = {(r.id, r.choice): Client(r) for r in requests}
    for request in requests:
        worker.scheduler.add(request, 0.0)
    for step in range(max_steps):
        update = worker.step(float(step) / 100)
        while worker.exports:
            more = worker.finish_export(0, float(step) / 100)
            update.deltas += more.deltas
            update.handoffs += more.handoffs
        for delta in update.deltas:
            clients[delta.request_id, delta.choice].take(delta)
        for handoff in update.handoffs:
            clients[handoff.request_id, handoff.choice].take_handoff(handoff)
        if all(client.leg_ended for client in clients.values()):
            return list(clients.values())
    raise AssertionError(f"not ended after {max_steps} steps")
