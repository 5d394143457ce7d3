"""One worker of the twin: the engine's loop around the real scheduler, on virtual time.

    IDLE ──news──▶ STEP: inbox, schedule, submit ──it ends──▶ update, report ─┬─▶ STEP
      ▲                                                                       ├─▶ SEALING ──▶ STEP
      └───────────────────────── nothing to run ──────────────────────────────┘

The loop is that of `engine.Engine`, line by line; what the engine waits for is an event here. Where
the scheduler foresees nothing but one token a sequence (`steady_steps`), many steps are one event.
News cuts them short: the steps that have ended by then are taken in, the one that runs goes on.

Copies into the store run beside, one after the other, and are acknowledged before the next step
that begins after their end. Tokens that nobody decides by are told to the gateway together, with
the times at which they were drawn: the scheduler tells them together, and as a sequence draws one
in every step unless it was preempted, the ends of the steps are their times.
"""

from __future__ import annotations

import enum
import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable

from baton.core.lease import LeaseTable
from baton.core.pacing import SEAL_WAIT_SHARE, STEP_TIME_WEIGHT
from baton.core.plan import ImportOrder, StepPlan, Update
from baton.core.scheduler import Scheduler
from baton.core.store_index import StoreIndex
from baton.twin.clock import Clock
from baton.twin.deployment import WorkerSetup
from baton.twin.fetches import Fetcher
from baton.twin.prompts import extend_names
from baton.twin.report import Report, Tokens
from baton.twin.results import NodeTotals
from baton.twin.runner import CostRunner
from baton.twin.tracing import Tracer
from baton.types import FinishReason, TokenDelta

MAX_JUMP = 256
"""Steps in one event: what they give to the store is copied only when they are over."""

_FIRST_STRIDE = 16
"""Steps in one event where news comes often; twice as many each time that none came. What is
foreseen and then cut off costs little more than the addition of its times."""

Message = Callable[[], object]


class _State(enum.Enum):
    IDLE = enum.auto()
    STEP = enum.auto()
    SEALING = enum.auto()
    DEAD = enum.auto()


