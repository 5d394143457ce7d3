"""Which sequences the next step computes, and how many tokens of each.

A step has a token budget. Sequences that need one token go first, so a prompt never starves a
running answer. Prompts share what is left, in the order of `prompt_order`: those already begun,
and new ones, which are admitted in their turn while blocks last. When blocks run out the newest
sequence is preempted: it keeps its tokens, gives back its blocks and comes back through admission,
where the prefix cache may spare it most of the work. The oldest one is never preempted by another,
so something always progresses. A suspect has steps to itself (`alone`).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from baton.core.books import Books
from baton.core.in_flight import may_run_ahead
from baton.core.plan import Chunk, StepPlan
from baton.core.prompt_order import rank
from baton.core.sequence import Sequence, SequenceId, Status

_RUNNING = Status.RUNNING  # read for every sequence in every step


class NextStep:
    """Plans one step after the other; pure, owned by the scheduler, whose books it works on.

    number: of the step that was planned last, from 1 on. chunks: what it computes. budget: tokens
    that it had left.
    """

    def __init__(self, books: Books) -> None:
        self.number = 0
        self.chunks: dict[SequenceId, Chunk] = {}
        self.budget = 0
        # A decode takes one token of the budget, so no more of them may run than it has.
        config = books.config
        self._max_running = min(config.max_num_seqs, config.max_num_batched_tokens)
        self._config = config
        self._books = books

    def plan(self, now: float) -> StepPlan:
        """The next step; one without chunks means that nothing can run until news comes."""
        books, config = self._books, self._config
        self.number += 1
        self.chunks, self.budget = {}, config.max_num_batched_tokens
        num_preempted = books.counters["preemptions"]
        if books.suspects and self._plan_alone():
            for seq in books.running.values():
                seq.tells_each = True
            return self._planned()
        ahead, size = len(books.in_flight), config.kv_format.block_size
        prompts: list[Sequence] = []
        for seq in list(books.running.values()):
            start, expected = seq.num_scheduled, seq.num_expected
            if expected - start != 1:
                prompts.append(seq)
            elif ahead and not self._is_ready(seq):
                seq.tells_each = True  # it misses a step
            elif seq.status is _RUNNING and (expected <= len(seq.blocks) * size or self._grow(seq)):
                self.chunks[seq.id] = Chunk(seq, start, 1, True)
                self.budget -= 1  # it lasts for all that may run
                seq.num_scheduled = expected
                seq.num_expected = expected + 1
            else:
                seq.tells_each = True
        if prompts or books.waiting:
            # Whoever was preempted in this step must not take the blocks back in the same step.
            admits = books.counters["preemptions"] == num_preempted
            self._plan_prompts(prompts, admits, now)
        if books.suspects and not self.chunks:
            self._plan_alone()  # it has just been admitted
        return self._planned()

    def has_room(self) -> bool:
        """Whether the step that was planned last could have taken a sequence more."""
        return self.budget > 0 and self._books.num_active() < self._max_running

    def moved_on(self, steps: int, in_flight: Seq[Chunk]) -> StepPlan | None:
        """So many steps more were planned, by `advance`. Returns the last, if it is in flight.

        in_flight: its chunks then; else nothing.
        """
        self.number += steps
        if not in_flight:
            return None
        self.chunks = {chunk.seq.id: chunk for chunk in in_flight}
        self._books.in_flight.replace(self.number, self.chunks)
        return StepPlan(self.number, tuple(in_flight))

    def _planned(self) -> StepPlan:
        if self.chunks:
            self._books.in_flight.begin(self.number, self.chunks)
        return StepPlan(self.number, tuple(self.chunks.values()), self._books.fetches.start())

    def _plan_alone(self) -> bool:
        """Plan a step of the running suspect's own. Returns whether it is: others must wait.

        It is, but an empty one, as long as something else is in flight or leave is awaited; it is
        not if there is none, or if it has just had to give its blocks back.
        """
        books = self._books
        seq = books.suspects.running()
        if seq is None:
            return False
        if books.in_flight.has_only(seq.id):
            if (asked := books.suspects.ask(seq)) is not None:
                books.update.alone.append(asked)
            elif seq.leave and self._is_ready(seq) and self._grow(seq):
                self._give(seq)
        return seq.status is _RUNNING

    def _plan_prompts(self, prompts: list[Sequence], admits: bool, now: float) -> None:
        """Share the rest of the budget among prompts, and admit those whose turn it is."""
        books, waiting = self._books, self._books.waiting
        promised = 0
        if admits and waiting and books.num_active() < self._max_running:
            promised = books.admission.promised(books.running.values())
        begun = [seq for seq in prompts if seq.status is _RUNNING]
        begun.sort(key=rank, reverse=True)
        while self.budget > 0:
            admits = admits and bool(waiting) and books.num_active() < self._max_running
            if admits and not (begun and rank(begun[-1]) < rank(waiting.head)):
                seq = waiting.head
                admits = self._admit(seq, promised, now)
                if admits:
                    promised += books.admission.growth(seq)
                    if seq.status is _RUNNING and seq.id not in books.suspects:
                        self._give(seq)
            elif begun:
                self._give(begun.pop())  # it has had room for all its tokens since admission
            else:
                break

    def _give(self, seq: Sequence) -> None:
        """Give `seq` what it has left to compute, or what is left of the budget."""
        start = seq.num_scheduled
        num_tokens = remaining = seq.num_expected - start
        if remaining > self.budget:
            num_tokens = self.budget
        samples = num_tokens == remaining
        self.chunks[seq.id] = Chunk(seq, start, num_tokens, samples)
        self.budget -= num_tokens
        seq.num_scheduled = start + num_tokens
        if samples:
            seq.num_expected += 1

    def _is_ready(self, seq: Sequence) -> bool:
        """Whether `seq` may have a chunk before what is in flight is collected."""
        return seq.num_expected == seq.num_tokens or may_run_ahead(seq, self._config)

    def _grow(self, seq: Sequence) -> bool:
        """Make room for all tokens of `seq`, which has none for the last of them.

        False if there is none in this step: `seq` itself was preempted for it, or the blocks of
        one that was preempted, or that ended, are still in use by the step in flight.
        """
        books, pool = self._books, self._books.pool
        missing = self._config.num_blocks_for(seq.num_expected) - len(seq.blocks)
        while missing > pool.num_free:
            if missing <= pool.num_free + books.in_flight.num_returning():
                return False
            victim = next(reversed(books.running.values()))
            planned = self.chunks.pop(victim.id, None)
            if planned is not None:
                self.budget += planned.num_tokens
            books.preempt(victim)
            if victim is seq:
                return False
        seq.blocks += pool.allocate(missing)
        return True

    def _admit(self, seq: Sequence, promised: int, now: float) -> bool:
        """Move the head of the queue to running or importing, if there is room for it.

        `promised` blocks are free now and will be wanted by those that run already.
        """
        books = self._books
        if books.suspects and not books.suspects.may_enter(seq):
            return False
        if not books.admission.admit(seq, promised, now, alone=not books.num_active()):
            return False
        books.begin(seq, now)
        return True
