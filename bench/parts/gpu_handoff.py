"""A prompt's KV from one process to another, both with the model on the same GPU.

    prefill process                              decode process
    prompt ─▶ pool ─▶ pinned ─▶ store ═ memfd ═▶ copy, digest, check ─▶ pinned ─▶ pool ─▶ a step

Each half is timed alone, one after the other, so the sum is what a handoff takes when nothing
overlaps; in the engine a chunk's blocks travel while the next chunk is computed. The other
process's next token, and every block's digest, must be the first one's.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.connection import Connection

import numpy as np
import torch

from baton.fabric.arena import Arena, MappedArena
from baton.fabric.transport import ReadResult
from baton.model.kv_cache import KvCache
from baton.model.transformer import Transformer
from baton.model_spec import ModelSpec
from baton.types import KvFormat
from parts.gpu_model import BLOCK_SIZE, Decoding, prompt_batch, random_model, random_pool

EPOCH = 1
ROUNDS = 3  # the first one compiles and pins


def measure(spec: ModelSpec, length: int, device: str) -> dict[str, float]:
    """Milliseconds by phase, of the last round; `length` tokens.

    Raises:
        RuntimeError: the token after the handoff is another, or a block did not come whole.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    other = context.Process(target=_decode, args=(theirs, spec, length, device))
    other.start()
    theirs.close()  # so that its death ends our waiting
    try:
        return _prefill(ours, spec, length, device)
    finally:
        ours.close()
        other.join(60)


def _prefill(pipe: Connection, spec: ModelSpec, length: int, device: str) -> dict[str, float]:
    model, kv = random_model(spec, device, False), random_pool(spec, length + BLOCK_SIZE, device)
    num_blocks = -(-length // BLOCK_SIZE)
    kv_format = KvFormat(
        BLOCK_SIZE, spec.dtype, spec.num_layers, spec.num_kv_heads, spec.head_dim, kv.block_bytes
    )
    arena = Arena.create(num_blocks, kv.block_bytes, EPOCH, kv_format)
    batch = prompt_batch(spec, length, device)
    phases: dict[str, float] = {}
    pipe.recv()  # the other process has its model
    for _ in range(ROUNDS):
        started = time.perf_counter()
        token = int(model.forward(batch, kv).argmax(-1))
        computed = time.perf_counter()
        digests = [
            arena.write(block, _key(block), kv.reader(block)()) for block in range(num_blocks)
        ]
        exported = time.perf_counter()
        pipe.send((os.getpid(), arena.fd, digests, token))
        theirs, their_token = pipe.recv()
        mine = _next_token(model, kv, length, token)
        if mine != their_token:
            raise RuntimeError(f"after the handoff token {their_token}, not {mine}")
        phases = {
            "prefill_ms": 1e3 * (computed - started),
            "export_ms": 1e3 * (exported - computed),
            **theirs,
        }
    pipe.send(None)
    phases["handoff_ms"] = sum(phases[name] for name in ("export_ms", "fetch_ms", "land_ms"))
    phases["kv_mb"] = num_blocks * kv.block_bytes / 1e6
    return phases


def _decode(pipe: Connection, spec: ModelSpec, length: int, device: str) -> None:
    model, kv = random_model(spec, device, False), random_pool(spec, length + BLOCK_SIZE, device)
    pipe.send("ready")
    while (sent := pipe.recv()) is not None:
        pid, fd, digests, token = sent
        mapped = MappedArena(os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY), EPOCH)
        phases = dict.fromkeys(("fetch_ms", "land_ms"), 0.0)
        for block, digest in enumerate(digests):
            started = time.perf_counter()
            landing: np.ndarray = kv.landing(block)
            result = mapped.read(block, _key(block), digest, landing)
            fetched = time.perf_counter()
            if result is not ReadResult.OK:
                raise RuntimeError(f"block {block}: {result}")
            kv.land(block, landing)
            phases["fetch_ms"] += 1e3 * (fetched - started)
            phases["land_ms"] += 1e3 * (time.perf_counter() - fetched)
        mapped.close()
        started = time.perf_counter()
        found = _next_token(model, kv, length, token)
        phases["first_step_ms"] = 1e3 * (time.perf_counter() - started)
        pipe.send((phases, found))


def _key(block: int) -> bytes:
    return block.to_bytes(32, "little")


def _next_token(model: Transformer, kv: KvCache, length: int, token: int) -> int:
    decoding = Decoding(model, kv, 1, length)
    decoding.tokens = torch.full_like(decoding.tokens, token)
    decoding.step()
    return int(decoding.tokens)
