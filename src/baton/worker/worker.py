"""One worker: an engine thread, a fabric thread, and the event loop that talks to gateways.

    gateways ══RPC══ event loop ──inbox──▶ engine thread ──jobs──▶ fabric thread
                        ▲ one call_soon_threadsafe a step │◀──answers (inbox)──┘

The event loop's thread owns who asked for what (`_live`); the engine's owns everything else.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import msgspec

from baton.config import Config
from baton.core.decision_log import Sink
from baton.core.liveness import HEARTBEAT_S
from baton.core.sequence import SequenceId
from baton.core.step_cost import MeasuredStep
from baton.engine import inbox
from baton.engine.build import Built, build_engine
from baton.engine.engine import Emitted
from baton.engine.loop import EngineLoop
from baton.errors import Internal, WorkerLost
from baton.model.checkpoint import Progress
from baton.model.hub import resolve_model
from baton.rpc.auth import read_secret
from baton.rpc.channel import is_unix
from baton.rpc.messages import Announce, Hello, Instructions, Measure, Measured
from baton.rpc.server import WorkerServer
from baton.types import (
    Alone,
    Handoff,
    Landed,
    Pulse,
    Request,
    Role,
    Sealed,
    StageTimes,
    TokenDelta,
    WorkerLoad,
)
from baton.worker.announcer import stay_announced
from baton.worker.hosts import listener_for
from baton.worker.measure import measure
from baton.worker.store import Store

logger = logging.getLogger(__name__)

STOP_GRACE_S = 1.0


class Worker:
    """Everything of one worker process but its signals and exit code.

    Args:
        gateways: where to announce itself, `unix:/path` or `host:port`.

    Raises:
        ModelError, ConfigError: the model or the configuration cannot be used.
    """

    def __init__(
        self,
        config: Config,
        role: Role,
        worker_id: str,
        runtime_dir: Path,
        gateways: Sequence[str] = (),
        *,
        weights_fd: int | None = None,
        progress: Progress | None = None,
        decision_sink: Sink | None = None,
    ) -> None:
        self._config = config
        self._role = role
        self._id = worker_id
        self._runtime_dir = runtime_dir
        self._gateways = gateways
        self._tcp = listener_for(config, gateways)
        self._epoch = secrets.randbits(63)
        self._secret = read_secret(runtime_dir, config.rpc.secret_file)
        lease_secret = secrets.token_bytes(32)
        self._built: Built = build_engine(
            config,
            resolve_model(config.model.path),
            self._emit_from_engine,
            worker_id=worker_id,
            epoch=self._epoch,
            lease_secret=lease_secret,
            weights_fd=weights_fd,
            progress=progress,
            decision_sink=decision_sink,
        )
        engine = self._built.engine
        self._store = Store.open(
            config, worker_id, self._epoch, runtime_dir, lease_secret, self._built
        )
        engine.fabric = self._store.fabric
        self._loop_thread = EngineLoop(engine, self._on_engine_failed)
        self._server = WorkerServer(self._hello, self, self._secret)
        self._live: dict[SequenceId, str] = {}
        self._lent_to: dict[SequenceId, str] = {}
        self._load: WorkerLoad = engine.load()
        self._counters: dict[str, int] = {}
        self._draining = False
        self._stream_lost: list[asyncio.Event] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Future[int] | None = None

    async def run(self) -> int:
        """Serve until drained, stopped or broken; returns the exit code."""
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        self._loop_thread.start()
        address = await self._server.start(f"unix:{self._runtime_dir / self._id}.sock", self._tcp)
        await self._server.set_serving(True)
        logger.info("worker id=%s role=%s address=%s ready", self._id, self._role, address)
        tasks = [asyncio.create_task(self._beat())]
        for gateway in self._gateways:
            ours = address if is_unix(gateway) else self._server.tcp_address
            tasks.append(asyncio.create_task(self._announce(gateway, ours)))
        try:
            return await self._ended
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._server.stop(STOP_GRACE_S)

    def drain(self) -> None:
        """Finish what was accepted, take nothing new, then end `run` with 0."""
        if not self._draining:
            self._draining = True
            logger.info("draining num_live=%d", len(self._live))
            self._loop_thread.put(inbox.Drain())
            self._report_all()

    def end(self, code: int) -> None:
        """End `run` with `code`, whatever is running."""
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(code)

    @property
    def hangs(self) -> bool:
        """Whether a thread does not return: then the process can end only by force."""
        return self._store.fabric.hangs

    def close(self) -> None:
        """Stop the threads and give back the memory. Only after a `run` that ended well."""
        self._loop_thread.stop()
        self._store.close()

    # What gateways say (`rpc.server.WorkerHandler`, on the event loop's thread) -----------------

    def opened(self, gateway_id: str, epoch: int, resumed: bool) -> None:
        logger.info("gateway id=%s epoch=%d resumed=%s", gateway_id, epoch, resumed)
        self._report(gateway_id, _News())  # it knows nothing of this worker's load yet

    def instructions(self, gateway_id: str, instructions: Instructions) -> None:
        if instructions.peers is not None:
            self._store.ways.peers = {peer.worker_id: peer for peer in instructions.peers}
        for sealed in instructions.offer:
            self._loop_thread.put(inbox.Offer(sealed))
        for ask in instructions.lend:
            self._lent_to[ask.request_id, ask.choice, ask.attempt] = gateway_id
            self._loop_thread.put(inbox.Lend(ask))
        for measure_ask in instructions.measure:
            self._measure(gateway_id, measure_ask)
        for request in instructions.submit:
            self._submit(gateway_id, request)
        for seq_id in instructions.proceed:
            self._loop_thread.put(inbox.Proceed(seq_id))
        for abort in instructions.abort:
            seq_id = (abort.request_id, abort.choice, abort.attempt)
            if self._live.pop(seq_id, None) is not None:
                self._loop_thread.put(inbox.Abort(seq_id))
        if instructions.renew:
            self._loop_thread.put(inbox.Renew(instructions.renew))
        if instructions.release:
            self._loop_thread.put(inbox.Release(instructions.release))
        if instructions.drain:
            self.drain()

    def lost(self, gateway_id: str) -> None:
        logger.info("gateway id=%s lost its stream", gateway_id)
        self._announce_again()

    def forgotten(self, gateway_id: str) -> None:
        theirs = [seq_id for seq_id, owner in self._live.items() if owner == gateway_id]
        level = logging.WARNING if theirs else logging.INFO
        logger.log(level, "gateway id=%s forgotten, num_aborted=%d", gateway_id, len(theirs))
        for seq_id in theirs:
            del self._live[seq_id]
            self._loop_thread.put(inbox.Abort(seq_id))
        self._announce_again()

    def _submit(self, gateway_id: str, request: Request) -> None:
        self._live[request.id, request.choice, request.attempt] = gateway_id
        self._loop_thread.put(inbox.Submit(request))

    def _measure(self, gateway_id: str, ask: Measure) -> None:
        """Beside everything else; nobody waits for it but the gateway that asked."""
        assert self._loop is not None
        found = self._loop.run_in_executor(None, measure, self._store.ways, ask)

        def tell(done: asyncio.Future[list[Measured]]) -> None:
            if not done.cancelled():
                measured = tuple(done.result())
                self._server.report(gateway_id, load=self._load, measured=measured)

        found.add_done_callback(tell)

    # What the engine says -----------------------------------------------------------------------

    def _emit_from_engine(self, emitted: Emitted) -> None:
        """Called on the engine thread, once a step."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._emitted, emitted)

    def _emitted(self, emitted: Emitted) -> None:
        self._load = emitted.load
        self._counters = {**emitted.counters, **self._store.ways.counters}
        update = emitted.update
        news: dict[str, _News] = {gateway_id: _News() for gateway_id in self._server.gateways()}
        for delta in update.deltas:
            seq_id = (delta.request_id, delta.choice, delta.attempt)
            if (mine := news.get(self._live.get(seq_id, ""))) is not None:
                mine.deltas.append(delta)
            if delta.finish is not None:
                self._live.pop(seq_id, None)
        for sealed in update.sealed:
            seq_id = (sealed.request_id, sealed.choice, sealed.attempt)
            owner = self._lent_to.pop(seq_id, None) or self._live.get(seq_id, "")
            if owner in news:
                news[owner].sealed.append(sealed)
            else:
                self._loop_thread.put(inbox.Release((sealed.grant.grant_id,)))
        for told in update.alone:
            seq_id = (told.request_id, told.choice, told.attempt)
            if (mine := news.get(self._live.get(seq_id, ""))) is not None:
                mine.alone.append(told)
        for landed in update.landed:
            for mine in news.values():
                mine.landed.append(landed)
        for handoff in update.handoffs:
            seq_id = (handoff.request_id, handoff.choice, handoff.attempt)
            owner = self._live.pop(seq_id, "")
            if owner in news:
                news[owner].handoffs.append(handoff)
            else:  # nobody is left to renew or release it
                self._loop_thread.put(inbox.Release((handoff.grant.grant_id,)))
        for times in update.times:
            for mine in news.values():
                if mine.concerns(times):
                    mine.times.append(times)
        for gateway_id, mine in news.items():
            self._report(gateway_id, mine, step=emitted.step)
        if emitted.drained and not self._live:
            self.end(0)

    def _report(
        self,
        gateway_id: str,
        news: _News,
        *,
        step: MeasuredStep | None = None,
        pulse: Pulse | None = None,
    ) -> None:
        self._server.report(
            gateway_id,
            load=self._load,
            deltas=tuple(news.deltas),
            sealed=tuple(news.sealed),
            landed=tuple(news.landed),
            handoffs=tuple(news.handoffs),
            times=tuple(news.times),
            alone=tuple(news.alone),
            counters=self._counters,
            step=step,
            draining=self._draining,
            pulse=pulse,
        )

    def _report_all(self) -> None:
        for gateway_id in self._server.gateways():
            self._report(gateway_id, _News())

    def _on_engine_failed(self, error: BaseException) -> None:
        """Called on the engine thread: tell everyone, then end the process."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._fail, error)

    def _fail(self, error: BaseException) -> None:
        fatal = error if isinstance(error, Internal) else WorkerLost(f"engine failed: {error}")
        batch = self._built.engine.batch()
        for gateway_id in self._server.gateways():
            self._server.report(
                gateway_id,
                load=self._load,
                fatal=fatal.to_wire(),
                suspects=self._of(gateway_id, batch),
            )
        self.end(1)

    def _of(self, gateway_id: str, batch: tuple[SequenceId, ...]) -> tuple[SequenceId, ...]:
        """Those of `batch` that this gateway has asked for."""
        return tuple(seq_id for seq_id in batch if self._live.get(seq_id) == gateway_id)

    # Standing tasks -----------------------------------------------------------------------------

    async def _announce(self, gateway: str, address: str) -> None:
        message = Announce(self._id, address, self._role, self._epoch)
        lost = asyncio.Event()
        self._stream_lost.append(lost)
        tls = None if self._tcp is None else self._tcp.tls
        reason = await stay_announced(gateway, message, self._secret, tls, lost)
        logger.error("gateway=%s refused this worker: %s", gateway, reason)
        self.end(1)

    def _announce_again(self) -> None:
        # To all: which address has which id is not known, and a repetition changes nothing.
        for lost in self._stream_lost:
            lost.set()

    async def _beat(self) -> None:
        """Tell that this worker is alive, and whether its engine is; for no step does it wait."""
        engine, last = self._built.engine, -1
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            pulse = engine.pulse()
            batch = engine.batch() if pulse.is_working and pulse.progress == last else ()
            last = pulse.progress
            for gateway_id in self._server.gateways():
                mine = msgspec.structs.replace(pulse, batch=self._of(gateway_id, batch))
                self._report(gateway_id, _News(), pulse=mine)

    def _hello(self) -> Hello:
        scheduler = self._built.scheduler_config
        limits = self._built.limits
        return Hello(
            worker_id=self._id,
            role=self._role,
            epoch=self._epoch,
            model=self._config.model.name,
            fingerprint=scheduler.fingerprint,
            numerics=scheduler.numerics,
            kv_format=scheduler.kv_format,
            num_blocks=limits.num_blocks,
            max_model_len=limits.max_model_len,
            max_num_seqs=scheduler.max_num_seqs,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            vocab_size=scheduler.vocab_size,
            device=limits.device,
            dtype=limits.dtype,
            pid=os.getpid(),
            num_frames=limits.num_frames,
            keeps_blocks=scheduler.keep_blocks,
            fabric_host=self._store.address.host,
            fabric_port=self._store.address.port,
            nixl_port=self._store.address.nixl_port,
        )


class _News:
    """What one step brought for one gateway."""

    __slots__ = ("alone", "deltas", "handoffs", "landed", "sealed", "times")

    def __init__(self) -> None:
        self.deltas: list[TokenDelta] = []
        self.sealed: list[Sealed] = []
        self.landed: list[Landed] = []
        self.handoffs: list[Handoff] = []
        self.times: list[StageTimes] = []
        self.alone: list[Alone] = []

    def concerns(self, times: StageTimes) -> bool:
        key = (times.request_id, times.choice)
        return any((d.request_id, d.choice) == key for d in self.deltas) or any(
            (h.request_id, h.choice) == key for h in self.handoffs
        )
