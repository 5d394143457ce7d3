"""Measures the ways from one worker's store to this one: what `baton fabric check` asks for.

Real blocks are fetched under a real grant into memory of its own, over each way in turn, on a
thread of its own; the engine and its KV pool have no part in it.
"""

from __future__ import annotations

import time
from typing import Final

import numpy as np

from baton.errors import ConfigError
from baton.fabric.transport import ReadResult, Transport, Wanted
from baton.rpc.messages import Measure, Measured
from baton.worker.ways import Ways

ROUNDS_S: Final = 0.5
"""For how long each way is used."""
FETCH_S: Final = 2.0
"""Deadline of one fetch."""
MAX_BLOCKS: Final = 64


def measure(ways: Ways, ask: Measure) -> list[Measured]:
    """One figure for each way by which blocks of the lender could come; none if it lent none."""
    sealed, block_bytes = ask.sealed, ask.kv_format.block_bytes
    places = list(zip(sealed.keys, sealed.frames, sealed.digests, strict=False))[:MAX_BLOCKS]
    wanted = [Wanted(*place, np.empty(block_bytes, np.uint8)) for place in places]
    found = []
    for name in ways.names(sealed.grant, ask.kv_format) if wanted else ():
        try:
            way = ways.open(name, ask.kv_format)
        except ConfigError as error:
            found.append(Measured(ask.number, name, str(error)))
            continue
        try:
            found.append(_measure(way, ask, name, wanted, block_bytes))
        finally:
            way.close()
    return found


def _measure(
    way: Transport, ask: Measure, name: str, wanted: list[Wanted], block_bytes: int
) -> Measured:
    number, grant = ask.number, ask.sealed.grant
    one = wanted[:1]
    result = way.fetch(grant, one, time.monotonic() + FETCH_S)[0]  # connects
    if result is not ReadResult.OK:
        return Measured(number, name, f"a block did not come: {result}")
    singles: list[float] = []
    alls: list[float] = []
    started, cpu = time.monotonic(), time.process_time()
    num_blocks = 0
    while not alls or time.monotonic() - started < ROUNDS_S:
        for blocks, times in ((one, singles), (wanted, alls)):
            before = time.monotonic()
            results = way.fetch(grant, blocks, before + FETCH_S)
            times.append(time.monotonic() - before)
            if bad := [result for result in results if result is not ReadResult.OK]:
                return Measured(number, name, f"{len(bad)} blocks did not come: {bad[0]}")
            num_blocks += len(blocks)
    num_bytes = len(wanted) * block_bytes
    cpu_s = (time.process_time() - cpu) * len(wanted) / num_blocks
    return Measured(
        number,
        name,
        latency_s=float(np.median(singles)),
        bytes_per_s=num_bytes / float(np.median(alls)),
        cpu_s_per_byte=cpu_s / num_bytes,
    )
