"""The calling half: a gateway's link to one worker, and a worker's announcement to a gateway.

    connecting ── Hello ──▶ up ── breaks ──▶ resuming ── Hello ──▶ up
         └── refused, no answer ──┴────────────┴──▶ lost (on_lost, once)      close() from anywhere

All methods and callbacks run on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable
from typing import Any, Final

import grpc
import grpc.aio
import msgspec

from baton.errors import InvalidRequest, WorkerLost
from baton.rpc.auth import credentials
from baton.rpc.channel import ANNOUNCE_METHOD, STREAM_METHOD, connect, unbroken
from baton.rpc.messages import (
    PROTOCOL_VERSION,
    Abort,
    Address,
    Announce,
    AnnounceReply,
    Goodbye,
    Hello,
    Instructions,
    MalformedMessage,
    Measure,
    Open,
    StepReport,
    decode_announce_reply,
    decode_to_gateway,
    encode,
)
from baton.rpc.outbox import Outbox
from baton.rpc.tls import GATEWAY, WORKER, RpcTls
from baton.types import Lend, Request, Sealed

log = logging.getLogger(__name__)

HELLO_TIMEOUT_S: Final = 5.0
RESUME_DELAYS_S: Final = (0.0, 0.05, 0.1, 0.2)
RESUME_S: Final = 5.0  # a worker forgets us sooner
STEADY_S: Final = 1.0  # a stream that was up for so long earns a full set of tries again
ACK_EVERY: Final = 64
KEPT_INSTRUCTIONS: Final = 1024
MAX_REQUEST_TOKENS: Final = 4 << 20
ANNOUNCE_TIMEOUT_S: Final = 5.0
ANNOUNCE_DELAYS_S: Final = (0.05, 0.1, 0.2, 0.5, 1.0)
WARN_EVERY: Final = 10

_BROKEN: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL)


class _Broken(Exception):
    """The stream broke; the worker may be alive."""


class _Ended(Exception):
    """The worker, or what it sent, ends this link for good."""


class WorkerLink:
    """One gateway's stream to one worker.

    What is asked of it in one turn of the event loop goes out as one `Instructions`. Reports
    arrive exactly once and in order. A broken stream is resumed behind the caller's back if the
    worker lives; otherwise `on_lost(reason)` is called, once, and the link is of no more use.
    """

    def __init__(
        self,
        address: str,
        gateway_id: str,
        gateway_epoch: int,
        secret: bytes,
        on_hello: Callable[[Hello], None],
        on_report: Callable[[StepReport], None],
        on_lost: Callable[[str], None],
        tls: RpcTls | None = None,
    ) -> None:
        self._address = address
        self._tls = tls
        self._gateway_id = gateway_id
        self._gateway_epoch = gateway_epoch
        self._secret = secret
        self._on_hello = on_hello
        self._on_report = on_report
        self._on_lost = on_lost
        self._task: asyncio.Task[None] | None = None
        self._hello: Hello | None = None
        self._is_over = False
        self._up_since = math.inf  # the present stream's Hello, by the loop's clock
        self._news = asyncio.Event()
        self._outbox = Outbox()
        self._sent = 0  # the last Instructions written to the present stream
        self._received = 0  # the last report handed to on_report
        self._acked = 0  # the last report whose receipt we told
        self._peers: tuple[Address, ...] | None = None
        self._offer: list[Sealed] = []
        self._lend: list[Lend] = []
        self._measure: list[Measure] = []
        self._submit: list[Request] = []
        self._abort: list[Abort] = []
        self._proceed: list[tuple[str, int, int]] = []
        self._renew: dict[str, None] = {}
        self._release: dict[str, None] = {}
        self._drain = False

    def start(self) -> None:
        """Connect, in the background; the outcome is `on_hello` or `on_lost`."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """End the stream; `on_lost` is not called any more. What was not sent is dropped."""
        self._is_over = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def submit(self, request: Request) -> None:
        """Have the worker run `request`.

        Raises:
            WorkerLost: the link is over.
            InvalidRequest: more than `MAX_REQUEST_TOKENS` tokens do not fit a message.
        """
        if self._is_over:
            raise WorkerLost("the worker is gone")
        if len(request.prompt) + len(request.emitted) > MAX_REQUEST_TOKENS:
            raise InvalidRequest(f"more than {MAX_REQUEST_TOKENS} tokens", param="prompt")
        self._submit.append(request)
        self._news.set()

    def tell_peers(self, peers: tuple[Address, ...]) -> None:
        """These workers serve blocks over TCP now."""
        self._peers = peers
        self._news.set()

    def offer(self, sealed: Sealed) -> None:
        """Tell of blocks that the worker may soon want."""
        self._offer.append(sealed)
        self._news.set()

    def lend(self, ask: Lend) -> None:
        """Ask the worker to open blocks of its store."""
        self._lend.append(ask)
        self._news.set()

    def measure(self, ask: Measure) -> None:
        """Ask the worker what it costs to fetch these blocks."""
        self._measure.append(ask)
        self._news.set()

    def abort(self, request_id: str, choice: int, attempt: int) -> None:
        """Stop one attempt; no error if it is over, or if the link is."""
        self._abort.append(Abort(request_id, choice, attempt))
        self._news.set()

    def proceed(self, request_id: str, choice: int, attempt: int) -> None:  # see core.alone
        self._proceed.append((request_id, choice, attempt))
        self._news.set()

    def renew(self, grant_id: str) -> None:
        """Extend the lease of a grant that this worker minted."""
        self._renew[grant_id] = None
        self._news.set()

    def release(self, grant_id: str) -> None:
        """End the lease of a grant that this worker minted; again is no error."""
        self._release[grant_id] = None
        self._news.set()

    def drain(self) -> None:
        """Ask the worker to finish what runs and take nothing new."""
        self._drain = True
        self._news.set()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        delays = iter(RESUME_DELAYS_S)
        give_up_at = loop.time() + RESUME_S
        while True:
            self._up_since = math.inf
            try:
                await self._stream()
            except _Broken as broken:
                reason = str(broken)
            except _Ended as ended:
                return self._lose(str(ended))
            except Exception:  # a callback of ours failed: the link's requests must still end
                log.exception("link failed worker=%s", self._address)
                return self._lose("internal error of the gateway")
            # A connection that did not come about can take long, too: it earns nothing.
            if loop.time() - self._up_since > STEADY_S:
                delays = iter(RESUME_DELAYS_S)
                give_up_at = loop.time() + RESUME_S
            delay = next(delays, None)
            if delay is None or loop.time() > give_up_at:
                return self._lose(reason)
            log.info("resume worker=%s reason=%s", self._address, reason)
            await asyncio.sleep(delay)

    def _lose(self, reason: str) -> None:
        if not self._is_over:
            self._is_over = True
            self._on_lost(reason)

    async def _stream(self) -> None:
        """Open a stream, or resume the broken one, and serve it until it breaks or ends."""
        async with connect(self._address, self._tls, WORKER) as channel:
            call = channel.stream_stream(STREAM_METHOD)(metadata=credentials(self._secret))
            tasks: list[asyncio.Task[None]] = []
            try:
                await self._greet(call)
                tasks = [asyncio.create_task(run(call)) for run in (self._read, self._write)]
                await asyncio.gather(*tasks)
            except grpc.aio.AioRpcError as error:
                text = f"{error.code().name}: {error.details()}"
                raise (_Broken if error.code() in _BROKEN else _Ended)(text) from None
            except MalformedMessage as error:
                raise _Ended(f"malformed message: {error}") from None
            finally:
                call.cancel()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _greet(self, call: Any) -> None:
        first = self._hello
        opening = Open(
            gateway_id=self._gateway_id,
            gateway_epoch=self._gateway_epoch,
            last_index=self._received,
            resume=first is not None,
        )
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                with contextlib.suppress(asyncio.InvalidStateError):  # refused: read() says why
                    await unbroken(call.write(encode(opening)))
                data = await unbroken(call.read())
        except TimeoutError:
            raise _Ended(f"no answer within {HELLO_TIMEOUT_S} s") from None
        if data is grpc.aio.EOF:
            await _raise_status(call)
        hello = decode_to_gateway(data)
        if not isinstance(hello, Hello):
            raise _Ended("the worker's first message is not Hello")
        if hello.protocol != PROTOCOL_VERSION:
            raise _Ended(f"the worker speaks protocol {hello.protocol}, not {PROTOCOL_VERSION}")
        if first is not None and hello.epoch != first.epoch:
            raise _Ended("the worker has started anew")
        if not self._outbox.can_resume_after(hello.last_index):
            raise _Ended(f"instructions after {hello.last_index} are not kept any more")
        self._up_since = asyncio.get_running_loop().time()
        self._sent = hello.last_index
        self._acked = self._received
        self._news.set()
        if first is None:
            self._hello = hello
            self._on_hello(hello)

    async def _read(self, call: Any) -> None:
        while (data := await unbroken(call.read())) is not grpc.aio.EOF:
            report = decode_to_gateway(data)
            if isinstance(report, Goodbye):
                raise _Ended("the worker stopped")
            if not isinstance(report, StepReport):
                raise _Ended("a second Hello on one stream")
            if report.index <= self._received:
                continue
            if report.index != self._received + 1:
                raise _Ended(f"report {report.index} follows {self._received}")
            if self._is_over:
                return
            self._outbox.drop_through(min(report.ack, self._sent))
            self._on_report(report)
            self._received = report.index
            if self._received - self._acked >= ACK_EVERY:
                self._news.set()
        await _raise_status(call)

    async def _write(self, call: Any) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            self._pack()
            while batch := self._outbox.after(self._sent):
                for data in batch:
                    try:
                        await unbroken(call.write(data))
                    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                        return  # the stream is over: `_read` takes what is left, and tells why
                    self._sent += 1
            # What the worker has not told to have, but surely has by now, need not be kept.
            self._outbox.drop_through(self._sent - KEPT_INSTRUCTIONS)

    def _pack(self) -> None:
        """Turn what is pending into messages: one, unless it would be too large."""
        offered = self._offer or self._lend or self._measure or self._peers is not None
        others = self._abort or self._proceed or self._renew or self._release or self._drain
        if not (self._submit or offered or others or self._received - self._acked >= ACK_EVERY):
            return
        *full, rest = _groups(self._submit)
        offers, lends = tuple(self._offer), tuple(self._lend)
        peers = self._peers
        for group in full:
            self._append(Instructions(peers=peers, offer=offers, submit=group))
            peers, offers = None, ()
        self._append(
            Instructions(
                peers=peers,
                offer=offers,
                lend=lends,
                measure=tuple(self._measure),
                submit=rest,
                abort=tuple(self._abort),
                proceed=tuple(self._proceed),
                renew=tuple(self._renew),
                release=tuple(self._release),
                drain=self._drain,
                ack=self._received,
            )
        )
        self._acked = self._received
        self._peers = None
        lists: tuple[list[Any], ...] = (self._offer, self._lend, self._measure, self._submit)
        for sent in (*lists, self._abort, self._proceed):
            sent.clear()
        self._renew, self._release = {}, {}
        self._drain = False

    def _append(self, message: Instructions) -> None:
        indexed = msgspec.structs.replace(message, index=self._outbox.last + 1)
        self._outbox.append(encode(indexed))


def _groups(requests: list[Request]) -> list[tuple[Request, ...]]:
    """`requests` in order, in groups of at most `MAX_REQUEST_TOKENS` tokens; at least one group.

    A token costs at most nine bytes (five for its id, four for its share of a handoff's block),
    so a group stays well below `MAX_MESSAGE_BYTES`.
    """
    groups: list[list[Request]] = [[]]
    room = MAX_REQUEST_TOKENS
    for request in requests:
        num_tokens = len(request.prompt) + len(request.emitted)
        if num_tokens > room and groups[-1]:
            groups.append([])
            room = MAX_REQUEST_TOKENS
        groups[-1].append(request)
        room -= num_tokens
    return [tuple(group) for group in groups]


async def announce(
    gateway_address: str, message: Announce, secret: bytes, tls: RpcTls | None = None
) -> AnnounceReply:
    """Tell a gateway where a worker is; tries again, with back-off, until it answers.

    Returns its reply; a gateway that refuses the call itself (another secret, another protocol)
    is `accepted=False` with its reason. Cancel the task to give up.
    """
    attempt = 0
    while True:
        async with connect(gateway_address, tls, GATEWAY) as channel:
            try:
                data: bytes = await channel.unary_unary(ANNOUNCE_METHOD)(
                    encode(message), metadata=credentials(secret), timeout=ANNOUNCE_TIMEOUT_S
                )
                return decode_announce_reply(data)
            except grpc.aio.AioRpcError as error:
                if error.code() not in (*_BROKEN, grpc.StatusCode.DEADLINE_EXCEEDED):
                    return AnnounceReply(False, f"{error.code().name}: {error.details()}")
                reason = error.details()
            except MalformedMessage as error:
                return AnnounceReply(False, f"malformed reply: {error}")
        await asyncio.sleep(ANNOUNCE_DELAYS_S[min(attempt, len(ANNOUNCE_DELAYS_S) - 1)])
        attempt += 1
        # A gateway that starts a moment later than its workers is nothing to speak of.
        level = logging.DEBUG if attempt % WARN_EVERY else logging.WARNING
        log.log(level, "cannot reach gateway=%s tries=%d: %s", gateway_address, attempt, reason)


async def _raise_status(call: Any) -> None:
    """Raise for the status with which the worker ended the stream."""
    code, details = await call.code(), await call.details()
    text = (
        f"{code.name}: {details}"
        if code is not grpc.StatusCode.OK
        else "the worker ended the stream"
    )
    raise (_Broken if code in _BROKEN else _Ended)(text)
