"""What giving finished blocks to the store costs a prefill, on the real engine.

Prompts of 1,536 tokens on a random 0.5 B model, in steps of 512: from the second step on, the 32
blocks of the step before (512 KiB each) are copied and digested by the fabric thread while the
step computes, on the same cores. Each round runs one prompt that is handed off and one that is
not. The fabric thread's CPU time is its own clock's; the slow-down is that of the same steps.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from baton.config import load_config
from baton.engine.build import build_engine
from baton.engine.engine import Emitted
from baton.engine.inbox import Release, Submit
from baton.fabric.arena import Arena
from baton.fabric.shm import ShmTransport
from baton.fabric.thread import Done, ExportDone, Fabric
from baton.types import Handoff, Request, SamplingParams, TokenDelta
from parts.big_model import write_model
from parts.fabric import Row, middle

STEP_TOKENS, NUM_STEPS, BLOCK_TOKENS = 512, 3, 16
NUM_BLOCKS = STEP_TOKENS * NUM_STEPS // BLOCK_TOKENS
TARGET = "≤ 3"


class Run(NamedTuple):
    """One prompt. steps_s: wall time of each step, in the last of which its own copies are awaited.

    cpu_s: the fabric thread's. copies_s: wall time of all copies, one after the other.
    """

    steps_s: tuple[float, ...]
    cpu_s: float
    copies_s: float


class Prefill:
    """A prefill worker's engine, store and fabric thread, without the process around them."""

    def __init__(self, model: Path, runtime_dir: Path) -> None:
        config = load_config(
            None,
            {
                "model.path": str(model),
                "engine.num_kv_blocks": 2 * NUM_BLOCKS,
                "engine.max_num_batched_tokens": STEP_TOKENS,
                "engine.prefix_cache": False,
                "store.max_bytes": NUM_BLOCKS << 19,  # so that each export writes every frame
            },
        )
        built = build_engine(
            config, model, self._emitted, worker_id="p0", epoch=1, lease_secret=b"s" * 32
        )
        self.engine, limits = built.engine, built.limits
        kv_format = built.scheduler_config.kv_format
        self.block_bytes = limits.block_bytes
        self.threads = limits.threads
        self._vocab = built.spec.vocab_size
        self._arena = Arena.create(limits.num_frames, limits.block_bytes, 1, kv_format)
        self._transport = ShmTransport(runtime_dir, kv_format)
        self._fabric = Fabric(self._arena, lambda *_: self._transport, self._done)
        self.engine.fabric = self._fabric
        ident = self._fabric._copier._thread.ident
        assert ident is not None
        self._fabric_clock = time.pthread_getcpuclockid(ident)
        self._deltas: list[TokenDelta] = []
        self._handoffs: list[Handoff] = []
        self._copies_s = 0.0
        self._num_copied = 0
        self._num_asked = 0

    def run(self, hand_off: bool) -> Run:
        """One prompt that was never seen, until its first token (and commit record) is there."""
        self._deltas, self._handoffs = [], []
        self._copies_s, self._num_copied = 0.0, 0
        self._num_asked += 1
        rng = np.random.default_rng(self._num_asked)
        prompt = tuple(rng.integers(0, self._vocab, STEP_TOKENS * NUM_STEPS).tolist())
        sampling = SamplingParams(max_tokens=2 if hand_off else 1, temperature=0.0)
        request = Request(f"r{self._num_asked}", prompt, sampling, hand_off=hand_off)
        cpu_start, steps = time.clock_gettime(self._fabric_clock), []
        self.engine.inbox.put(Submit(request))
        while not (self._handoffs if hand_off else any(delta.finish for delta in self._deltas)):
            started = time.perf_counter()
            if self.engine.step():
                steps.append(time.perf_counter() - started)
            elif not self._handoffs:
                self.engine.wait()
        cpu_s = time.clock_gettime(self._fabric_clock) - cpu_start
        assert len(steps) == NUM_STEPS and self._num_copied == (NUM_BLOCKS if hand_off else 0)
        for handoff in self._handoffs:
            self.engine.inbox.put(Release((handoff.grant.grant_id,)))
            self.engine.step()
        return Run(tuple(steps), cpu_s, self._copies_s)

    def close(self) -> None:
        self._fabric.stop()
        self._transport.close()
        self._arena.close()

    def _emitted(self, emitted: Emitted) -> None:
        self._deltas += emitted.update.deltas
        self._handoffs += emitted.update.handoffs
        assert all(delta.error is None for delta in emitted.update.deltas), emitted.update.deltas

    def _done(self, done: Done) -> None:
        """On the fabric thread."""
        assert isinstance(done, ExportDone), done
        self._copies_s += done.elapsed_s
        self._num_copied += 1
        self.engine.inbox.put(done)


def measure(rounds: int) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="baton-fabric-") as name:
        write_model(Path(name) / "model")
        prefill = Prefill(Path(name) / "model", Path(name))
        try:
            cold = prefill.run(hand_off=True)  # frames that no page of memory stands behind yet
            prefill.run(hand_off=False)
            given: list[Run] = []
            kept: list[Run] = []
            for turn in range(rounds):
                for hand_off in (True, False) if turn % 2 else (False, True):
                    (given if hand_off else kept).append(prefill.run(hand_off))
        finally:
            prefill.close()
    return _rows(prefill, cold, given, kept)


def _rows(prefill: Prefill, cold: Run, given: list[Run], kept: list[Run]) -> list[Row]:
    with_s, without_s = (np.array([run.steps_s for run in runs]) for runs in (given, kept))
    cpu_s, copies_s = (np.array(all_) for all_ in zip(*[run[1:] for run in given], strict=True))
    num_bytes = NUM_BLOCKS * prefill.block_bytes
    step, step_spread = middle(1e3 * without_s.mean(axis=1))
    share, share_spread = middle(100 * cpu_s / without_s.sum(axis=1))
    slower, slower_spread = middle(100 * (with_s.sum(axis=1) / without_s.sum(axis=1) - 1))
    least = 100 * (with_s.sum(axis=1).min() / without_s.sum(axis=1).min() - 1)
    beside = 100 * (with_s[:, 1:-1].sum(axis=1) / without_s[:, 1:-1].sum(axis=1) - 1)
    beside_, beside_spread = middle(beside)
    speed, speed_spread = middle(num_bytes / copies_s / 1e9)
    size = f"{num_bytes / NUM_STEPS / 2**20:.0f} MiB a step"
    return [
        Row("step of 512 tokens, not handed off", step, "ms", "", step_spread),
        Row("CPU of the fabric thread, a step", 1e3 * float(np.median(cpu_s)) / NUM_STEPS, "ms"),
        Row("the same ÷ step", share, "%", TARGET, f"{share_spread}; {size}"),
        Row("prompts take longer, handed off", slower, "%", TARGET,
            f"{slower_spread}; fastest against fastest {least:.2g}"),
        Row("the steps beside copies only take longer", beside_, "%", "", beside_spread),
        Row("copies, as they run", speed, "GB/s", "", speed_spread),
        Row("copies into frames never written before", num_bytes / cold.copies_s / 1e9, "GB/s"),
    ]  # fmt: skip
