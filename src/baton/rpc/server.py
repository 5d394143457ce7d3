"""The listening half: a worker's stream server and a gateway's registry, over grpc.aio.

What a worker keeps of a gateway is one `_Peer`, keyed by gateway id, and goes through

    (none) ── Open ──▶ open ◀── Open(resume) ── broken ── resume window over ──▶ (none)
                        │ └────── stream breaks ──▶ ▲                 forgotten
                        └── fresh Open, or overflow: forgotten ──▶ open / (none)

All methods and callbacks run on the event loop's thread; nothing here blocks it.
"""

from __future__ import annotations

import asyncio
import logging
from asyncio import FIRST_COMPLETED
from collections.abc import Callable
from typing import Any, Final, Protocol

import grpc
import grpc.aio
import msgspec

from baton.core.step_cost import MeasuredStep
from baton.errors import WireError
from baton.rpc.channel import GATEWAY_SERVICE, WORKER_SERVICE, caller_host, unbroken
from baton.rpc.listener import Code, Listener, Refused, Tcp, decoded, version_text
from baton.rpc.messages import (
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    Announce,
    AnnounceReply,
    Goodbye,
    Hello,
    Instructions,
    Measured,
    Open,
    StepReport,
    decode_announce,
    decode_to_worker,
    encode,
)
from baton.rpc.outbox import Outbox
from baton.rpc.tls import GATEWAY, WORKER
from baton.types import Alone, Handoff, Landed, Pulse, Sealed, StageTimes, TokenDelta, WorkerLoad

log = logging.getLogger(__name__)

MAX_UNACKED_REPORTS: Final = 4096
MAX_UNACKED_BYTES: Final = 256 << 20
OPEN_TIMEOUT_S: Final = 10.0


class WorkerHandler(Protocol):
    """What a worker does with what gateways say. Plain callbacks on the event loop's thread.

    For one gateway they come as: opened, instructions…, lost, then either opened again with
    `resumed`, or forgotten. A peer's bad message never reaches them.
    """

    def opened(self, gateway_id: str, epoch: int, resumed: bool) -> None: ...

    def instructions(self, gateway_id: str, instructions: Instructions) -> None: ...

    def lost(self, gateway_id: str) -> None:
        """The stream broke. It may be resumed, so its requests go on for now."""

    def forgotten(self, gateway_id: str) -> None:
        """The gateway will not ask again for what it submitted: abort it."""


class _Stream:
    """One open stream of a peer; `end` closes it, with a refusal or (None) in peace."""

    def __init__(self, sent: int) -> None:
        self.sent = sent  # the last report written to it
        self.news = asyncio.Event()
        self.news.set()
        self.greeted = asyncio.Event()  # the first write is done, well or badly
        self.end: asyncio.Future[Refused | None] = asyncio.get_running_loop().create_future()


class _Peer:
    """One gateway epoch, for as long as it may come back for its reports."""

    def __init__(self, gateway_id: str, epoch: int) -> None:
        self.gateway_id = gateway_id
        self.epoch = epoch
        self.outbox = Outbox()
        self.received = 0  # the last Instructions acted upon
        self.stream: _Stream | None = None
        self.expiry: asyncio.TimerHandle | None = None
        self.overflowed = False


