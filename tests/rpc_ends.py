"""Both ends of the RPC for tests: recording callbacks, and a proxy that can cut or stall a link."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import TypeVar

import grpc
import grpc.aio
import uvloop

from baton.rpc.auth import credentials
from baton.rpc.channel import STREAM_METHOD, connect
from baton.rpc.client import WorkerLink
from baton.rpc.listener import Tcp
from baton.rpc.messages import Hello, Instructions, StepReport
from baton.rpc.server import WorkerServer
from baton.rpc.tls import RpcTls
from baton.types import KvFormat, Request, Role, SamplingParams, WorkerLoad

SECRET = b"s" * 32
LOAD = WorkerLoad(num_total_blocks=8)


def hello(epoch: int = 7) -> Hello:
    return Hello(
        worker_id="decode-0",
        role=Role.DECODE,
        epoch=epoch,
        model="m",
        fingerprint=b"f" * 32,
        numerics="exact",
        kv_format=KvFormat(16, "float32", 2, 2, 8, 4096),
        num_blocks=8,
        max_model_len=128,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        vocab_size=100,
        device="cpu",
        dtype="float32",
    )


def request(name: str, num_tokens: int = 3) -> Request:
    return Request(id=name, prompt=tuple(range(num_tokens)), sampling=SamplingParams(max_tokens=4))


# One loop for the whole process, as a gateway or a worker has: grpc.aio crashes now and then when
# a second loop is made after the first was closed.
_RUNNER = asyncio.Runner(loop_factory=uvloop.new_event_loop)
atexit.register(_RUNNER.close)

T = TypeVar("T")


def run(main: Coroutine[object, object, T]) -> T:
    """Run `main` on the event loop that gateways and workers use, and return what it does."""
    return _RUNNER.run(main)


class Handler:
    """A WorkerHandler that writes down what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[object, ...]] = []
        self.messages: list[Instructions] = []
        self.on_instructions: Callable[[Instructions], None] = lambda message: None

    def opened(self, gateway_id: str, epoch: int, resumed: bool) -> None:
        self.events.append(("opened", gateway_id, epoch, resumed))

    def instructions(self, gateway_id: str, instructions: Instructions) -> None:
        self.messages.append(instructions)
        self.on_instructions(instructions)

    def lost(self, gateway_id: str) -> None:
        self.events.append(("lost", gateway_id))

    def forgotten(self, gateway_id: str) -> None:
        self.events.append(("forgotten", gateway_id))

    def submitted(self) -> list[str]:
        return [request.id for message in self.messages for request in message.submit]


class Gateway:
    """A WorkerLink and what it was told."""

    def __init__(
        self, address: str, epoch: int = 1, secret: bytes = SECRET, tls: RpcTls | None = None
    ) -> None:
        self.hellos: list[Hello] = []
        self.reports: list[StepReport] = []
        self.losses: list[str] = []
        self.link = WorkerLink(
            address, "gw", epoch, secret, self.hellos.append, self.reports.append,
            self.losses.append, tls,
        )  # fmt: skip
        self.link.start()


@contextlib.asynccontextmanager
async def worker(
    address: str, resume_window_s: float = 2.0, tcp: Tcp | None = None
) -> AsyncIterator[tuple[WorkerServer, Handler, str]]:
    handler = Handler()
    server = WorkerServer(hello, handler, SECRET, resume_window_s=resume_window_s)
    bound = await server.start(address, tcp)
    try:
        yield server, handler, bound
    finally:
        await server.stop(0.2)


async def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Wait for `condition`; fail if it does not come true."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


async def status_of(
    address: str, *messages: bytes, metadata: object = credentials(SECRET)
) -> tuple[grpc.StatusCode, str]:
    """What a stream with these messages ends with."""
    async with connect(address) as channel:
        call = channel.stream_stream(STREAM_METHOD)(metadata=metadata)
        try:
            for message in messages:
                await call.write(message)
            while await call.read() is not grpc.aio.EOF:
                pass
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass
        return await call.code(), await call.details()


class Proxy:
    """Forwards a Unix socket to another; `cut()` breaks what is open, `stalled` holds it back."""

    def __init__(self, path: Path, target: Path) -> None:
        self.address = f"unix:{path}"
        self._path = path
        self._target = target
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: list[asyncio.Task[None]] = []
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.num_connections = 0

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_unix_server(self._accept, self._path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self.cut()

    async def cut(self) -> None:
        writers, self._writers = self._writers, []
        for writer in writers:
            writer.transport.abort()
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            up_reader, up_writer = await self._connect()
        except OSError:  # nobody listens there any more
            writer.transport.abort()
            return
        self._writers += [writer, up_writer]
        self._tasks += [
            asyncio.create_task(self._copy(reader, up_writer)),
            asyncio.create_task(self._copy(up_reader, writer)),
        ]

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_unix_connection(self._target)

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(4096):
                await self.flowing.wait()
                writer.write(data)
                await writer.drain()
        writer.transport.abort()


class TcpProxy(Proxy):
    """The same, of a TCP address to another."""

    def __init__(self, target: str) -> None:
        super().__init__(Path(), Path())
        self._host, _, self._port = target.rpartition(":")

    async def __aenter__(self) -> TcpProxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self._host, int(self._port))
