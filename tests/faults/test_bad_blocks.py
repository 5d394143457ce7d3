"""A handoff whose blocks cannot be trusted: recomputed, counted by reason, and never used.

A prefill and a decode engine in this process, joined as two workers are: a real store in sealed
shared memory, its descriptor over a real socket, real fabric threads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from faults.served import make_model, prompt_of

from baton.config import load_config
from baton.engine.build import build_engine
from baton.engine.engine import Emitted
from baton.engine.inbox import Release, Submit
from baton.fabric.arena import Arena
from baton.fabric.descriptors import DescriptorServer
from baton.fabric.shm import ShmTransport
from baton.fabric.thread import Fabric
from baton.types import Handoff, Request, SamplingParams, TokenDelta

NUM_PROMPT = 100  # six full blocks and a partial one
GREEDY = SamplingParams(max_tokens=24, temperature=0.0)


class End:
    """One worker's engine, store and fabric, without the process around them."""

    def __init__(self, model: Path, runtime_dir: Path, name: str, epoch: int) -> None:
        config = load_config(
            None,
            {
                "model.path": str(model),
                "engine.num_kv_blocks": 64,
                "engine.max_num_batched_tokens": 48,
                "store.max_bytes": 4 << 20,
            },
        )
        secret = name.encode().ljust(32)
        built = build_engine(
            config, model, self._emitted, worker_id=name, epoch=epoch, lease_secret=secret
        )
        kv_format = built.scheduler_config.kv_format
        limits = built.limits
        self.engine = built.engine
        self.deltas: list[TokenDelta] = []
        self.handoffs: list[Handoff] = []
        self.arena = Arena.create(limits.num_frames, limits.block_bytes, epoch, kv_format)
        self.descriptors = DescriptorServer(runtime_dir, name, self.arena, secret)
        self.fabric = Fabric(
            self.arena, lambda *_: ShmTransport(runtime_dir, kv_format), self.engine.inbox.put
        )
        self.engine.fabric = self.fabric

    def _emitted(self, emitted: Emitted) -> None:
        self.deltas += emitted.update.deltas
        self.handoffs += emitted.update.handoffs

    def run(self, request: Request) -> list[int]:
        """Tokens of one request, run until it is over here."""
        self.deltas, self.handoffs = [], []
        self.engine.inbox.put(Submit(request))
        while not self._is_over():
            if not self.engine.step() and not self._is_over():
                self.engine.wait()
        assert all(delta.error is None for delta in self.deltas), self.deltas
        return [token for delta in self.deltas for token in delta.token_ids]

    def _is_over(self) -> bool:
        return bool(self.handoffs) or any(delta.finish for delta in self.deltas)

    def counter(self, name: str) -> int:
        return self.engine.scheduler.counters[name]

    def fallbacks(self) -> dict[str, int]:
        counters = self.engine.scheduler.counters
        return {n: c for n, c in counters.items() if n.startswith("fallback_") and c}

    def close(self) -> None:
        self.fabric.stop()
        self.descriptors.stop()
        self.arena.close()


class Pair:
    """Both ends, and what the answer is when one engine computes all of it."""

    def __init__(self, prefill: End, decode: End) -> None:
        self.prefill = prefill
        self.decode = decode


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_model(tmp_path_factory.mktemp("served") / "org-tiny")


@pytest.fixture
def pair(model: Path, tmp_path: Path) -> Iterator[Pair]:
    with contextlib.ExitStack() as stack:
        ends = []
        for epoch, name in enumerate(("prefill-0", "decode-0"), 11):
            end = End(model, tmp_path, name, epoch)
            stack.callback(end.close)
            ends.append(end)
        yield Pair(*ends)
        for end in ends:
            while end.engine.scheduler.num_transfers:
                end.engine.wait()  # blocks that are kept are still being copied
            end.engine.scheduler.check()
            assert end.engine.scheduler.num_sequences == 0
            assert end.engine.scheduler.pool.num_free == 64


def flip(end: End, frame: int, offset: int = 100) -> None:
    end.arena._bytes[end.arena.geometry.frame_at(frame) + offset] ^= 1


Spoil = Callable[[Pair, Handoff], Handoff]


def none(pair: Pair, handoff: Handoff) -> Handoff:
    return handoff


def flipped_first(pair: Pair, handoff: Handoff) -> Handoff:
    flip(pair.prefill, handoff.frames[0])
    return handoff


def flipped_middle(pair: Pair, handoff: Handoff) -> Handoff:
    flip(pair.prefill, handoff.frames[3], 5000)
    return handoff


def flipped_tail(pair: Pair, handoff: Handoff) -> Handoff:
    flip(pair.prefill, handoff.frames[-1], 0)
    return handoff


