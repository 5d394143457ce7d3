"""What KV blocks cost between the workers that are there: measured on blocks of real prompts.

    for each worker whose store holds something:  Lend ─▶ Sealed
        for each other worker, one after the other:  Measure ─▶ Measured…  (see `worker.measure`)
    then the lease is released

Nothing is measured of a worker whose store holds no block yet: send it a prompt first, as
`baton fabric check` does.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Final

import msgspec

from baton.core.router import Router
from baton.gateway.registry import Member, Registry
from baton.rpc.messages import Measure, Measured
from baton.types import Lend, Sealed

ANSWER_S: Final = 20.0
MAX_BLOCKS: Final = 64


class FabricLink(msgspec.Struct, frozen=True):
    """One way from one store to one reader; the figures are 0 if `problem` says why."""

    source: str
    reader: str
    transport: str
    problem: str
    latency_s: float
    bytes_per_s: float
    cpu_s_per_byte: float


class FabricReport(msgspec.Struct, frozen=True):
    """What was measured, and what a prompt's KV weighs: bytes for each token."""

    kv_bytes_per_token: float
    links: list[FabricLink]
    silent: list[str]


class FabricCheck:
    """One measurement at a time. Runs on the event loop's thread."""

    def __init__(self, registry: Registry, router: Router) -> None:
        self._registry = registry
        self._router = router
        self._lock = asyncio.Lock()
        self._num_asked = 0
        self._lent: asyncio.Future[Sealed] | None = None
        self._request_id = ""
        self._measured: asyncio.Future[tuple[Measured, ...]] | None = None

    def took(self, sealed: Sealed) -> bool:
        """Whether this answer was for us."""
        if self._lent is None or self._lent.done() or sealed.request_id != self._request_id:
            return False
        self._lent.set_result(sealed)
        return True

    def measured(self, found: tuple[Measured, ...]) -> None:
        if self._measured is not None and not self._measured.done():
            self._measured.set_result(found)

    async def run(self) -> FabricReport:
        """Measure every pair of workers, one after the other."""
        async with self._lock:
            links: list[FabricLink] = []
            silent = []
            members = self._registry.joined()
            for source in members:
                with self._borrowed(source) as lending:
                    try:
                        sealed = await asyncio.wait_for(lending, ANSWER_S)
                    except TimeoutError:
                        silent.append(source.announced.worker_id)
                        continue
                    if not sealed.keys:
                        silent.append(source.announced.worker_id)
                        continue
                    for reader in members:
                        if reader is not source:
                            links += await self._measure(source, reader, sealed)
            hello = self._registry.hello()
            weight = hello.kv_format.block_bytes / hello.kv_format.block_size if hello else 0.0
            return FabricReport(weight, links, silent)

    @contextlib.contextmanager
    def _borrowed(self, source: Member) -> Iterator[asyncio.Future[Sealed]]:
        """Blocks of this worker's store, and the end of their lease."""
        self._num_asked += 1
        self._request_id = f"fabric-check-{self._num_asked}"
        lending = self._lent = asyncio.get_running_loop().create_future()
        keys = self._router.stored(source.announced.worker_id)[-MAX_BLOCKS:]
        source.link.lend(Lend(self._request_id, 0, 0, "", 0, tuple(keys)))
        try:
            yield lending
        finally:
            self._lent = None
            if lending.done() and not lending.cancelled():
                source.link.release(lending.result().grant.grant_id)

    async def _measure(self, source: Member, reader: Member, sealed: Sealed) -> list[FabricLink]:
        assert source.hello is not None, "it has joined"
        self._measured = asyncio.get_running_loop().create_future()
        reader.link.measure(Measure(self._num_asked, sealed, source.hello.kv_format))
        source.link.renew(sealed.grant.grant_id)
        names = (source.announced.worker_id, reader.announced.worker_id)
        try:
            found = await asyncio.wait_for(self._measured, ANSWER_S)
        except TimeoutError:
            return [FabricLink(*names, "-", "the reader does not answer", 0.0, 0.0, 0.0)]
        return [
            FabricLink(*names, m.transport, m.problem, m.latency_s, m.bytes_per_s, m.cpu_s_per_byte)
            for m in found
            if m.number == self._num_asked
        ]
