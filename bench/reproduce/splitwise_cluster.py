"""Splitwise's machines and its cluster scheduler, on virtual time.

a step of a machine:  prompts first, at most 2,048 tokens (one longer prompt goes alone); decodes
                      beside them if they fit, else left out, four times in a row at most
baseline:             a request stays on the machine with the fewest pending tokens
split:                its prompt goes to such a prompt machine, its answer to the token machine
                      with the least KV; a prompt that would wait behind 8,192 tokens, and an
                      answer whose KV would not fit, go to the mixed pool, which machines of the
                      other kind join until they are idle
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from baton.twin.clock import Clock
from reproduce.queues import Decoding, Device, Job, Step, run_all
from reproduce.splitwise_cost import MachineTimes

STEP_TOKENS = 2048
QUEUE_TOKENS = 8192
MAX_SKIPS = 4


class Kind(msgspec.Struct, frozen=True):
    """A kind of machine. transfer_s: the part of a KV transfer that is not hidden, per request."""

    times: MachineTimes
    transfer_s: float


class Machine:
    """`pending` are its prompts' tokens and its sequences: what the scheduler compares."""

    def __init__(self, clock: Clock, kind: Kind, done: Callable[[Machine, Job], None]) -> None:
        self.kind = kind
        self.prompts: deque[Job] = deque()
        self.decoding = Decoding()
        self.pending = 0
        self.kv_due = 0
        self.on_idle: Callable[[Machine], None] | None = None
        self._clock = clock
        self._done = done
        self._skips = 0
        self._device = Device(clock, self._begin)

    def add_prompt(self, job: Job) -> None:
        self.prompts.append(job)
        self._device.wake()

    def add_decode(self, job: Job) -> None:
        self.decoding.add(job)
        self._device.wake()

    def _begin(self) -> Step | None:
        sequences, times = len(self.decoding), self.kind.times
        owed = self._skips >= MAX_SKIPS and sequences > 0
        chosen, num_tokens = self._choose(sequences if owed else 0)
        if not chosen and not sequences:
            if self.on_idle is not None:
                self.on_idle(self)
            return None
        if not chosen:
            self._skips = 0
            return times.decode_s(sequences, self.decoding.kv_tokens), self._drew
        together = sequences > 0 and num_tokens + sequences <= STEP_TOKENS
        self._skips = 0 if together else self._skips + 1
        if together:
            return times.mixed_s(num_tokens, sequences), lambda: self._ended(chosen, True)
        return times.prompt_s(num_tokens), lambda: self._ended(chosen, False)

    def _choose(self, num_tokens: int) -> tuple[list[Job], int]:
        """Prompts of the next step, if so many tokens of it are taken; and their tokens."""
        chosen: list[Job] = []
        left = STEP_TOKENS - num_tokens
        total = 0
        while self.prompts:
            tokens = self.prompts[0].num_prompt
            if total + tokens > left and (chosen or num_tokens):
                break
            chosen.append(self.prompts.popleft())
            total += tokens
        return chosen, total

    def _ended(self, jobs: list[Job], decoded: bool) -> None:
        if decoded:
            self._drew()
        for job in jobs:
            self.pending -= job.num_prompt
            job.first_s = job.last_s = self._clock.now
            self._done(self, job)

    def _drew(self) -> None:
        for job in self.decoding.step():
            job.last_s = self._clock.now
            self.pending -= 1
            self.kv_due -= job.num_prompt + job.num_output


def serve_together(machines: Sequence[Kind], jobs: Sequence[Job]) -> None:
    """Every machine does everything."""
    clock = Clock()

    def prefilled(machine: Machine, job: Job) -> None:
        if job.num_output > 1:
            machine.pending += 1
            machine.kv_due += job.num_prompt + job.num_output
            machine.add_decode(job)

    cluster = [Machine(clock, kind, prefilled) for kind in machines]

    def arrive(job: Job) -> None:
        machine = min(cluster, key=_pending)
        machine.pending += job.num_prompt
        machine.add_prompt(job)

    run_all(clock, jobs, arrive)


def serve_split(prompt: Sequence[Kind], token: Sequence[Kind], jobs: Sequence[Job]) -> None:
    """Prompt machines, token machines, and the mixed pool between them."""
    clock = Clock()
    targets: dict[Job, Machine] = {}

    def prefilled(machine: Machine, job: Job) -> None:
        target = targets.pop(job)
        if job.num_output == 1:
            target.pending -= 1
            target.kv_due -= job.num_prompt + job.num_output
        elif target is machine:
            machine.add_decode(job)
        else:
            clock.after(machine.kind.transfer_s, lambda: target.add_decode(job))

    prompts = [Machine(clock, kind, prefilled) for kind in prompt]
    tokens = [Machine(clock, kind, prefilled) for kind in token]
    mixed: list[Machine] = []

    def join(machine: Machine, home: list[Machine]) -> None:
        home.remove(machine)
        mixed.append(machine)

        def leave(machine: Machine) -> None:
            machine.on_idle = None
            mixed.remove(machine)
            home.append(machine)

        machine.on_idle = leave

    def arrive(job: Job) -> None:
        machine = _shortest(prompts, job) or _shortest(mixed, job)
        target = _emptiest(tokens, job) or _emptiest(mixed, job)
        if machine is None and tokens:
            machine = min(tokens, key=_pending)
            join(machine, tokens)
        if target is None and prompts:
            target = min(prompts, key=_kv_due)
            join(target, prompts)
        if machine is None or target is None:
            machine = target = min([*prompts, *mixed, *tokens], key=_pending)
        targets[job] = target
        target.pending += 1
        target.kv_due += job.num_prompt + job.num_output
        machine.pending += job.num_prompt
        machine.add_prompt(job)

    run_all(clock, jobs, arrive)


def _shortest(machines: Sequence[Machine], job: Job) -> Machine | None:
    """The one with the fewest pending tokens, unless the prompt would wait too long there."""
    if not machines:
        return None
    machine = min(machines, key=_pending)
    waits = machine.prompts and machine.pending + job.num_prompt > QUEUE_TOKENS
    return None if waits else machine


def _emptiest(machines: Sequence[Machine], job: Job) -> Machine | None:
    """The one with the least KV, unless the request's would not fit there."""
    if not machines:
        return None
    machine = min(machines, key=_kv_due)
    fits = machine.kv_due + job.num_prompt + job.num_output < machine.kind.times.kv_tokens
    return machine if fits else None


def _pending(machine: Machine) -> int:
    return machine.pending


def _kv_due(machine: Machine) -> int:
    return machine.kv_due