def frames_exchanged(pair: Pair, handoff: Handoff) -> Handoff:
    """The hints point to each other's block."""
    frames = list(handoff.frames)
    frames[1], frames[2] = frames[2], frames[1]
    return msgspec.structs.replace(handoff, frames=tuple(frames))


def contents_exchanged(pair: Pair, handoff: Handoff) -> Handoff:
    """Under the right keys, two blocks of the right form with the other's content."""
    arena = pair.prefill.arena
    size = arena.geometry.frame_bytes
    starts = [arena.geometry.frame_at(handoff.frames[i]) for i in (1, 2)]
    one, two = (arena._bytes[start : start + size].copy() for start in starts)
    arena._bytes[starts[0] : starts[0] + size] = two
    arena._bytes[starts[1] : starts[1] + size] = one
    return handoff


def half_written(pair: Pair, handoff: Handoff) -> Handoff:
    pair.prefill.arena.invalidate(handoff.frames[2])
    return handoff


def no_such_frame(pair: Pair, handoff: Handoff) -> Handoff:
    return msgspec.structs.replace(handoff, frames=(*handoff.frames[:-1], 10**6))


def other_digest(pair: Pair, handoff: Handoff) -> Handoff:
    return msgspec.structs.replace(handoff, digests=(bytes(16), *handoff.digests[1:]))


def other_epoch(pair: Pair, handoff: Handoff) -> Handoff:
    grant = msgspec.structs.replace(handoff.grant, epoch=handoff.grant.epoch + 1)
    return msgspec.structs.replace(handoff, grant=grant)


def forged_grant(pair: Pair, handoff: Handoff) -> Handoff:
    grant = msgspec.structs.replace(handoff.grant, mac=bytes(len(handoff.grant.mac)))
    return msgspec.structs.replace(handoff, grant=grant)


def other_source(pair: Pair, handoff: Handoff) -> Handoff:
    grant = msgspec.structs.replace(handoff.grant, source="prefill-9")
    return msgspec.structs.replace(handoff, grant=grant)


def path_as_source(pair: Pair, handoff: Handoff) -> Handoff:
    grant = msgspec.structs.replace(handoff.grant, source="../../etc/passwd")
    return msgspec.structs.replace(handoff, grant=grant)


def other_format(pair: Pair, handoff: Handoff) -> Handoff:
    kv_format = msgspec.structs.replace(handoff.kv_format, num_kv_heads=4)
    return msgspec.structs.replace(handoff, kv_format=kv_format)


def one_key_short(pair: Pair, handoff: Handoff) -> Handoff:
    return msgspec.structs.replace(handoff, keys=handoff.keys[:-1])


def other_keys(pair: Pair, handoff: Handoff) -> Handoff:
    return msgspec.structs.replace(handoff, keys=(bytes(32), *handoff.keys[1:]))


def dead_source(pair: Pair, handoff: Handoff) -> Handoff:
    pair.prefill.descriptors.stop()
    return handoff


@pytest.mark.parametrize(
    ("spoil", "reason", "num_usable"),
    [
        (none, None, 7),
        (flipped_first, "corrupt", 0),
        (flipped_middle, "corrupt", 3),
        (flipped_tail, "corrupt", 6),
        (frames_exchanged, "missing", 1),
        (contents_exchanged, "corrupt", 1),
        (half_written, "missing", 2),
        (no_such_frame, "out_of_range", 6),
        (other_digest, "corrupt", 0),
        (other_epoch, "stale_epoch", 0),
        (forged_grant, "refused", 0),
        (other_source, "unreachable", 0),
        (path_as_source, "refused", 0),
        (other_format, "format", 0),
        (one_key_short, "length", 0),
        (other_keys, "key", 0),
        (dead_source, "unreachable", 0),
    ],
)
def test_what_does_not_check_is_recomputed(
    pair: Pair, spoil: Spoil, reason: str | None, num_usable: int
) -> None:
    prompt = tuple(prompt_of(NUM_PROMPT, 3))
    first = pair.prefill.run(Request("r", prompt, GREEDY, hand_off=True))
    (handoff,) = pair.prefill.handoffs
    assert (len(first), len(handoff.keys)) == (1, 7)
    wanted = pair.prefill.run(Request("whole", prompt, GREEDY))
    assert wanted[:1] == first

    handoff = spoil(pair, handoff)
    request = Request("r", prompt, GREEDY, emitted=tuple(first), handoff=handoff)
    assert first + pair.decode.run(request) == wanted

    assert pair.decode.fallbacks() == ({f"fallback_import_{reason}": 1} if reason else {})
    assert pair.decode.counter("imported_blocks") == num_usable
    recomputed = max(0, NUM_PROMPT - 16 * num_usable)
    assert pair.decode.counter("prompt_tokens_computed") == recomputed
    pair.prefill.engine.inbox.put(Release((handoff.grant.grant_id,)))
    pair.prefill.engine.step()
    assert not len(pair.prefill.engine.scheduler.exports.leases)
