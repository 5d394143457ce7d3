"""Times of chosen steps, of the engine's own work and of copies into the store, on this machine.

Everything runs as in a worker: the same runner, KV pool, scheduler and arena, one engine thread,
and beside it whatever tells a gateway of the steps (`Outside`).
What a step computes does not matter to its time, so sequences are made up and share blocks of a
pool of zeros. A busy machine disturbs: rounds over all steps are interleaved, in an order that is
shuffled anew each time, the first round is thrown away, and medians are kept.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
import numpy as np

from baton.core.keys import root_key
from baton.core.lease import LeaseTable
from baton.core.limits import SchedulerConfig
from baton.core.plan import Chunk, Runner, StepOutput, StepPlan
from baton.core.scheduler import Scheduler
from baton.core.sequence import Sequence as Seq
from baton.core.step_cost import ChunkShape
from baton.core.store_index import StoreIndex
from baton.engine.build import LoadedModel
from baton.engine.engine import Emitted, Engine
from baton.engine.inbox import Submit
from baton.engine.runner import TorchRunner
from baton.errors import ConfigError
from baton.fabric.arena import Arena, MappedArena
from baton.fabric.transport import ReadResult
from baton.model.kv_cache import KvCache, kv_block_bytes
from baton.model.native import Kernels
from baton.types import KvFormat, Request, SamplingParams

MAX_ROUNDS, MIN_ROUNDS = 15, 3
LIMIT_S = 540
"""Ten minutes, less what loading and fitting take."""
POLICY_SEQS = (1, 4, 16, 32)
POLICY_STEPS = 60
COPY_BLOCKS = 64
RESTS_S = (0.002, 0.01, 0.05, 0.2)
REST_ROUNDS = 12
SAMPLING = SamplingParams(max_tokens=1 << 30, temperature=1.0)

Told = Callable[[int, int], None]


class Outside(Protocol):
    """Who is told of each step, as a gateway is; `worker.telling` has the real one.

    cpu_s: CPU seconds that this has taken so far, without the engine's own thread.
    """

    def told(self, emitted: Emitted) -> None: ...

    def cpu_s(self) -> float: ...


class StepSamples(msgspec.Struct, frozen=True):
    """Median seconds of each step that was asked for, None where the time did not suffice."""

    seconds: tuple[float | None, ...]
    num_rounds: int


class Bench:
    """A loaded model with a pool of its own."""

    def __init__(self, loaded: LoadedModel, num_blocks: int, block_size: int, max_seqs: int):
        self.loaded, self.block_size = loaded, block_size
        self.kv = KvCache(loaded.spec, num_blocks, block_size, loaded.dtype, loaded.device)
        self.kv.data.zero_()
        draws = loaded.kernels if isinstance(loaded.kernels, Kernels) else None
        self.runner = TorchRunner(loaded.model, self.kv, loaded.device, kernels=draws)
        loaded.model.prepare(self.kv, max_seqs)
        self._vocab = loaded.spec.vocab_size
        self._root = root_key(b"", "", b"")

    @property
    def kv_format(self) -> KvFormat:
        spec, dtype = self.loaded.spec, self.loaded.dtype
        return KvFormat(
            block_size=self.block_size,
            dtype=dtype,
            num_layers=spec.num_layers,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            block_bytes=kv_block_bytes(spec, self.block_size, dtype),
        )

    def time_steps(
        self, steps: Sequence[tuple[ChunkShape, ...]], budget_s: float, told: Told, seed: int = 0
    ) -> StepSamples:
        """Median times, over as many rounds as the budget allows, at least three of them.

        Raises:
            ConfigError: not even that is possible in ten times the budget, or in nine minutes.
        """
        plans = [self._plan(chunks) for chunks in steps]
        order = list(range(len(plans)))
        shuffle = random.Random(seed)
        times: list[list[float]] = [[] for _ in plans]
        started = time.monotonic()
        for number in range(MAX_ROUNDS + 1):
            if number > MIN_ROUNDS and time.monotonic() - started > budget_s:
                break
            shuffle.shuffle(order)
            for done, index in enumerate(order):
                elapsed_s = self._time(plans[index])
                if number:  # the first round touches everything for the first time
                    times[index].append(elapsed_s)
                spent = time.monotonic() - started
                rounds = number + (done + 1) / len(order)
                told(min(int(max(spent, budget_s * rounds / MAX_ROUNDS)), int(budget_s)),
                     int(budget_s))  # fmt: skip
                if spent > min(10 * budget_s, LIMIT_S) and number <= MIN_ROUNDS:
                    raise ConfigError(
                        f"a round of steps takes too long for {budget_s:g} s: "
                        "free the machine, or give --seconds more, or "
                        "lower --engine.max-num-batched-tokens"
                    )
        return StepSamples(
            tuple(statistics.median(each) if each else None for each in times),
            min(map(len, times)),
        )

    def time_policy(
        self, max_num_seqs: int, max_num_batched_tokens: int, outside: Outside
    ) -> list[tuple[int, float]]:
        """(decoding sequences, CPU seconds a step beside the runner's), at several batches.

        The median of what the engine's thread does, and the mean of what the others do, who take
        it from the same cores while the next step is computed. On a GPU all that happens while
        the device computes, so it counts for nothing.
        """
        if self.runner.depth > 1:
            return []
        found = []
        for num_seqs in POLICY_SEQS:
            room = self.kv.num_blocks // num_seqs * self.block_size
            max_context = min(room, self.loaded.spec.max_position)
            if num_seqs > min(max_num_seqs, max_num_batched_tokens) or max_context < 32:
                continue
            timed = _Timed(self.runner)
            engine = self._engine(timed, max_num_seqs, max_num_batched_tokens, outside.told)
            num_steps = min(POLICY_STEPS, max_context - 16)
            params = msgspec.structs.replace(SAMPLING, max_tokens=num_steps)
            for number in range(num_seqs):
                prompt = tuple((7 * number + i) % self._vocab for i in range(8))
                engine.inbox.put(Submit(Request(f"policy-{number}", prompt, params)))
            own = []
            others_s, num_turns = outside.cpu_s(), 0
            while True:
                timed.cpu_s, timed.num_chunks = 0.0, 0
                begin = time.thread_time()
                if not engine.step():
                    break
                num_turns += 1
                if timed.num_chunks == num_seqs:
                    own.append(time.thread_time() - begin - timed.cpu_s)
            others_s = (outside.cpu_s() - others_s) / num_turns
            found.append((num_seqs, max(statistics.median(own) + others_s, 1e-9)))
        return found

    def time_rests(self) -> list[tuple[float, float]]:
        """(seconds of rest, by how many a step after it takes longer), medians over two steps.

        Each is compared with the same step made once more, at once. On a GPU nothing is looked for.
        """
        if self.runner.depth > 1:
            return []
        plans = [self._plan((ChunkShape(1, 64, True),)), self._plan((ChunkShape(64, 0, True),))]
        extra: dict[float, list[float]] = {rest_s: [] for rest_s in RESTS_S}
        for _ in range(REST_ROUNDS):
            for rest_s, found in extra.items():
                for plan in plans:
                    time.sleep(rest_s)
                    rested_s = self._time(plan)
                    found.append(rested_s - self._time(plan))
        most, increasing = 0.0, []
        for rest_s, found in extra.items():
            most = max(most, statistics.median(found))  # a longer rest spares nothing
            increasing.append((rest_s, most))
        return increasing

    def time_copies(self) -> tuple[float, float]:
        """(seconds to copy and digest a block into a store, seconds to read one), medians."""
        num_blocks = min(COPY_BLOCKS, self.kv.num_blocks)
        block_bytes = self.kv.block_bytes
        arena = Arena.create(num_blocks, block_bytes, 1, self.kv_format)
        try:
            mapped = MappedArena(arena.fd, 1)
            exports, imports = [], []
            for _ in range(5):
                for block in range(num_blocks):
                    key = block.to_bytes(32)
                    begin = time.perf_counter()
                    digest = arena.write(block, key, self.kv.reader(block)())
                    wrote = time.perf_counter()
                    result = mapped.read(block, key, digest, self.kv.landing(block))
                    imports.append(time.perf_counter() - wrote)
                    exports.append(wrote - begin)
                    assert result is ReadResult.OK, result
            mapped.close()
        finally:
            arena.close()
        return statistics.median(exports), statistics.median(imports)

    def _plan(self, shapes: tuple[ChunkShape, ...]) -> StepPlan:
        chunks, block = [], 0
        for number, shape in enumerate(shapes):
            num_tokens = shape.context + shape.num_tokens
            rng = np.random.default_rng(number)
            prompt = tuple(rng.integers(0, self._vocab, num_tokens).tolist())
            seq = Seq(Request(f"step-{number}", prompt, SAMPLING), self._root, self.block_size, 0.0)
            num_blocks = -(-num_tokens // self.block_size)
            seq.blocks = list(range(block, block + num_blocks))
            block += num_blocks
            chunks.append(Chunk(seq, shape.context, shape.num_tokens, shape.samples))
        return StepPlan(0, tuple(chunks))

    def _time(self, plan: StepPlan) -> float:
        """Seconds of one step; on a GPU, of the last of several that follow each other."""
        depth = self.runner.depth
        if depth == 1:
            begin = time.perf_counter()
            self.runner.submit(plan)
            self.runner.collect()
            return time.perf_counter() - begin
        for _ in range(depth):
            self.runner.submit(plan)
        self.runner.collect()
        self.runner.submit(plan)
        while self.runner.pending > 1:
            self.runner.collect()
        return self.runner.collect().elapsed_s

    def _engine(
        self,
        runner: Runner,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        told: Callable[[Emitted], None],
    ) -> Engine:
        config = SchedulerConfig(
            kv_format=self.kv_format,
            num_blocks=self.kv.num_blocks,
            num_frames=0,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=self.loaded.spec.max_position,
            vocab_size=self._vocab,
            fingerprint=self.loaded.fingerprint,
            numerics=self.loaded.numerics,
        )
        index = StoreIndex(0)
        scheduler = Scheduler(config, LeaseTable("profile", 1, bytes(32), index), index)
        return Engine(scheduler, runner, self.kv, told)


class _Timed:
    """Passes plans on; knows what the runner took of its thread's CPU, and for how many chunks."""

    def __init__(self, runner: TorchRunner) -> None:
        self._runner = runner
        self.cpu_s, self.num_chunks = 0.0, 0

    @property
    def depth(self) -> int:
        return self._runner.depth

    @property
    def pending(self) -> int:
        return self._runner.pending

    @property
    def progress(self) -> int:
        return self._runner.progress

    def submit(self, plan: StepPlan) -> None:
        begin = time.thread_time()
        self._runner.submit(plan)
        self.cpu_s += time.thread_time() - begin
        self.num_chunks = len(plan.chunks)

    def collect(self) -> StepOutput:
        begin = time.thread_time()
        output = self._runner.collect()
        self.cpu_s += time.thread_time() - begin
        return output
