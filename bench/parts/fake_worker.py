"""A worker process without a model, with the real RPC: `fake_worker.py RUNTIME_DIR STEP_S`.

Every STEP_S seconds it reports one letter for each request that it has, all in one message as a
real worker does; with 0 it reports as soon as a request is there. It announces itself to the
gateway of RUNTIME_DIR as a unified worker.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import uvloop

from baton.core.liveness import HEARTBEAT_S
from baton.rpc.auth import read_secret
from baton.rpc.client import announce
from baton.rpc.messages import Announce, Hello, Instructions
from baton.rpc.server import WorkerServer
from baton.types import FinishReason, KvFormat, Pulse, Request, Role, TokenDelta, WorkerLoad
from parts.tokenizer_dir import LETTERS

WORKER_ID = "unified-0"
MAX_MODEL_LEN = 4096


def hello() -> Hello:
    return Hello(
        worker_id=WORKER_ID, role=Role.UNIFIED, epoch=1, model="bench", fingerprint=bytes(32),
        numerics="none", kv_format=KvFormat(16, "bfloat16", 1, 1, 1, 64), num_blocks=1 << 20,
        max_model_len=MAX_MODEL_LEN, max_num_seqs=256, max_num_batched_tokens=512,
        vocab_size=300, device="none", dtype="bfloat16",
    )  # fmt: skip


class FakeWorker:
    """Reports letters; see above."""

    def __init__(self, secret: bytes, step_s: float) -> None:
        self.server = WorkerServer(hello, self, secret)
        self._step_s = step_s
        self._live: dict[tuple[str, int], tuple[Request, int]] = {}
        self._counters = {f"counter_{i}": i for i in range(12)}  # about as many as the real one's

    def opened(self, gateway_id: str, epoch: int, resumed: bool) -> None: ...

    def lost(self, gateway_id: str) -> None: ...

    def forgotten(self, gateway_id: str) -> None:
        self._live.clear()

    def instructions(self, gateway_id: str, instructions: Instructions) -> None:
        for request in instructions.submit:
            self._live[request.id, request.choice] = (request, 0)
        for abort in instructions.abort:
            self._live.pop((abort.request_id, abort.choice), None)
        if not self._step_s:
            self.step()

    def step(self) -> None:
        """One letter for everyone."""
        deltas = []
        for key, (request, index) in list(self._live.items()):
            ends = index + 1 == request.sampling.max_tokens
            deltas.append(
                TokenDelta(
                    request.id, request.choice, request.attempt, index,
                    (LETTERS[index % len(LETTERS)],),
                    finish=FinishReason.LENGTH if ends else None,
                    num_cached=0 if index == 0 else None,
                )
            )  # fmt: skip
            self._live[key] = (request, index + 1)
            if ends:
                del self._live[key]
        if deltas:
            load = WorkerLoad(num_total_blocks=1 << 20, num_running=len(self._live))
            for gateway_id in self.server.gateways():
                self.server.report(
                    gateway_id, load=load, deltas=tuple(deltas), counters=self._counters
                )

    async def run(self, runtime_dir: Path) -> None:
        address = await self.server.start(f"unix:{runtime_dir / WORKER_ID}.sock")
        gateway = f"unix:{runtime_dir / 'gateway.sock'}"
        announced = Announce(WORKER_ID, address, Role.UNIFIED, 1)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(announce(gateway, announced, read_secret(runtime_dir)))
            tasks.create_task(self._tick())
            tasks.create_task(self._beat())

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            for gateway_id in self.server.gateways():
                self.server.report(gateway_id, load=WorkerLoad(), pulse=Pulse())

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._step_s or 3600)
            self.step()


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    worker = FakeWorker(read_secret(directory), float(sys.argv[2]))
    uvloop.run(worker.run(directory))