class WorkerServer:
    """Serves the streams of all gateways of one worker, and gRPC health.

    `resume_window_s`: how long a gateway whose stream broke may come back to it.
    """

    def __init__(
        self,
        hello_factory: Callable[[], Hello],
        handler: WorkerHandler,
        secret: bytes,
        *,
        resume_window_s: float = 2.0,
    ) -> None:
        self._hello_factory = hello_factory
        self._handler = handler
        self._resume_window_s = resume_window_s
        self._peers: dict[str, _Peer] = {}
        self._stopping = False
        self._listener = Listener(
            WORKER_SERVICE,
            {"Stream": grpc.stream_stream_rpc_method_handler(self._stream)},
            secret,
            GATEWAY,
        )

    async def start(self, address: str, tcp: Tcp | None = None) -> str:
        """See `Listener.start`."""
        return await self._listener.start(address, tcp)

    @property
    def tcp_address(self) -> str:
        """Where gateways on other hosts reach it; "" without `tcp`."""
        return self._listener.tcp_address

    async def set_serving(self, serving: bool) -> None:
        """What the gRPC health service answers; NOT_SERVING until first set."""
        await self._listener.set_serving(serving)

    async def stop(self, grace_s: float) -> None:
        """Send what is queued, for at most `grace_s` seconds, then end every stream."""
        await self._listener.set_serving(False)
        self._stopping = True
        for peer in self._peers.values():
            if peer.stream:
                peer.stream.news.set()
            if peer.expiry:
                peer.expiry.cancel()
        await self._listener.stop(grace_s)
        for peer in self._peers.values():
            self._end_stream(peer, None)

    def gateways(self) -> list[str]:
        """Ids of the gateways that have an open stream or may still resume one."""
        return list(self._peers)

    def report(
        self,
        gateway_id: str,
        *,
        load: WorkerLoad,
        deltas: tuple[TokenDelta, ...] = (),
        sealed: tuple[Sealed, ...] = (),
        landed: tuple[Landed, ...] = (),
        measured: tuple[Measured, ...] = (),
        handoffs: tuple[Handoff, ...] = (),
        times: tuple[StageTimes, ...] = (),
        alone: tuple[Alone, ...] = (),
        counters: dict[str, int] | None = None,
        step: MeasuredStep | None = None,
        draining: bool = False,
        pulse: Pulse | None = None,
        fatal: WireError | None = None,
        suspects: tuple[tuple[str, int, int], ...] = (),
    ) -> None:
        """Queue one report; it is sent now, or after a resume, exactly once and in order.

        A gateway that is not known (forgotten meanwhile) gets nothing, silently. One that lets
        too much pile up loses its stream and is forgotten.
        """
        peer = self._peers.get(gateway_id)
        if peer is None or peer.overflowed:
            return
        outbox = peer.outbox
        data = encode(
            StepReport(
                index=outbox.last + 1,
                load=load,
                deltas=deltas,
                sealed=sealed,
                landed=landed,
                measured=measured,
                handoffs=handoffs,
                times=times,
                alone=alone,
                counters=counters or {},
                step=step,
                draining=draining,
                pulse=pulse,
                fatal=fatal,
                suspects=suspects,
                ack=peer.received,
            )
        )
        outbox.append(data)
        if peer.stream:
            peer.stream.news.set()
        if (
            len(outbox) > MAX_UNACKED_REPORTS
            or outbox.num_bytes > MAX_UNACKED_BYTES
            or len(data) > MAX_MESSAGE_BYTES
        ):
            log.error("reports overflow gateway=%s kept=%d", gateway_id, len(outbox))
            peer.overflowed = True
            # The caller is usually the handler itself: do not call it from within its own call.
            asyncio.get_running_loop().call_soon(
                self._forget, peer, Refused(Code.RESOURCE_EXHAUSTED, "too many unread reports")
            )

    # One stream.

    async def _stream(self, _requests: object, context: Any) -> None:
        try:
            self._listener.check(context)
            peer, stream = self._admit(await _read_open(context))
        except Refused as refused:
            await context.abort(refused.code, refused.reason)
            raise  # for the type checker: abort always raises
        reader = asyncio.create_task(self._read(peer, context))
        writer = asyncio.create_task(self._write(peer, stream, context))
        try:
            ends: set[asyncio.Future[Any]] = {reader, writer, stream.end}
            await asyncio.wait(ends, return_when=FIRST_COMPLETED)
            # The first write begins the stream: if we returned meanwhile, grpc would begin it again
            # and fail.
            await stream.greeted.wait()
            refusal = stream.end.result() if stream.end.done() else _failure(reader, writer)
        finally:
            reader.cancel()
            writer.cancel()
            if peer.stream is stream:
                self._end_stream(peer, None)
        if refusal:
            log.warning("stream refused gateway=%s reason=%s", peer.gateway_id, refusal.reason)
            await context.abort(refusal.code, refusal.reason)

    def _admit(self, opening: Open) -> tuple[_Peer, _Stream]:
        """Find or make the peer that `opening` belongs to, and give it this stream."""
        peer = self._peers.get(opening.gateway_id)
        if opening.resume:
            if (
                peer is None
                or peer.overflowed
                or peer.epoch != opening.gateway_epoch
                or not peer.outbox.can_resume_after(opening.last_index)
            ):
                raise Refused(Code.FAILED_PRECONDITION, "there is nothing to resume here")
            self._end_stream(peer, Refused(Code.ABORTED, "resumed by another stream"))
            peer.outbox.drop_through(opening.last_index)
            stream = _Stream(sent=opening.last_index)
        else:
            if peer is not None:
                self._forget(peer, Refused(Code.ABORTED, "opened anew by another stream"))
            peer = _Peer(opening.gateway_id, opening.gateway_epoch)
            self._peers[opening.gateway_id] = peer
            stream = _Stream(sent=0)
        if peer.expiry:
            peer.expiry.cancel()
        peer.stream = stream
        self._handler.opened(peer.gateway_id, peer.epoch, opening.resume)
        return peer, stream

    async def _read(self, peer: _Peer, context: Any) -> None:
        while (data := await unbroken(context.read())) is not grpc.aio.EOF:
            message = decoded(decode_to_worker, data)
            if not isinstance(message, Instructions):
                raise Refused(Code.INVALID_ARGUMENT, "a second Open on one stream")
            if message.index <= peer.received:
                continue  # sent again after a resume
            if message.index != peer.received + 1:
                raise Refused(
                    Code.DATA_LOSS, f"instructions {message.index} follow {peer.received}"
                )
            if not 0 <= message.ack <= peer.outbox.last:
                raise Refused(Code.INVALID_ARGUMENT, f"report {message.ack} was never sent")
            peer.outbox.drop_through(message.ack)
            peer.received = message.index
            self._handler.instructions(peer.gateway_id, message)

    async def _write(self, peer: _Peer, stream: _Stream, context: Any) -> None:
        hello = msgspec.structs.replace(self._hello_factory(), last_index=peer.received)
        try:
            await unbroken(context.write(encode(hello)))
        finally:
            stream.greeted.set()
        while True:
            await stream.news.wait()
            stream.news.clear()
            while batch := peer.outbox.after(stream.sent):
                for data in batch:
                    await unbroken(context.write(data))
                    stream.sent += 1
            if self._stopping:
                await unbroken(context.write(encode(Goodbye())))
                await asyncio.Event().wait()  # until the gateway ends the stream

    def _end_stream(self, peer: _Peer, why: Refused | None) -> None:
        """Close the peer's stream, if it has one; from now on it may be resumed for a while."""
        if peer.stream is None:
            return
        if not peer.stream.end.done():
            peer.stream.end.set_result(why)
        peer.stream = None
        if not self._stopping:
            peer.expiry = asyncio.get_running_loop().call_later(
                self._resume_window_s, self._forget, peer, None
            )
        self._handler.lost(peer.gateway_id)

    def _forget(self, peer: _Peer, why: Refused | None) -> None:
        if self._peers.get(peer.gateway_id) is not peer:
            return
        self._end_stream(peer, why)
        if peer.expiry:
            peer.expiry.cancel()
        del self._peers[peer.gateway_id]
        self._handler.forgotten(peer.gateway_id)