class Node:
    """A worker process. `tell` gets its reports at the time at which they are made; tokens have the
    times at which the gateway gets them, if each was sent at once: `message_s` later."""

    def __init__(
        self,
        clock: Clock,
        setup: WorkerSetup,
        fetcher: Fetcher,
        tell: Callable[[Node, Report], None],
        tracer: Tracer | None,
        message_s: float = 0.0,
    ) -> None:
        self.setup = setup
        self.totals = NodeTotals()
        self.epoch = 0
        self._clock = clock
        self._fetcher = fetcher
        self._tell_gateway = tell
        self._tracer = tracer
        self._message_s = message_s
        self._frozen_until = 0.0
        self.start()

    def start(self) -> None:
        """A new process: a new epoch, nothing in its memory."""
        self.epoch += 1
        setup = self.setup
        self.index = StoreIndex(setup.limits.num_frames)
        self.leases = LeaseTable(setup.worker_id, self.epoch, bytes(32), self.index)
        self.scheduler = Scheduler(
            setup.limits, self.leases, self.index, extend_names, tells_each=False
        )
        self._runner = CostRunner(self._clock, setup.cost, setup.depth, setup.rests)
        self._state = _State.IDLE
        self._inbox: list[Message] = []
        self._submitted: deque[StepPlan] = deque()
        self._version = 0  # of the event that is awaited; others are out of date
        self._ends: list[float] = []
        self._stride = _FIRST_STRIDE
        self._step_s = 0.0
        self._copies: deque[tuple[float, bytes]] = deque()
        self._copier_free_at = 0.0
        self._told_at: list[float] = []  # by step so far: when its tokens are at the gateway
        self._next_step: dict[str, int] = {}  # by request: that of the first token not told yet
        self._held: dict[str, Tokens] = {}  # by request; there is one choice

    @property
    def is_alive(self) -> bool:
        return self._state is not _State.DEAD

    # What comes in ---------------------------------------------------------------------------

    def put(self, message: Message, *, urgent: bool = True) -> None:
        """Something for the engine: it is looked at between two steps.

        What is not urgent may wait for the end of several, for no sequence's lot depends on it.
        """
        if self._state is _State.DEAD:
            return
        if self._state is _State.SEALING:
            message()
            if not self.scheduler.exports.num_awaited:
                self._end_sealing()
            return
        self._inbox.append(message)
        if self._state is _State.IDLE:
            self._state = _State.STEP
            self._await(self._clock.now, self._turn)
        elif urgent and len(self._ends) > 1:
            self._cut_short()

    def kill(self) -> None:
        """The process is gone; what it had drawn and sent by now is on its way."""
        ended = self._ends[: bisect_left(self._ends, self._clock.now)]
        tokens: list[Tokens] = []
        if ended:
            self._take_in(ended, ended[-1])
            tokens = self._keep_back(self.scheduler.take(), len(ended))
        self.scheduler.tell_rest()
        tokens += self._keep_back(self.scheduler.take(), 0)
        self._tell_gateway(self, Report([*tokens, *self._held.values()]))
        self._state = _State.DEAD
        self._version += 1

    def freeze(self, seconds: float) -> None:
        """The process stands still; it goes on where it was."""
        self._frozen_until = max(self._frozen_until, self._clock.now + seconds)
        if len(self._ends) > 1:
            self._cut_short()

    # The loop --------------------------------------------------------------------------------

    def _await(self, when: float, action: Callable[[], None]) -> None:
        """Only the newest of these events happens; in a frozen process, when it goes on."""
        self._version += 1
        version = self._version
        self._clock.at(when, lambda: self._due(version, action))

    def _due(self, version: int, action: Callable[[], None]) -> None:
        if version != self._version:
            return
        if self._frozen_until > self._clock.now:
            self._clock.at(self._frozen_until, lambda: self._due(version, action))
        else:
            action()

    def _turn(self) -> None:
        now, runner = self._clock.now, self._runner
        self._acknowledge_copies()
        if self._inbox:
            inbox, self._inbox = self._inbox, []
            for message in inbox:
                message()
        plan = self.scheduler.schedule(now)
        for order in plan.imports:
            self._fetch(order)
        if plan.chunks:
            runner.submit(plan)
            self._submitted.append(plan)
        if runner.pending and (runner.pending == runner.depth or not plan.chunks):
            self._await_step()
            return
        self._pass_on(0)
        if runner.pending:
            self._await(now, self._turn)
        else:
            self._rest()

    def _await_step(self) -> None:
        steps = 1
        if self._runner.pending == self._runner.depth:
            foreseen = self.scheduler.steady_steps(self._submitted[0])
            steps = min(MAX_JUMP, self._stride, foreseen)
        before = math.inf
        if steps > 1:
            deadline = self.scheduler.next_deadline()
            before = math.inf if deadline is None else deadline
        self._ends = self._runner.ends(steps, before)
        self._stride = min(2 * self._stride, MAX_JUMP)
        self._await(self._ends[-1], self._ended)

    def _cut_short(self) -> None:
        """News has come: the step that runs now is the last before it is heard."""
        running = bisect_left(self._ends, self._clock.now)
        self._stride = max(_FIRST_STRIDE, running)
        if running < len(self._ends) - 1:
            del self._ends[running + 1 :]
            self._await(self._ends[-1], self._ended)

    def _ended(self) -> None:
        ends, self._ends = self._ends, []
        foreseen, ends[-1] = ends[-1], self._clock.now  # later, if the process was frozen
        self._take_in(ends, foreseen)
        self._pass_on(len(ends))
        if self.scheduler.exports.num_awaited and self._copies:
            self._state = _State.SEALING
            limit = self._clock.now + SEAL_WAIT_SHARE * self._step_s
            self._await(min(limit, self._copies[-1][0]), self._end_sealing)
        else:
            self._turn()

    def _end_sealing(self) -> None:
        self._state = _State.STEP
        self._acknowledge_copies()
        self._pass_on(0)
        self._turn()

    def _rest(self) -> None:
        """Nothing runs: wait for news, a copy's end, a deadline or the end of a lease."""
        self._state = _State.IDLE
        due = self.scheduler.next_deadline()
        times = [] if due is None else [due]
        if self._copies:
            times.append(self._copies[-1][0])
        if times:
            self._await(min(times), self._wake)

    def _wake(self) -> None:
        self._state = _State.STEP
        self._turn()

    def _take_in(self, ends: list[float], over_at: float) -> None:
        """Tell the scheduler what the steps that ended at these times drew.

        over_at: when the device had done the last of them.
        """
        scheduler, runner = self.scheduler, self._runner
        plan = self._submitted.popleft()
        began = runner.began
        self.totals.count(runner.oldest, began, ends)
        self._told_at += [end + self._message_s for end in ends]
        if len(ends) == 1:
            output = runner.collect()
            self._step_s += STEP_TIME_WEIGHT * (output.elapsed_s - self._step_s)
            scheduler.update(plan, output, ends[0])
        else:
            for before, end in zip([began, *ends], ends, strict=False):
                self._step_s += STEP_TIME_WEIGHT * (end - before - self._step_s)
            self._submitted.clear()
            ahead = scheduler.advance(plan, runner.collect_all(len(ends)), ends)
            runner.go_on(ahead, over_at)
            if ahead is not None:
                self._submitted.append(ahead)
        if self._tracer is not None:
            self._tracer.step(self.setup.worker_id, plan, began, ends)

    # What goes out ---------------------------------------------------------------------------

    def _pass_on(self, num_ended: int) -> None:
        """Begin the copies that are due, and tell the gateway what it may decide by.

        num_ended: steps that were taken in since the last time.
        """
        update = self.scheduler.take()
        if update.exports:
            self._copy([order.key for order in update.exports])
        tokens = self._keep_back(update, num_ended)
        told = update.sealed, update.landed, update.handoffs
        if tokens or any(told) or update.alone:
            self._tell_gateway(self, Report(tokens, *told, update.times, update.alone))

    def _keep_back(self, update: Update, num_ended: int) -> list[Tokens]:
        """Keep tokens back, and return those that must go: of a leg's beginning, and of its end."""
        held, due = self._held, []
        for delta in update.deltas:
            request_id = delta.request_id
            times = self._times(delta, num_ended)
            tokens = held.get(request_id)
            if tokens is None or tokens.first.attempt != delta.attempt:
                tokens = Tokens(delta, times)
                if delta.finish is None and delta.num_cached is None:
                    held[request_id] = tokens
                else:
                    due.append(tokens)
                continue
            tokens.last = delta
            tokens.times += times
            if delta.finish is not None:
                due.append(held.pop(request_id))
        return due

    def _times(self, delta: TokenDelta, num_ended: int) -> list[float]:
        """When the gateway gets the tokens of `delta`: the newest are of the steps that have just
        ended, those that were kept back of one step after the other, from the last told on."""
        ended, count = self._told_at, len(delta.token_ids)
        num_new = 0 if delta.finish is FinishReason.ERROR else num_ended
        if count == num_new:
            begin, times = 0, ended[len(ended) - count :]
        else:
            begin = self._next_step[delta.request_id] if count else 0
            times = ended[begin : begin + count - num_new] + ended[len(ended) - num_new :]
        assert len(times) == count, "a sequence was in every step, or was preempted"
        if delta.finish is not None:
            self._next_step.pop(delta.request_id, None)
        else:
            self._next_step[delta.request_id] = len(ended) if num_new else begin + count
        return times

    def _copy(self, keys: list[bytes]) -> None:
        link, size = self.setup.copy, self.setup.limits.kv_format.block_bytes
        block_s = link.per_block_s + size / link.bytes_per_s
        end = max(self._copier_free_at, self._clock.now)
        for key in keys:
            end += block_s
            self._copies.append((end, key))
        self._copier_free_at = end

    def _acknowledge_copies(self) -> None:
        now, copies = self._clock.now, self._copies
        while copies and copies[0][0] <= now:
            key = copies.popleft()[1]
            self.scheduler.exported(key, key[:16], now)

    def _fetch(self, order: ImportOrder) -> None:
        epoch, began = self.epoch, self._clock.now

        def arrived(results: tuple[str, ...], elapsed_s: float) -> None:
            if self.epoch != epoch or not self.is_alive:
                return
            if self._tracer is not None:
                self._tracer.fetch(self.setup.worker_id, order, began, self._clock.now)
            self.put(
                lambda: self.scheduler.imported(order.number, results, self._clock.now, elapsed_s)
            )

        if order.grant is None:
            self._fetcher.own(order, self._restore(len(order.wanted)), arrived)
        else:
            self._fetcher.fetch(self, order, arrived)

    def _restore(self, num_blocks: int) -> float:
        """The copier's time for blocks out of this worker's own store; returns when it is done."""
        link, size = self.setup.copy, self.setup.limits.kv_format.block_bytes
        begin = max(self._copier_free_at, self._clock.now)
        self._copier_free_at = begin + num_blocks * (link.per_block_s + size / link.bytes_per_s)
        return self._copier_free_at
