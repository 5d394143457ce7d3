"""The placing half of the gateway: `core.handoff.RequestTable` with real workers and a real clock.

The table decides everything about a request's life; see there. Here its instructions go out on the
workers' streams, its deltas into the queues of those who read them, and a timer wakes it. What is
measured of a request is collected in its waterfall, which is logged at the end.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from baton.core.handoff import RequestTable
from baton.core.instructions import (
    Ask,
    Instruction,
    Offer,
    Proceed,
    Release,
    Renew,
    Submit,
    Withdraw,
)
from baton.core.life import Content, HandoffPolicy, Life
from baton.core.liveness import PATIENCE_S, Frozen
from baton.core.router import Router, WorkerInfo
from baton.core.sequence import SequenceId
from baton.errors import ServeError, WorkerLost
from baton.gateway.auditor import Auditor
from baton.gateway.dispatch import Readiness, ServedModel
from baton.gateway.fabric_check import FabricCheck
from baton.gateway.registry import Registry
from baton.gateway.watch import Watch
from baton.observe.block_ids import BlockIds
from baton.observe.events import RecentRequests, Waterfall
from baton.rpc.client import WorkerLink
from baton.rpc.messages import Hello, StepReport
from baton.types import Request, Role, TokenDelta

logger = logging.getLogger(__name__)


class _Reader:
    """Who reads one choice's tokens, and what is measured of it."""

    __slots__ = ("life", "queue", "waterfall")

    def __init__(self, life: Life) -> None:
        self.life = life
        self.queue: asyncio.Queue[TokenDelta] = asyncio.Queue()
        self.waterfall = Waterfall(
            request_id=life.request.id,
            choice=life.request.choice,
            num_prompt_tokens=len(life.request.prompt),
        )


