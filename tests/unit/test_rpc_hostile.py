"""Garbage, strangers, oversize messages and sudden death."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import grpc
import grpc.aio
import pytest
from rpc_ends import LOAD, SECRET, Gateway, run, status_of, until, worker
from rpc_garbage import garbage, is_malformed

from baton.errors import ConfigError
from baton.rpc import auth
from baton.rpc.auth import credentials
from baton.rpc.channel import ANNOUNCE_METHOD, STREAM_METHOD, connect
from baton.rpc.client import announce
from baton.rpc.messages import (
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    Announce,
    AnnounceReply,
    Instructions,
    MalformedMessage,
    Open,
    decode_to_gateway,
    decode_to_worker,
    encode,
)
from baton.rpc.server import RegistryServer
from baton.types import Role

WORKER_PROGRAM = """
import asyncio, sys
from rpc_ends import *
async def main():
    async with worker(sys.argv[1]) as (srv, handler, address):
        print("ready", flush=True)
        step = 0
        while True:
            srv.report("gw", load=LOAD)
            await asyncio.sleep(0.005)
asyncio.run(main())
"""


def test_garbageis_malformed_or_a_message_and_nothing_else() -> None:
    rng = random.Random(5)
    found = [is_malformed(garbage(rng)) for _ in range(4000)]
    assert 2500 < sum(found) < 4000


def test_garbage_never_reaches_the_handler(tmp_path: Path) -> None:
    """In a process of its own: grpc.aio's client may crash, later, after many refused streams."""
    done = subprocess.run(
        [sys.executable, "-m", "rpc_garbage", f"unix:{tmp_path}/w"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "clean\n", done.stderr


def test_wrong_order_of_messages_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with worker(f"unix:{tmp_path}/w") as (_, handler, address):
            for messages in ([Instructions(index=1)], [Open("gw", 1), Open("gw", 1)]):
                code, _ = await status_of(address, *map(encode, messages))
                assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert handler.messages == []

    run(main())


def test_garbage_from_a_worker_loses_the_link(tmp_path: Path) -> None:
    async def main() -> None:
        async with worker(f"unix:{tmp_path}/w") as (srv, _, address):
            gateway = Gateway(address)
            await until(lambda: gateway.hellos)
            srv._peers["gw"].outbox.append(b"\xc1garbage")
            srv.report("gw", load=LOAD)
            await until(lambda: gateway.losses)
            assert "malformed" in gateway.losses[0]
            assert gateway.reports == []

    run(main())


@pytest.mark.parametrize("metadata", [None, [("baton-token", "é".encode().hex())], "other"])
def test_strangers_are_refused(tmp_path: Path, metadata: object) -> None:
    sent = credentials(b"x" * 32) if metadata == "other" else metadata

    async def main() -> None:
        async with worker(f"unix:{tmp_path}/w") as (_, handler, address):
            code, _ = await status_of(address, encode(Open("gw", 1)), metadata=sent)
            assert code is grpc.StatusCode.UNAUTHENTICATED
            gateway = Gateway(address, secret=b"x" * 32)
            await until(lambda: gateway.losses)
            assert "UNAUTHENTICATED" in gateway.losses[0]
            assert handler.events == []

    run(main())


def test_oversize_messages_are_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with worker(f"unix:{tmp_path}/w") as (_, handler, address):
            # A client without our own limit on what it sends.
            options = (("grpc.max_send_message_length", -1),)
            async with grpc.aio.insecure_channel(address, options=options) as channel:
                call = channel.stream_stream(STREAM_METHOD)(metadata=credentials(SECRET))
                await call.write(encode(Open("gw", 1)))
                await call.read()
                with pytest.raises((grpc.aio.AioRpcError, asyncio.InvalidStateError)):
                    await call.write(bytes(MAX_MESSAGE_BYTES + 1))
                    while await call.read() is not grpc.aio.EOF:
                        pass
                assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert handler.messages == []
        for decode in (decode_to_worker, decode_to_gateway):
            with pytest.raises(MalformedMessage, match="exceeds"):
                decode(bytes(MAX_MESSAGE_BYTES + 1))

    run(main())


@pytest.mark.parametrize("address", ["unix:{}/w", "127.0.0.1:0"])
def test_killed_worker_is_lost_at_once(tmp_path: Path, address: str) -> None:
    path = address.format(tmp_path)
    if path.endswith(":0"):
        path = "127.0.0.1:" + str(_free_port())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WORKER_PROGRAM, path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"

            async def main() -> float:
                gateway = Gateway(path)
                await until(lambda: len(gateway.reports) > 10)
                started = time.monotonic()
                process.send_signal(signal.SIGKILL)
                await until(lambda: gateway.losses)
                elapsed = time.monotonic() - started
                await asyncio.sleep(0.5)
                assert len(gateway.losses) == 1
                return elapsed

            assert run(main()) < 5.0, "the kernel tells; keepalive would take 10 s"
        finally:
            process.kill()


def test_announce_retries_until_there_is_a_gateway(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/g"
    message = Announce("decode-0", f"unix:{tmp_path}/w", Role.DECODE, 7)
    seen: list[Announce] = []

    def on_announce(said: Announce, caller: str | None) -> AnnounceReply:
        assert caller is None
        seen.append(said)
        return AnnounceReply(said.role is Role.DECODE, "")

    async def main() -> None:
        early = asyncio.create_task(announce(address, message, SECRET))
        await asyncio.sleep(0.1)
        assert not early.done()
        registry = RegistryServer(on_announce, SECRET)
        await registry.start(address)
        assert await asyncio.wait_for(early, 20) == AnnounceReply(True)
        assert seen == [message]
        refused = await announce(address, Announce("p", "unix:x", Role.PREFILL, 1), SECRET)
        assert not refused.accepted
        stranger = await announce(address, message, b"x" * 32)
        assert (stranger.accepted, "UNAUTHENTICATED" in stranger.reason) == (False, True)
        skewed = await announce(address, Announce("p", "unix:x", Role.PREFILL, 1, 99), SECRET)
        assert (skewed.accepted, f"protocol {PROTOCOL_VERSION}" in skewed.reason) == (False, True)
        assert len(seen) == 2
        async with connect(address) as channel:
            with pytest.raises(grpc.aio.AioRpcError, match="INVALID_ARGUMENT"):
                await channel.unary_unary(ANNOUNCE_METHOD)(b"\xc1", metadata=credentials(SECRET))
        assert len(seen) == 2
        await registry.stop(0.1)

    run(main())


def test_secret_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        auth.read_secret(tmp_path)
    secret = auth.create_secret(tmp_path)
    assert len(secret) == 32
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    assert auth.read_secret(tmp_path) == secret
    with pytest.raises(FileExistsError):
        auth.create_secret(tmp_path)
    assert secret.hex() not in auth.token(secret)
    (tmp_path / "secret").chmod(0o640)
    with pytest.raises(ConfigError, match="open to other users"):
        auth.read_secret(tmp_path)
    (tmp_path / "secret").chmod(0o600)
    (tmp_path / "secret").write_bytes(b"short")
    with pytest.raises(ConfigError, match="32 bytes"):
        auth.read_secret(tmp_path)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
