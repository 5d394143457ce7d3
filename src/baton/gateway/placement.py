"""The placing half of the gateway: requests on workers, from placement to terminal delta.

    place ─▶ PREFILL leg ──token 1──▶ client
       │         ├──Sealed──▶ offered to the decode worker, which may fetch early
       │         └──Handoff──▶ DECODE leg ──tokens──▶ client ─▶ ended
       ├───▶ LOCAL leg (one worker does both) ──tokens──▶ client ─▶ ended
       └───▶ BORROWING ──Sealed by the lender, or `BORROW_WAIT_S`──▶ PREFILL or LOCAL leg
    a worker that is lost ends every leg on it with `worker_lost`

Handoffs are passed on when they arrive, not when the client reads: a slow client holds no lease.
The gateway owns every lease: it renews while somebody may still read, and releases a prompt's when
the decode worker has shown its first token, a lender's when the prompt is computed, and all at
whatever end comes first.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import msgspec

from baton.core.keys import chain, root_key
from baton.core.router import Placement, Router, WorkerInfo
from baton.errors import Internal, ServeError, Unavailable, WorkerLost
from baton.gateway.dispatch import Readiness, ServedModel
from baton.gateway.fabric_check import FabricCheck
from baton.gateway.registry import Registry
from baton.observe.events import RecentRequests, Waterfall
from baton.rpc.messages import Hello, StepReport
from baton.types import (
    FinishReason,
    Grant,
    Handoff,
    Landed,
    Lend,
    Request,
    Role,
    Sealed,
    StageTimes,
    TokenDelta,
)

logger = logging.getLogger(__name__)

BORROW_WAIT_S = 0.25
"""For how long a request waits for a lender's answer; a busy one answers between two steps."""


class _Live:
    """One choice on its way through the workers. `worker_id` has the present leg."""

    __slots__ = (
        "borrowing",
        "ended",
        "grant",
        "keys",
        "loan",
        "num_landed",
        "placement",
        "queue",
        "received",
        "request",
        "tokens",
        "took_over",
        "waterfall",
        "worker_id",
    )  # fmt: skip

    def __init__(
        self, request: Request, placement: Placement, keys: list[bytes], now: float
    ) -> None:
        self.request = request
        self.keys = keys  # of the prompt's full blocks
        self.placement = placement
        self.worker_id = placement.prefill or placement.decode
        self.took_over = False
        self.tokens: list[int] = []
        self.grant: Grant | None = None  # to read the prompt's blocks
        self.loan: Grant | None = None  # to read what a lender has of them
        self.borrowing: asyncio.TimerHandle | None = None
        self.num_landed = 0
        self.ended = False
        self.received = now
        self.queue: asyncio.Queue[TokenDelta] = asyncio.Queue()
        self.waterfall = Waterfall(
            request_id=request.id,
            choice=request.choice,
            num_prompt_tokens=len(request.prompt),
            prefill_worker=placement.prefill,
            decode_worker=placement.decode,
            predicted_tokens=placement.predicted_tokens,
        )


