"""DistServe and the vLLM of 2023 on virtual time, with DistServe's fitted A100 step times.

    DistServe:   prompts in order, as many a batch as 8,192 tokens hold ─▶ KV over NVLink ─▶ decode
    vLLM (0.2):  whole prompts first, as many as 16,384 tokens and the KV hold, decodes wait;
                 else one token for each sequence

A pipeline of n stages takes a batch of prompts every n-th part of its time. For decoding it goes
round with n groups of sequences, each with its share of them.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import msgspec

from baton.twin.clock import Clock
from reproduce.queues import Decoding, Device, Job, Step, run_all
from reproduce.tables import read_rows

VLLM_BATCH_TOKENS = 16_384
DISTSERVE_BATCH_TOKENS = 8_192
NVLINK_BYTES_PER_S = 300e9
KV_BYTES = {"facebook/opt-13b": 819_200, "facebook/opt-66b": 2_359_296}
"""A token, fp16: two × layers × hidden size × two bytes."""


class Parallel(msgspec.Struct, frozen=True):
    tp: int
    pp: int = 1

    @property
    def num_devices(self) -> int:
        return self.tp * self.pp


class StepTimes:
    """Seconds of a whole pass through the model, all stages of the pipeline.

    work: how much larger the model is than the one whose coefficients are used, per device. host_s:
    what the serving process adds to each step.
    """

    def __init__(
        self, data: Path, engine: str, model: str, tp: int, host_s: float, work: float = 1.0
    ) -> None:
        path = data / "distserve" / f"profiler-a100-80g.{engine}.json"
        fitted = json.loads(path.read_text())[model]
        if str(tp) not in fitted:
            raise ValueError(
                f"{model} was not measured on {tp} devices: choose {', '.join(fitted)}"
            )
        each = fitted[str(tp)]
        # One fit has a negative square term, which no prompt can mean.
        self._prompt: list[float] = [max(0.0, value) for value in each["prefill"]]
        self._small: list[float] = each["decoding_smallbs"]
        self._large: list[float] = each["decoding_largebs"]
        self._edge = each["decoding_large_small_bs_threshold"]
        self._scale, self._host_s = 1e-3 * work, host_s

    def prompts_s(self, lengths: Sequence[int]) -> float:
        fixed, per_token, per_square = self._prompt
        squares = sum(length * length for length in lengths)
        ms = fixed + per_token * sum(lengths) + per_square * squares
        return self._scale * ms + self._host_s

    def decode_s(self, num_sequences: int, kv_tokens: int) -> float:
        law = self._small if num_sequences < self._edge else self._large
        ms = law[0] + law[1] * kv_tokens + law[2] * num_sequences
        return self._scale * ms + self._host_s


def kv_capacity(data: Path, model: str, parallel: Parallel) -> int:
    """Tokens of KV that fit.

    Raises:
        ValueError: the model does not fit there.
    """
    for row in read_rows(data / "distserve" / "max_num_tokens.csv"):
        if (row["model"], int(row["tp"]), int(row["pp"])) == (model, parallel.tp, parallel.pp):
            return int(row["max_num_tokens"])
    raise ValueError(f"{model} does not fit on tp {parallel.tp}, pp {parallel.pp}")


class Decoder:
    """Sequences that decode on one instance, in as many groups as the pipeline has stages."""

    def __init__(self, clock: Clock, times: StepTimes, stages: int, capacity: int) -> None:
        self.kv_due = 0
        self._clock, self._times, self._capacity = clock, times, capacity
        self._waiting: deque[Job] = deque()
        self._groups = [Decoding() for _ in range(stages)]
        self._devices = [Device(clock, partial(self._begin, group)) for group in self._groups]

    def add(self, job: Job) -> None:
        self._waiting.append(job)
        self._admit()

    def _admit(self) -> None:
        while self._waiting:
            job = self._waiting[0]
            need = job.num_prompt + job.num_output
            if self.kv_due and self.kv_due + need > self._capacity:
                return
            self._waiting.popleft()
            self.kv_due += need
            number = min(range(len(self._groups)), key=lambda i: len(self._groups[i]))
            self._groups[number].add(job)
            self._devices[number].wake()

    def _begin(self, group: Decoding) -> Step | None:
        if not len(group):
            return None
        return self._times.decode_s(len(group), group.kv_tokens), lambda: self._drew(group)

    def _drew(self, group: Decoding) -> None:
        for job in group.step():
            job.last_s = self._clock.now
            self.kv_due -= job.num_prompt + job.num_output
        self._admit()


def serve_split(
    prompt: StepTimes, stages: int, decode: StepTimes, decode_stages: int, capacity: int,
    kv_bytes: float, jobs: Sequence[Job],
) -> None:  # fmt: skip
    """One prefill instance and one decode instance, as in the paper."""
    clock = Clock()
    waiting: deque[Job] = deque()
    decoder = Decoder(clock, decode, decode_stages, capacity)

    def begin() -> Step | None:
        if not waiting:
            return None
        batch = _first(waiting, DISTSERVE_BATCH_TOKENS)
        stage_s = prompt.prompts_s([job.num_prompt for job in batch]) / stages
        rest_s = (stages - 1) * stage_s
        return stage_s, lambda: clock.after(rest_s, lambda: computed(batch))

    def computed(batch: list[Job]) -> None:
        for job in batch:
            job.first_s = job.last_s = clock.now
            if job.num_output > 1:
                moving_s = kv_bytes * job.num_prompt / NVLINK_BYTES_PER_S
                clock.after(moving_s, partial(decoder.add, job))

    device = Device(clock, begin)

    def arrive(job: Job) -> None:
        waiting.append(job)
        device.wake()

    run_all(clock, jobs, arrive)


def serve_together(
    times: StepTimes, capacity: int, jobs: Sequence[Job], pads: bool = False
) -> None:
    """One instance of the vLLM of 2023: prompts stop the decodes.

    pads: prompts of a batch cost what the longest of them costs.
    """
    clock = Clock()
    waiting: deque[Job] = deque()
    decoding = Decoding()

    def begin() -> Step | None:
        room = capacity - decoding.kv_tokens if len(decoding) else max(capacity, VLLM_BATCH_TOKENS)
        batch = _first(waiting, min(VLLM_BATCH_TOKENS, room), one_at_least=not len(decoding))
        if batch:
            lengths = [job.num_prompt for job in batch]
            if pads:
                lengths = [max(lengths)] * len(lengths)
            return times.prompts_s(lengths), lambda: computed(batch)
        if not len(decoding):
            return None
        return times.decode_s(len(decoding), decoding.kv_tokens), drew

    def computed(batch: list[Job]) -> None:
        for job in batch:
            job.first_s = job.last_s = clock.now
            if job.num_output > 1:
                decoding.add(job)

    def drew() -> None:
        for job in decoding.step():
            job.last_s = clock.now

    device = Device(clock, begin)

    def arrive(job: Job) -> None:
        waiting.append(job)
        device.wake()

    run_all(clock, jobs, arrive)


def _first(waiting: deque[Job], max_tokens: int, one_at_least: bool = True) -> list[Job]:
    """Jobs from the front whose prompts have at most so many tokens together."""
    batch: list[Job] = []
    total = 0
    while waiting:
        total += waiting[0].num_prompt
        if total > max_tokens and (batch or not one_at_least):
            break
        batch.append(waiting.popleft())
    return batch