class RegistryServer:
    """The gateway's side of `Announce`: workers say where they are. Serves gRPC health too.

    `on_announce` runs on the event loop's thread and only sees well-formed announcements of this
    protocol version, with the host that they came from: None through the Unix socket.
    """

    def __init__(
        self, on_announce: Callable[[Announce, str | None], AnnounceReply], secret: bytes
    ) -> None:
        self._on_announce = on_announce
        self._listener = Listener(
            GATEWAY_SERVICE,
            {"Announce": grpc.unary_unary_rpc_method_handler(self._announce)},
            secret,
            WORKER,
        )

    async def start(self, address: str, tcp: Tcp | None = None) -> str:
        """See `Listener.start`."""
        return await self._listener.start(address, tcp)

    async def set_serving(self, serving: bool) -> None:
        await self._listener.set_serving(serving)

    async def stop(self, grace_s: float) -> None:
        await self._listener.set_serving(False)
        await self._listener.stop(grace_s)

    async def _announce(self, data: bytes, context: Any) -> bytes:
        try:
            self._listener.check(context)
            message = decoded(decode_announce, data)
        except Refused as refused:
            await context.abort(refused.code, refused.reason)
            raise  # for the type checker: abort always raises
        if message.protocol != PROTOCOL_VERSION:
            return encode(AnnounceReply(False, version_text(message.protocol)))
        return encode(self._on_announce(message, caller_host(context.peer())))


async def _read_open(context: Any) -> Open:
    try:
        data = await asyncio.wait_for(unbroken(context.read()), OPEN_TIMEOUT_S)
    except TimeoutError:
        raise Refused(Code.DEADLINE_EXCEEDED, "no Open message came") from None
    if data is grpc.aio.EOF:
        raise Refused(Code.INVALID_ARGUMENT, "the stream ended before an Open message")
    message = decoded(decode_to_worker, data)
    if not isinstance(message, Open):
        raise Refused(Code.INVALID_ARGUMENT, "the first message must be Open")
    if message.protocol != PROTOCOL_VERSION:
        raise Refused(Code.FAILED_PRECONDITION, version_text(message.protocol))
    return message


def _failure(*tasks: asyncio.Task[None]) -> Refused | None:
    """How a task failed because of the peer; our own errors are raised."""
    for task in tasks:
        error = task.exception() if task.done() else None
        if isinstance(error, Refused):
            return error
        if error is not None and not isinstance(error, grpc.aio.BaseError):  # a broken connection
            raise error
    return None