class PlacingDispatcher:
    """The real `Dispatcher`. Runs on the event loop's thread; owns router, registry and leases."""

    def __init__(
        self,
        gateway_id: str,
        gateway_epoch: int,
        secret: bytes,
        runtime_dir: Path,
        expected: Mapping[Role, int],
        *,
        router: Router,
        lease_ttl_s: float,
        fetch_early: bool = True,
    ) -> None:
        self._fetch_early = fetch_early
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
        self.counters: Counter[str] = Counter()
        self._router = router
        self._lease_ttl_s = lease_ttl_s
        self._live: dict[tuple[str, int], _Live] = {}

    # `gateway.dispatch.Dispatcher` --------------------------------------------------------------

    def readiness(self) -> Readiness:
        return self.registry.readiness()

    def model(self) -> ServedModel | None:
        hello = self.registry.hello()
        return None if hello is None else ServedModel(hello.max_model_len, hello.vocab_size)

    async def generate(self, request: Request) -> AsyncIterator[TokenDelta]:
        """See `Dispatcher.generate`."""
        live = self._place(request)
        try:
            while True:
                delta = await live.queue.get()
                yield delta
                if delta.finish is not None:
                    return
        finally:
            self._abandon(live)

    @property
    def num_live(self) -> int:
        return len(self._live)

    async def renew_leases(self) -> None:
        """Renew every third of their time to live the leases that somebody may still read."""
        while True:
            await asyncio.sleep(self._lease_ttl_s / 3)
            for live in self._live.values():
                for grant in (live.grant, live.loan):
                    link = grant and self.registry.link(grant.source)
                    if grant and link:
                        link.renew(grant.grant_id)

    # A request's life ---------------------------------------------------------------------------

    def _place(self, request: Request) -> _Live:
        hello = self.registry.hello()
        if hello is None:
            raise Unavailable("no worker is there yet", stage="queue")
        root = root_key(hello.fingerprint, hello.numerics, request.salt)
        keys = chain(root, request.prompt, hello.kv_format.block_size)
        placement = self._router.place(
            request.id, request.choice, len(request.prompt), keys, _key_class(hello)
        )
        live = _Live(request, placement, keys, time.monotonic())
        self._live[request.id, request.choice] = live
        lender = placement.lender and self.registry.link(placement.lender)
        if lender:
            first = placement.first_lent
            lender.lend(
                Lend(
                    request.id,
                    request.choice,
                    request.attempt,
                    request.tenant,
                    first,
                    tuple(keys[first:]),
                )
            )
            loop = asyncio.get_running_loop()
            live.borrowing = loop.call_later(BORROW_WAIT_S, self._begin, live, None)
            return live
        try:
            self._submit_first(live, None)
        except ServeError:
            self._end(live, "error")
            raise
        return live

    def _begin(self, live: _Live, prefix: Sealed | None) -> None:
        """The lender has answered, or has not in time."""
        if live.borrowing is None or live.ended:
            return
        live.borrowing.cancel()
        live.borrowing = None
        if prefix is None:
            self.counters["lenders_late"] += 1
        try:
            self._submit_first(live, prefix)
        except ServeError as error:
            self._fail(live, error)

    def _submit_first(self, live: _Live, prefix: Sealed | None) -> None:
        hand_off = live.placement.prefill is not None
        self._submit(live, msgspec.structs.replace(live.request, hand_off=hand_off, prefix=prefix))

    def _submit(self, live: _Live, leg: Request) -> None:
        link = self.registry.link(live.worker_id)
        if link is None:
            raise WorkerLost(f"worker {live.worker_id} is gone", stage="queue")
        if leg.deadline_s is not None:
            elapsed_s = time.monotonic() - live.received
            leg = msgspec.structs.replace(leg, deadline_s=max(0.0, leg.deadline_s - elapsed_s))
        link.submit(leg)

    def _end(self, live: _Live, finish: str) -> None:
        """The request is over; idempotent."""
        if live.ended:
            return
        live.ended = True
        del self._live[live.request.id, live.request.choice]
        if live.borrowing is not None:
            live.borrowing.cancel()
        self._release(live)
        self._return_loan(live)
        self._router.finished(live.request.id, live.request.choice)
        waterfall = live.waterfall
        waterfall.finish = finish
        waterfall.num_generated_tokens = len(live.tokens)
        waterfall.e2e_s = time.monotonic() - live.received
        self.recent.add(waterfall)
        logger.info(
            "finished request=%s choice=%d reason=%s prefill=%s decode=%s prompt=%d cached=%d "
            "generated=%d ttft_ms=%.0f e2e_ms=%.0f",
            waterfall.request_id,
            waterfall.choice,
            finish,
            waterfall.prefill_worker or "-",
            waterfall.decode_worker,
            waterfall.num_prompt_tokens,
            waterfall.num_cached_tokens,
            waterfall.num_generated_tokens,
            1000 * waterfall.ttft_s,
            1000 * waterfall.e2e_s,
        )

    def _abandon(self, live: _Live) -> None:
        """Nobody reads any more: free the work wherever it is."""
        if live.ended:
            return
        link = self.registry.link(live.worker_id)
        if link is not None:
            link.abort(live.request.id, live.request.choice, live.request.attempt)
        self._end(live, FinishReason.ABORT.value)

    def _fail(self, live: _Live, error: ServeError) -> None:
        live.waterfall.error = error.message
        live.queue.put_nowait(
            TokenDelta(
                live.request.id,
                live.request.choice,
                live.request.attempt,
                len(live.tokens),
                (),
                finish=FinishReason.ERROR,
                error=error.to_wire(),
            )
        )
        self._end(live, FinishReason.ERROR.value)

    def _release(self, live: _Live) -> None:
        grant, live.grant = live.grant, None
        self._let_go(grant)

    def _return_loan(self, live: _Live) -> None:
        grant, live.loan = live.loan, None
        self._let_go(grant)

    def _let_go(self, grant: Grant | None) -> None:
        link = grant and self.registry.link(grant.source)
        if grant and link:
            link.release(grant.grant_id)

    # What workers say ---------------------------------------------------------------------------

    def _joined(self, hello: Hello) -> None:
        self._router.join(
            WorkerInfo(
                hello.worker_id,
                hello.role,
                hello.epoch,
                hello.num_blocks,
                hello.kv_format.block_size,
                hello.num_frames,
                hello.keeps_blocks,
                _key_class(hello),
            )
        )

    def _lost(self, worker_id: str, reason: str) -> None:
        self._router.leave(worker_id)
        for live in [live for live in self._live.values() if live.worker_id == worker_id]:
            stage = "decode" if live.tokens else "prefill"
            # The reason holds addresses: it is for the log, where the registry has put it.
            self._fail(live, WorkerLost(f"worker {worker_id} is gone", stage=stage))

    def _reported(self, worker_id: str, report: StepReport) -> None:
        if report.draining:
            self._router.leave(worker_id)
        if report.measured:
            self.fabric_check.measured(report.measured)
        for sealed in report.sealed:
            self._sealed(worker_id, sealed)
        for landed in report.landed:
            self._landed(worker_id, landed)
        for times in report.times:
            self._timed(worker_id, times)
        for delta in report.deltas:
            self._delivered(worker_id, delta)
        for handoff in report.handoffs:
            self._handed_off(worker_id, handoff)

    def _current(self, worker_id: str, key: tuple[str, int], attempt: int) -> _Live | None:
        """The live request that this worker's message is about, if it is still its to serve."""
        live = self._live.get(key)
        if live is None or live.worker_id != worker_id or live.request.attempt != attempt:
            self.counters["stale_messages"] += 1
            return None
        return live

    def _timed(self, worker_id: str, times: StageTimes) -> None:
        live = self._current(worker_id, (times.request_id, times.choice), times.attempt)
        self._router.timed(worker_id, times)
        if live is not None:
            live.waterfall.add(times, took_over=live.took_over)

    def _delivered(self, worker_id: str, delta: TokenDelta) -> None:
        live = self._current(worker_id, (delta.request_id, delta.choice), delta.attempt)
        if live is None:
            return
        if delta.token_ids and delta.first_index != len(live.tokens):
            error = f"worker {worker_id} sent token {delta.first_index} after {len(live.tokens)}"
            logger.error("%s", error)
            self._fail(live, Internal(error, stage="decode"))
            return
        if delta.token_ids and not live.tokens:
            live.waterfall.ttft_s = time.monotonic() - live.received
            live.waterfall.num_cached_tokens = delta.num_cached or 0
            live.waterfall.num_early_blocks = live.num_landed
            self._return_loan(live)
            self._router.prefilled(live.request.id, live.request.choice)
        if live.took_over:
            # The first delta of the decode leg shows that it has what it wanted to read; and the
            # hit that the client is told of is the prefill side's.
            self._release(live)
            delta = msgspec.structs.replace(delta, num_cached=None)
        live.tokens += delta.token_ids
        live.queue.put_nowait(delta)
        if delta.finish is not None:
            live.waterfall.error = delta.error.message if delta.error else None
            if delta.error is None:
                self._remember(live)
            self._end(live, delta.finish.value)

    def _remember(self, live: _Live) -> None:
        """What the last worker has computed beyond the prompt may serve the next turn."""
        hello, its = self.registry.hello(), self.registry.hello_of(live.worker_id)
        if hello is None or its is None or _key_class(hello) != _key_class(its):
            return  # it has other keys for these tokens, and nobody would ask for them
        if its.keeps_blocks:
            tokens = (*live.request.prompt, *live.tokens)[:-1]  # the last one has no KV
            root = root_key(hello.fingerprint, hello.numerics, live.request.salt)
            keys = chain(root, tokens, hello.kv_format.block_size)
            self._router.kept(live.worker_id, keys[len(live.keys) if live.took_over else 0 :])

    def _sealed(self, worker_id: str, sealed: Sealed) -> None:
        """Blocks may be read: of the prompt that is being computed, or lent to compute it."""
        if self.fabric_check.took(sealed):
            return None
        live = self._live.get((sealed.request_id, sealed.choice))
        link = self.registry.link(worker_id)
        if live is None or live.request.attempt != sealed.attempt:
            self.counters["stale_messages"] += 1
        elif live.borrowing is not None and worker_id == live.placement.lender:
            live.loan = sealed.grant
            return self._begin(live, sealed)
        elif worker_id == live.worker_id == live.placement.prefill:
            if live.grant is not None and live.grant.grant_id != sealed.grant.grant_id:
                self._release(live)
            live.grant = sealed.grant
            reader = self.registry.link(live.placement.decode)
            if reader is not None and self._fetch_early and self._is_alike(live.placement):
                reader.offer(sealed)
            return None
        if link is not None:
            link.release(sealed.grant.grant_id)
        return None

    def _is_alike(self, placement: Placement) -> bool:
        """Whether blocks go from prefill to decode worker as they are, under the same keys."""
        ends = [self.registry.hello_of(one) for one in (placement.prefill, placement.decode) if one]
        first, last = ends[0], ends[-1]
        return first is not None and last is not None and _key_class(first) == _key_class(last)

    def _landed(self, worker_id: str, landed: Landed) -> None:
        live = self._live.get((landed.request_id, landed.choice))
        if live is not None and live.request.attempt == landed.attempt:
            live.num_landed += landed.num_blocks

    def _handed_off(self, worker_id: str, handoff: Handoff) -> None:
        live = self._current(worker_id, (handoff.request_id, handoff.choice), handoff.attempt)
        if live is None:
            link = self.registry.link(worker_id)
            if link is not None:  # its request was abandoned while the record was on its way
                link.release(handoff.grant.grant_id)
            return
        if live.grant is not None and live.grant.grant_id != handoff.grant.grant_id:
            self._release(live)
        live.grant = handoff.grant
        live.worker_id = live.placement.decode
        live.took_over = True
        leg = msgspec.structs.replace(
            live.request, emitted=tuple(live.tokens), handoff=handoff, hand_off=False
        )
        try:
            self._submit(live, leg)
        except ServeError as error:
            self._fail(live, error)


def _key_class(hello: Hello) -> str:
    """Equal for workers that have the same keys, and the same blocks, for the same tokens."""
    return f"{hello.numerics}/{hello.kv_format.dtype}/{hello.kv_format.block_size}"