class PlacingDispatcher:
    """The real `Dispatcher`. Runs on the event loop's thread; owns request table and registry."""

    def __init__(
        self,
        gateway_id: str,
        gateway_epoch: int,
        secret: bytes,
        runtime_dir: Path,
        expected: Mapping[Role, int],
        *,
        router: Router,
        policy: HandoffPolicy,
        patience_s: float = PATIENCE_S,
        auditor: Auditor | None = None,
    ) -> None:
        self.registry = Registry(
            gateway_id,
            gateway_epoch,
            secret,
            runtime_dir,
            expected,
            on_join=self._joined,
            on_report=self._reported,
            on_lost=self._lost,
        )
        self.fabric_check = FabricCheck(self.registry, router)
        self.recent = RecentRequests()
        self._block_ids = BlockIds()
        self.watch = Watch(patience_s, self._froze)
        self.auditor = auditor or Auditor()
        self._table = RequestTable(router, policy)
        self._readers: dict[tuple[str, int], _Reader] = {}
        self._suspects: dict[str, tuple[SequenceId, ...]] = {}  # of workers about to exit
        self._timer: asyncio.TimerHandle | None = None
        self._wake_at = 0.0

    # `gateway.dispatch.Dispatcher` --------------------------------------------------------------

    def readiness(self) -> Readiness:
        return self.registry.readiness()

    def model(self) -> ServedModel | None:
        hello = self.registry.hello()
        return None if hello is None else ServedModel(hello.max_model_len, hello.vocab_size)

    async def generate(self, request: Request) -> AsyncIterator[TokenDelta]:
        """See `Dispatcher.generate`."""
        now = time.monotonic()
        life = self._table.add(request, now)
        self.auditor.arrived(now)
        reader = self._readers[life.key] = _Reader(life)
        self._carry_out()
        try:
            while True:
                delta = await reader.queue.get()
                yield delta
                if delta.finish is not None:
                    return
        finally:
            if life.finish is None:  # nobody reads any more
                self._table.abandon(*life.key, time.monotonic())
                self._finished(life)
                self._carry_out()

    @property
    def counters(self) -> Counter[str]:
        """Running totals of what befell requests (`core.counters.REQUEST_COUNTERS`)."""
        return self._table.counters

    async def close(self) -> None:
        """Leave the workers. Nobody may read any more."""
        if self._timer is not None:
            self._timer.cancel()
        self.watch.close()
        await self.registry.close()

    # What workers say ---------------------------------------------------------------------------

    def _joined(self, hello: Hello) -> None:
        fmt = hello.kv_format
        info = WorkerInfo(
            hello.worker_id,
            hello.role,
            hello.epoch,
            hello.num_blocks,
            fmt.block_size,
            hello.num_frames,
            hello.keeps_blocks,
            key_class=f"{hello.numerics}/{fmt.dtype}/{fmt.block_size}",
        )
        content = Content(hello.fingerprint, hello.numerics, fmt.block_size, fmt)
        self.watch.joined(hello.worker_id)
        self.auditor.joined(hello.worker_id, hello.role)
        self._table.join(info, content, time.monotonic())
        self._carry_out()

    def _lost(self, worker_id: str, reason: str) -> None:
        # The reason holds addresses: it is for the log, where the registry has put it.
        self.watch.left(worker_id)
        self.auditor.lost(worker_id)
        self._table.lose(worker_id, time.monotonic(), self._suspects.pop(worker_id, None))
        self._carry_out()

    def _froze(self, frozen: Frozen) -> None:
        self.registry.set_frozen(frozen.worker_id, True)
        self._table.freeze(frozen.worker_id, time.monotonic(), frozen.stuck_at)
        self._carry_out()

    def _reported(self, worker_id: str, report: StepReport) -> None:
        table, now = self._table, time.monotonic()
        if report.draining:
            table.drain(worker_id)
        if report.fatal is not None:
            self._suspects[worker_id] = report.suspects
        if report.measured:
            self.fabric_check.measured(report.measured)
        for sealed in report.sealed:
            if not self.fabric_check.took(sealed):
                table.sealed(worker_id, sealed, now)
        for landed in report.landed:
            table.landed(landed)
        for times in report.times:
            life = table.timed(worker_id, times)
            if life is not None:
                self._readers[life.key].waterfall.add(times, took_over=life.took_over)
                self.auditor.leg(worker_id, life, times, life.took_over)
        for delta in report.deltas:
            table.delivered(worker_id, delta, now)
        for handoff in report.handoffs:
            table.handed_off(worker_id, handoff, now)
        for told in report.alone:
            seq_id = (told.request_id, told.choice, told.attempt)
            table.alone(worker_id, seq_id, told.begins)
        if self.watch.heard(worker_id, report.pulse):
            self.registry.set_frozen(worker_id, False)
            if not report.draining:
                table.thaw(worker_id, now)
        self._carry_out()
        if report.step is not None:
            self.auditor.stepped(worker_id, report.step)
        self.auditor.tick(now)

    # What follows -------------------------------------------------------------------------------

    def _carry_out(self) -> None:
        """Do what the table wants done, and see to it that it is woken in time."""
        outcome = self._table.take()
        for instruction in outcome.instructions:
            self._instruct(instruction)
        for delta in outcome.deltas:
            reader = self._readers[delta.request_id, delta.choice]
            reader.queue.put_nowait(delta)
            if delta.finish is not None:
                self._finished(reader.life)
        at = self._table.next_deadline()
        if at is not None and (self._timer is None or at < self._wake_at):
            if self._timer is not None:
                self._timer.cancel()
            delay_s = max(0.0, at - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._wake)
            self._wake_at = at

    def _wake(self) -> None:
        self._timer = None
        self._table.tick(time.monotonic())
        self._carry_out()

    def _instruct(self, instruction: Instruction) -> None:
        link = self.registry.link(instruction.worker_id)
        if isinstance(instruction, Submit):
            self._submit(link, instruction)
        elif link is not None:
            match instruction:
                case Offer(_, sealed):
                    link.offer(sealed)
                case Ask(_, lend):
                    link.lend(lend)
                case Withdraw(_, request_id, choice, attempt):
                    link.abort(request_id, choice, attempt)
                case Proceed(_, request_id, choice, attempt):
                    link.proceed(request_id, choice, attempt)
                case Renew(_, grant_ids):
                    for grant_id in grant_ids:
                        link.renew(grant_id)
                case Release(_, grant_id):
                    link.release(grant_id)

    def _submit(self, link: WorkerLink | None, instruction: Submit) -> None:
        leg = instruction.request
        try:
            if link is None:
                raise WorkerLost(f"worker {instruction.worker_id} is gone", stage="queue")
            link.submit(leg)
        except ServeError as error:
            self._table.refuse(leg.id, leg.choice, error, time.monotonic())
            self._carry_out()

    def _finished(self, life: Life) -> None:
        reader = self._readers.pop(life.key)
        waterfall, placement = reader.waterfall, life.placement
        assert life.finish is not None
        assert life.ended_at is not None
        assert placement is not None
        waterfall.prefill_worker = placement.prefill
        waterfall.decode_worker = placement.decode
        waterfall.predicted_tokens = placement.predicted_tokens
        waterfall.attempt = life.attempt
        waterfall.num_cached_tokens = life.num_cached
        waterfall.num_early_blocks = life.num_early_blocks
        waterfall.num_generated_tokens = len(life.tokens)
        waterfall.finish = life.finish.value
        waterfall.error = life.error.message if life.error else None
        if life.first_token_at is not None:
            waterfall.ttft_s = life.first_token_at - life.received
        waterfall.e2e_s = life.ended_at - life.received
        if life.content is not None:
            size = waterfall.block_size = life.content.block_size
            waterfall.prompt_blocks = self._block_ids.of(
                life.keys[: waterfall.num_prompt_tokens // size]
            )
        self.recent.add(waterfall)
        self.auditor.finished(waterfall)
        logger.info(
            "finished request=%s choice=%d reason=%s prefill=%s decode=%s prompt=%d cached=%d "
            "generated=%d attempt=%d ttft_ms=%.0f e2e_ms=%.0f",
            waterfall.request_id,
            waterfall.choice,
            waterfall.finish,
            waterfall.prefill_worker or "-",
            waterfall.decode_worker,
            waterfall.num_prompt_tokens,
            waterfall.num_cached_tokens,
            waterfall.num_generated_tokens,
            waterfall.attempt,
            1000 * waterfall.ttft_s,
            1000 * waterfall.e2e_s,
        )
