"""vLLM's scheduling (V1, chunked prefill) over core's blocks, sequences and plans.

    a step's tokens:  what runs, in the order of admission, then what waits, in the order of arrival
    out of blocks:    the newest that runs gives its blocks back, and waits as the first
    after that:       nobody is admitted in this step

A prompt takes what the budget leaves; it is admitted if all of it would fit. Blocks are found again
by content, so one that comes back may find some of its own. With two steps in flight (vLLM's
asynchronous scheduling) a step is planned before the tokens of the one before it are known; an end
by length is foreseen, but seat and blocks are free only when its last token has come.

The policy offers what core's `Scheduler` offers a driver: `add`, `schedule`, `update`, `take`.
"""

from __future__ import annotations

from collections import deque

import msgspec

from baton.core.block_pool import BlockPool
from baton.core.keys import root_key
from baton.core.plan import Chunk, StepOutput, StepPlan, Update
from baton.core.sequence import Sequence, SequenceId
from baton.types import FinishReason, Request, TokenDelta


class VllmLimits(msgspec.Struct, frozen=True):
    """vLLM's names: max_num_seqs, max_num_batched_tokens, num_gpu_blocks, block_size."""

    max_num_seqs: int
    max_num_batched_tokens: int
    num_blocks: int
    block_size: int = 16


class VllmScheduler:
    """One engine's policy. Pure: time comes in, plans and deltas go out."""

    def __init__(self, limits: VllmLimits) -> None:
        self.limits = limits
        self.pool = BlockPool(limits.num_blocks)
        self.num_preemptions = 0
        self._root = root_key(b"", "", b"")
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._step = 0
        self._stale: dict[int, set[SequenceId]] = {}  # by step in flight: who was preempted since
        self._in_flight: deque[StepPlan] = deque()
        self._update = Update()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def add(self, request: Request, now: float) -> None:
        """Queue a request.

        Raises:
            ValueError: it can never fit.
        """
        longest = len(request.prompt) + request.sampling.max_tokens
        if -(-longest // self.limits.block_size) > self.limits.num_blocks:
            raise ValueError(f"request {request.id} needs more blocks than there are")
        self._waiting.append(Sequence(request, self._root, self.limits.block_size, now))

    def schedule(self, now: float) -> StepPlan:
        """The next step; empty if nothing can run until a step in flight ends or someone comes."""
        self._step += 1
        chunks: list[Chunk] = []
        budget = self.limits.max_num_batched_tokens
        num_preempted = self.num_preemptions
        i = 0
        while i < len(self._running) and budget:
            seq = self._running[i]
            num_tokens = min(_unscheduled(seq), budget)
            if num_tokens and self._grow(seq, num_tokens):
                chunks.append(_take(seq, num_tokens))
                budget -= num_tokens
            if i < len(self._running) and self._running[i] is seq:
                i += 1
        while (
            self.num_preemptions == num_preempted
            and self._waiting
            and budget
            and len(self._running) < self.limits.max_num_seqs
        ):
            seq = self._waiting[0]
            if not self._admit(seq):
                break
            self._waiting.popleft()
            self._running.append(seq)
            seq.first_scheduled = seq.first_scheduled or now
            num_tokens = min(_unscheduled(seq), budget)
            chunks.append(_take(seq, num_tokens))
            budget -= num_tokens
        plan = StepPlan(self._step, tuple(chunks))
        if chunks:
            self._in_flight.append(plan)
            self._stale[plan.step] = set()
        return plan

    def update(self, plan: StepPlan, output: StepOutput, now: float) -> None:
        """Take in what a step drew; steps end in the order in which they were planned."""
        assert self._in_flight.popleft() is plan
        stale = self._stale.pop(plan.step)
        for chunk, tokens in zip(plan.chunks, output.token_ids, strict=True):
            seq = chunk.seq
            if seq.id in stale:
                continue  # preempted while the step ran: its token is drawn again
            seq.num_computed = chunk.end
            self._publish(seq)
            if chunk.samples:
                self._append(seq, tokens[0], now)

    def take(self) -> Update:
        update, self._update = self._update, Update()
        return update

    def _append(self, seq: Sequence, token: int, now: float) -> None:
        seq.token_ids.append(token)
        ends = seq.num_generated == seq.request.sampling.max_tokens
        self._update.deltas.append(
            TokenDelta(
                *seq.id,
                first_index=seq.num_generated - 1,
                token_ids=(token,),
                finish=FinishReason.LENGTH if ends else None,
            )
        )
        if ends:
            seq.finished = now
            self._running.remove(seq)
            self.pool.release(seq.blocks)

    def _publish(self, seq: Sequence) -> None:
        keys = seq.full_keys(seq.num_computed)
        for i in range(seq.num_published, len(keys)):
            self.pool.publish(seq.blocks[i], keys[i])
        seq.num_published = max(seq.num_published, len(keys))

    def _grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Blocks for so many tokens more, at the cost of whoever came last: maybe of `seq`."""
        size = self.limits.block_size
        missing = -(-(seq.num_scheduled + num_tokens) // size) - len(seq.blocks)
        while missing > self.pool.num_free:
            victim = self._running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        seq.blocks += self.pool.allocate(max(missing, 0))
        return True

    def _preempt(self, seq: Sequence) -> None:
        self._running.remove(seq)
        self.num_preemptions += 1
        for plan in self._in_flight:
            self._stale[plan.step].add(seq.id)
        self.pool.release(seq.blocks)
        seq.reset()
        self._waiting.appendleft(seq)

    def _admit(self, seq: Sequence) -> bool:
        """Take the blocks that are there already and those of the whole prompt, or nothing."""
        keys = seq.full_keys(seq.num_tokens - 1)
        found = self.pool.lookup(keys)
        needed = -(-seq.num_tokens // self.limits.block_size) - len(found)
        if needed + self.pool.num_unreferenced(found) > self.pool.num_free:
            return False
        self.pool.acquire(found)
        first = min(needed, self._blocks_of_chunk(seq, len(found)))
        seq.blocks = [*found, *self.pool.allocate(first)]
        seq.num_computed = seq.num_scheduled = len(found) * self.limits.block_size
        seq.num_published = len(found)
        return True

    def _blocks_of_chunk(self, seq: Sequence, num_found: int) -> int:
        """Blocks that the first chunk can reach; those of later ones are taken in their turn."""
        size = self.limits.block_size
        reach = min(num_found * size + self.limits.max_num_batched_tokens, seq.num_tokens)
        return -(-reach // size) - num_found


def _unscheduled(seq: Sequence) -> int:
    """Tokens to compute that no step in flight computes; none once its last draw is under way."""
    drawn = seq.num_expected - seq.num_prompt
    return 0 if drawn == seq.request.sampling.max_tokens else seq.num_unscheduled


def _take(seq: Sequence, num_tokens: int) -> Chunk:
    samples = seq.num_scheduled + num_tokens == seq.num_expected
    chunk = Chunk(seq, seq.num_scheduled, num_tokens, samples)
    seq.num_scheduled += num_tokens
    seq.num_expected += samples
    return chunk
