"""Garbage for a worker's stream; as a program, throws it at one: prints `clean` if it lives."""

from __future__ import annotations

import asyncio
import os
import random
import sys

import grpc
import grpc.aio
from rpc_ends import SECRET, Gateway, hello, request, run, until, worker

from baton.rpc.auth import credentials
from baton.rpc.channel import STREAM_METHOD, connect
from baton.rpc.messages import Instructions, MalformedMessage, Open, decode_to_worker, encode

NUM_MESSAGES = 400
NUM_AT_ONCE = 16


def garbage(rng: random.Random) -> bytes:
    """Random bytes, or a real message with some of its bytes changed, cut or repeated."""
    real = [
        encode(Open("gw", 1)),
        encode(Instructions(submit=(request("r"),), ack=0, index=1)),
        encode(hello()),
    ]
    kind = rng.randrange(4)
    if kind == 0:
        return rng.randbytes(rng.randrange(200))
    data = bytearray(rng.choice(real))
    if kind == 1:
        del data[rng.randrange(len(data)) :]
    elif kind == 2:
        data[rng.randrange(len(data)) :] = b"\x91" * rng.randrange(5000)  # nested arrays
    else:
        for _ in range(rng.randrange(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def is_malformed(data: bytes) -> bool:
    try:
        decode_to_worker(data)
    except MalformedMessage:
        return True
    return False


async def throw(address: str) -> None:
    """Send malformed messages on streams of their own; a good request must still come through."""
    rng = random.Random(5)
    bad = [data for data in (garbage(rng) for _ in range(NUM_MESSAGES)) if is_malformed(data)]
    assert len(bad) > NUM_MESSAGES // 2
    async with worker(address) as (_, handler, _):
        async with connect(address) as channel:
            stream = channel.stream_stream(STREAM_METHOD)

            async def send(number: int, data: bytes) -> grpc.StatusCode:
                call = stream(metadata=credentials(SECRET))
                try:
                    if number % 4 == 0:  # every fourth comes after a proper start
                        await call.write(encode(Open(f"gw{number}", 1)))
                        await call.read()
                    await call.write(data)
                    while await call.read() is not grpc.aio.EOF:
                        pass
                except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    pass
                return await call.code()

            for start in range(0, len(bad), NUM_AT_ONCE):
                batch = enumerate(bad[start : start + NUM_AT_ONCE], start)
                codes = await asyncio.gather(*(send(n, data) for n, data in batch))
                assert set(codes) == {grpc.StatusCode.INVALID_ARGUMENT}
        assert handler.messages == []
        gateway = Gateway(address)
        gateway.link.submit(request("good"))
        await until(lambda: handler.submitted() == ["good"])
        sys.stdout.write("clean\n")
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    run(throw(sys.argv[1]))
