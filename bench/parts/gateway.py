"""What a streamed token costs the gateway process, in its own CPU time.

    clients (this process) ──HTTP, SSE──▶ `baton gateway` ══gRPC══ fake worker (a process)

The gateway is the real one, with its real sockets. The worker reports a letter for each of 64
requests in one message every 30 ms, so tokens come one at a time as from a real one; `joined`
tells how many tokens came in one event on average, which should be near 1. A request of one token
is subtracted, so that the figure is the slope: what one more token costs.

`bare ASGI` is the floor in the same run: uvicorn alone, sending the same events at the same pace.
Most of it is the system's own work of one small write to a socket for each token.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import tempfile
from pathlib import Path

import msgspec
import numpy as np

from baton.rpc.auth import create_secret
from parts.processes import cpu_s, running, wait_until
from parts.table import Row
from parts.tokenizer_dir import write_tokenizer

NUM_CLIENTS = 64
NUM_TOKENS = 100
NUM_ROUNDS = 5
STEP_S = 0.03
BODIES = {
    "/v1/completions": {"prompt": "What does os.path.join do?"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "What is a list?"}]},
}


def measure() -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as name:
        directory = Path(name)
        create_secret(directory)
        (directory / "model").mkdir()
        write_tokenizer(directory / "model")
        port, admin_port = _free_port(), _free_port()
        gateway = (
            "-m", "baton", "gateway", "--runtime-dir", name, "--model", str(directory / "model"),
            "--layout", "1U", "--port", str(port), "--gateway.admin-port", str(admin_port),
            "--log.level", "warning",
        )  # fmt: skip
        worker = ("-m", "parts.fake_worker", name, str(STEP_S))
        with running(*gateway) as process, running(*worker):
            wait_until(lambda: _is_ready(port), process)
            rows = [asyncio.run(_measure(process, port, path)) for path in BODIES]
        port, path = _free_port(), next(iter(BODIES))
        with running("-m", "parts.bare_asgi", str(port), str(STEP_S)) as process:
            wait_until(lambda: _is_ready(port), process)
            floor = asyncio.run(_measure(process, port, path))
            return [*rows, msgspec.structs.replace(floor, case="bare ASGI, the same events")]


async def _measure(gateway: subprocess.Popen[bytes], port: int, path: str) -> Row:
    await _round(port, path, 10)  # what is made once, at the first request
    short, long, joined = [], [], []
    for _ in range(NUM_ROUNDS):
        at_start = cpu_s(gateway.pid)
        await _round(port, path, 1)
        at_half = cpu_s(gateway.pid)
        num_events = await _round(port, path, NUM_TOKENS)
        long.append(cpu_s(gateway.pid) - at_half)
        short.append(at_half - at_start)
        joined.append(NUM_CLIENTS * NUM_TOKENS / num_events)
    per_request = float(np.median(short)) / NUM_CLIENTS
    per_token = (float(np.median(long)) / NUM_CLIENTS - per_request) / (NUM_TOKENS - 1)
    values = {
        "token_us": 1e6 * per_token,
        "tokens_per_cpu_s": 1 / per_token,
        "request_us": 1e6 * per_request,
        "joined": float(np.median(joined)),
    }
    return Row("gateway: 64 clients, 100 tokens each", path, values)


async def _round(port: int, path: str, num_tokens: int) -> int:
    """All clients once; the number of events with text."""
    counts = await asyncio.gather(*(_stream(port, path, num_tokens) for _ in range(NUM_CLIENTS)))
    return sum(counts)


async def _stream(port: int, path: str, num_tokens: int) -> int:
    body = json.dumps(
        {"model": "model", **BODIES[path], "stream": True, "max_tokens": num_tokens}
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + body)
    answer = await reader.read(-1)
    writer.close()
    if b"data: [DONE]" not in answer:
        raise RuntimeError(f"{path} answered {answer[:500]!r}")
    num_letters = answer.count(b'"text":"') + answer.count(b'{"content":"')
    return num_letters


def _is_ready(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.sendall(b"GET /ready HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")
            return connection.recv(64).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
