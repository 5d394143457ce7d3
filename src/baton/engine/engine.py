"""The step: schedule, compute, take in, and move blocks in and out.

    inbox ─▶ drain ─▶ Scheduler.schedule ─▶ imports to the fabric thread
                            │
                            ▼
                      Runner.submit / collect ─▶ Scheduler.update ─▶ exports to the fabric thread
                                                        └─▶ emit(deltas, handoffs, load)

With a runner of depth 2, what is collected is the step before the one that was just submitted.

One thread calls `step`; it alone owns the scheduler, the pool and the running step. Others only
put messages into `inbox`, and ask for `pulse` and `batch`. The fabric thread touches no block but
those it was given, and these are freed only after its answer.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue

import msgspec

from baton.core.pacing import SEAL_WAIT_SHARE, STEP_TIME_WEIGHT
from baton.core.plan import ExportOrder, ImportOrder, Runner, StepPlan, Update
from baton.core.scheduler import Scheduler
from baton.core.sequence import SequenceId
from baton.core.step_cost import MeasuredStep, shape
from baton.core.step_times import StepTimes
from baton.engine import inbox as messages
from baton.engine.inbox import Inbox, Message
from baton.errors import Internal
from baton.fabric.thread import (
    ExportDone,
    ExportJob,
    Fabric,
    FabricFailed,
    FetchDone,
    FetchJob,
)
from baton.fabric.transport import Wanted
from baton.model.kv_cache import KvCache
from baton.types import Pulse, WorkerLoad

NOTE_EVERY_S = 0.02
"""Between two steps whose shape and time are told: enough to judge by, too few to cost time."""


class Emitted(msgspec.Struct, frozen=True):
    """What one turn brought for the outside; totals of the counters are cumulative.

    `drained`: the engine was asked to drain, nothing is left, and nobody holds a lease any more.
    `step`: one that ended since the last turn that told of one; not every step is told.
    """

    update: Update
    load: WorkerLoad
    counters: dict[str, int]
    drained: bool
    step: MeasuredStep | None = None


class Engine:
    """One model, one KV pool, one scheduler, driven step by step.

    `fabric` may be set after construction, since its answers go to `inbox`; an engine without
    one serves no handoffs.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        kv: KvCache,
        emit: Callable[[Emitted], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scheduler = scheduler
        self.inbox: Inbox = SimpleQueue()
        self.fabric: Fabric | None = None
        self.stopping = False
        self._runner = runner
        self._kv = kv
        self._emit = emit
        self._clock = clock
        self._step_s = 0.0
        self._step_times = StepTimes()
        self._predicted_s = 0.0
        self._num_moves = 0
        self._rests = True
        self._submitted: deque[tuple[StepPlan, int]] = deque()  # with their numbers of tokens
        self._told: WorkerLoad | None = None
        self._noted: MeasuredStep | None = None
        self._note_at = 0.0

    def step(self) -> bool:
        """One turn. Returns whether a step ran; if not, there is nothing to do until news comes."""
        began = self._clock()
        self._drain_inbox()
        plan = self.scheduler.schedule(self._clock())
        for order in plan.imports:
            self._start_import(order)
        if plan.chunks:
            # First of all it is known: submitting may be all of the step, and may fail.
            self._submitted.append((plan, plan.num_tokens))
            self._predicted_s = sum(self._step_times.predict(num) for _, num in self._submitted)
            self._runner.submit(plan)
        pending = self._runner.pending
        collects = pending and (pending == self._runner.depth or not plan.chunks)
        collected = self._collect() if collects else None
        self._pass_on(stepped=bool(pending))
        if collected is not None:
            self._note(*collected, began)
        if self.scheduler.exports.num_awaited:
            self._await_seals()
        return bool(pending)

    def _collect(self) -> tuple[StepPlan, float]:
        """Take in the oldest step; what it was, and how long the runner took for it."""
        output = self._runner.collect()
        plan, num_tokens = self._submitted[0]
        self._step_s += STEP_TIME_WEIGHT * (output.elapsed_s - self._step_s)
        self._step_times.observe(num_tokens, output.elapsed_s)
        self._num_moves += 1
        self.scheduler.update(plan, output, self._clock())
        self._submitted.popleft()
        return plan, output.elapsed_s

    def _note(self, plan: StepPlan, elapsed_s: float, began: float) -> None:
        """Keep, for the next report, what a step took with the engine's own work around it."""
        # By when it began: a choice by when it ends would fall on the long ones.
        if began >= self._note_at:
            now = self._clock()
            self._note_at = now + NOTE_EVERY_S
            self._noted = MeasuredStep(shape(plan), max(elapsed_s, now - began))

    def wait(self) -> None:
        """Sleep until there is a message, or until a deadline or lease runs out."""
        deadline = self.scheduler.next_deadline()
        timeout = None if deadline is None else max(0.0, deadline - self._clock())
        self._rests = True
        try:
            message = self.inbox.get(timeout=timeout)
        except Empty:
            return
        finally:
            self._rests = False
        self._receive(message)

    @property
    def progress(self) -> int:
        """Moves while anything is done. Any thread may read it."""
        return self._num_moves + self._runner.progress

    def pulse(self) -> Pulse:
        """The engine's part of the sign of life. Any thread may ask, also within a step."""
        copied = (0, False) if self.fabric is None else self.fabric.copied()
        return Pulse(self.progress, not self._rests, self._predicted_s, (), *copied)

    def batch(self) -> tuple[SequenceId, ...]:
        """What is in the steps under way. Any thread may ask, also after a step has failed."""
        under_way = tuple(self._submitted)
        return tuple(dict.fromkeys(chunk.seq.id for plan, _ in under_way for chunk in plan.chunks))

    def load(self) -> WorkerLoad:
        exports = self.scheduler.exports
        index = exports.index
        frame_bytes = self.scheduler.config.kv_format.block_bytes
        return msgspec.structs.replace(
            self.scheduler.load(),
            step_s=self._step_s,
            store_used_bytes=index.num_used * frame_bytes,
            store_total_bytes=index.num_frames * frame_bytes,
            num_held_frames=index.num_used - index.num_cached,
            num_reserved_frames=index.num_reserved,
            num_leases=len(exports.leases),
            num_transfers=self.scheduler.num_transfers + self.scheduler.fetches.num_given_up,
        )

    def _pass_on(self, stepped: bool) -> None:
        """Start the copies that are due, and tell the outside what happened."""
        update = self.scheduler.take()
        for export in update.exports:
            self._start_export(export)
        drained = self.scheduler.is_drained()
        load = self.load()
        # A message that came, or a lease that ran out, may show in nothing but the load.
        told = update.deltas or update.sealed or update.landed or update.handoffs
        news = told or update.alone
        if stepped or news or load != self._told or drained:
            self._told = load
            counters, noted = dict(self.scheduler.counters), self._noted
            self._noted = None
            self._emit(Emitted(update, load, counters, drained, noted))

    def _await_seals(self) -> None:
        """Give the copies for handoffs a moment: their answers would else wait for a whole step.

        The copies go faster while nothing is computed, and readers can begin a step earlier.
        """
        limit = time.monotonic() + SEAL_WAIT_SHARE * self._step_s
        while self.scheduler.exports.num_awaited:
            try:
                self._receive(self.inbox.get(timeout=max(0.0, limit - time.monotonic())))
            except Empty:
                break
        self._pass_on(stepped=False)

    def _drain_inbox(self) -> None:
        while True:
            try:
                message = self.inbox.get_nowait()
            except Empty:
                return
            self._receive(message)

    def _receive(self, message: Message) -> None:
        self._num_moves += 1
        scheduler = self.scheduler
        match message:
            case messages.Submit(request):
                scheduler.add(request, self._clock())
            case messages.Abort(seq_id):
                scheduler.abort(seq_id)
            case messages.Proceed(seq_id):
                scheduler.proceed(seq_id)
            case messages.Offer(sealed):
                scheduler.offer(sealed, self._clock())
            case messages.Wire(source):
                scheduler.link(source)
            case messages.Lend(ask):
                scheduler.lend(ask, self._clock())
            case messages.Renew(grant_ids):
                scheduler.renew(grant_ids, self._clock())
            case messages.Release(grant_ids):
                scheduler.release(grant_ids)
            case messages.Drain():
                scheduler.drain()
            case messages.Stop():
                self.stopping = True
            case ExportDone():
                scheduler.exported(message.key, message.digest, self._clock())
            case FetchDone():
                self._finish_import(message)
            case FabricFailed():
                # The fabric's own code is broken, so nothing that it did can be trusted.
                raise Internal(f"the fabric failed at {message.tag!r}: {message.error}")

    def _start_export(self, order: ExportOrder) -> None:
        assert self.fabric is not None, "a hand-off was accepted without a fabric"
        # Steps that were submitted since do not write to it any more.
        source = self._kv.reader(order.block, self._runner.pending)
        self.fabric.export(ExportJob(order.key, order.frame, order.key, source))

    def _start_import(self, order: ImportOrder) -> None:
        assert self.fabric is not None, "a handoff was accepted without a fabric"
        landing = [(want.block, self._kv.landing(want.block)) for want in order.wanted]
        wanted = tuple(
            Wanted(want.key, want.frame, want.digest, place, want.num_tokens)
            for want, (_, place) in zip(order.wanted, landing, strict=True)
        )

        def land(index: int) -> None:
            self._kv.land(*landing[index])

        self.fabric.fetch(
            FetchJob(
                order.number, order.grant, wanted, order.deadline, land, order.codec, order.recut
            )
        )

    def _finish_import(self, done: FetchDone) -> None:
        number = done.tag
        assert isinstance(number, int)
        results = tuple(result.value for result in done.results)
        self.scheduler.imported(number, results, self._clock(), done.elapsed_s)
