"""What a scheduler keeps: its sequences by where they are, their blocks, and what is to be told.

The `Scheduler` owns one `Books` and hands it to those who act on it: `next_step` plans, `outcome`
and `advance` take in what was computed. Whatever moves a sequence between several tables is a
method here, so that they agree; `check` verifies that they do.
"""

from __future__ import annotations

from collections import Counter

from baton.core.admission import Admission
from baton.core.alone import Suspects
from baton.core.attempts import AttemptMemory
from baton.core.block_pool import BlockPool
from baton.core.counters import new_counters
from baton.core.deadlines import Deadlines
from baton.core.exports import ExportTable
from baton.core.fetches import Fetches
from baton.core.in_flight import InFlight
from baton.core.lease import LeaseTable
from baton.core.limits import SchedulerConfig
from baton.core.plan import Update, error_delta
from baton.core.prompt_order import PromptQueue
from baton.core.sequence import Sequence, SequenceId, Status
from baton.core.store_index import StoreIndex
from baton.errors import ServeError
from baton.types import WorkerLoad


class Books:
    """State of one worker's policy; pure.

    sequences: all that have not ended. waiting: those of them that wait for admission. running:
    those that have blocks and are computed, in the order in which they began. suspects: see
    `alone`. Who imports or waits for an early fetch stands in `fetches`, who exports in `exports`.
    attempts: the latest of each request. deadlines: of the sequences. in_flight: steps that were
    planned and not collected. update: what the outside has not been told of.
    """

    def __init__(self, config: SchedulerConfig, leases: LeaseTable, index: StoreIndex) -> None:
        self.config = config
        self.counters: Counter[str] = new_counters()
        self.pool = BlockPool(config.num_blocks)
        self.exports = ExportTable(config, self.pool, index, leases)
        self.fetches = Fetches(config, self.pool, index, self.counters)
        self.admission = Admission(config, self.pool, self.exports, self.counters)
        self.in_flight = InFlight(self.pool)
        self.sequences: dict[SequenceId, Sequence] = {}
        self.waiting = PromptQueue()
        self.running: dict[SequenceId, Sequence] = {}
        self.suspects = Suspects()
        self.attempts = AttemptMemory()
        self.deadlines = Deadlines()
        self.update = Update()
        self._num_entered = 0

    # How sequences move ----------------------------------------------------------------------

    def enter(self, seq: Sequence) -> None:
        """A new sequence waits for admission, or first for what is being fetched early."""
        self._num_entered += 1
        seq.order = self._num_entered
        seq.admitted_before = self.admission.num_admitted_tokens
        self.sequences[seq.id] = seq
        if seq.request.alone:
            self.suspects[seq.id] = seq
        if not self.fetches.detain(seq):
            self.waiting.add(seq)
        self.deadlines.add(seq)

    def wait(self, seq: Sequence) -> None:
        """It is to be admitted in its turn."""
        seq.status = Status.WAITING
        self.waiting.add(seq)

    def begin(self, seq: Sequence, now: float) -> None:
        """It was admitted: it runs, or first fetches what others have of it."""
        self.waiting.discard(seq.id)
        if self.fetches.order(seq, now):
            seq.status = Status.IMPORTING
        else:
            self.run(seq)

    def run(self, seq: Sequence) -> None:
        """It has its blocks, and what was to be fetched."""
        seq.status = Status.RUNNING
        self.running[seq.id] = seq

    def close(self, seq: Sequence) -> None:
        """Nothing more is computed for it: only copies keep it here."""
        del self.running[seq.id]
        seq.status = Status.EXPORTING

    def preempt(self, seq: Sequence) -> None:
        """A running one gives back its blocks, keeps its tokens, and waits again."""
        self.counters["preemptions"] += 1
        seq.num_preemptions += 1
        seq.tells_each = True
        self.in_flight.drop(seq)
        self.pool.release(seq.blocks)
        if (told := self.suspects.give_way(seq)) is not None:
            self.update.alone.append(told)
        seq.reset()
        del self.running[seq.id]
        self.wait(seq)

    def fail(self, seq: Sequence, now: float, error: ServeError) -> None:
        """It ends badly."""
        untold = tuple(seq.token_ids[seq.num_told :])
        first_index = seq.num_told - seq.num_prompt
        self.update.deltas.append(error_delta(seq.id, first_index, error, untold))
        self.end(seq, now)

    def end(self, seq: Sequence, now: float) -> None:
        """It ends; its client has been told how."""
        seq.finished = now
        self.update.times.append(seq.stage_times())
        self.release(seq)

    def release(self, seq: Sequence) -> None:
        """Take the sequence out of every table and give back its own references."""
        seq.status = Status.FINISHED
        del self.sequences[seq.id]
        self.attempts.end(seq.id)
        self.waiting.discard(seq.id)
        self.suspects.pop(seq.id, None)
        self.fetches.forget(seq.id)
        self.running.pop(seq.id, None)
        self.exports.abandon(seq.id)
        self.in_flight.drop(seq)
        self.pool.release(seq.blocks)
        seq.blocks = []

    # What they say ---------------------------------------------------------------------------

    def num_active(self) -> int:
        """Sequences that were admitted and are to be computed here, now or after their fetches."""
        return len(self.running) + len(self.fetches.imports)

    def load(self) -> WorkerLoad:
        """The part of a worker's load that the scheduler knows."""
        waiting = self.waiting
        return WorkerLoad(
            num_total_blocks=self.pool.num_blocks,
            num_free_blocks=self.pool.num_free,
            num_running=self.num_active(),
            num_waiting=len(waiting) + len(self.fetches.arriving),
            num_waiting_tokens=sum(seq.num_remaining for seq in waiting)
            + sum(seq.num_remaining for seq in self.running.values() if seq.num_remaining > 1),
        )

    def check(self) -> None:
        """Verify that pool and sequences agree.

        Raises:
            AssertionError: naming what does not add up.
        """
        pool, in_flight = self.pool, self.in_flight
        pool.check()
        wanted = [0] * pool.num_blocks
        for seq in self.sequences.values():
            for block in seq.blocks:
                wanted[block] += 1
            if not in_flight:
                assert seq.num_scheduled == seq.num_computed, f"{seq.id} awaits no step"
                assert seq.num_expected == seq.num_tokens, f"{seq.id} awaits no token"
        for block in (
            *self.exports.blocks_in_transfer(),
            *self.fetches.blocks_in_transfer(),
            *in_flight.held_blocks(),
        ):
            wanted[block] += 1
        for block, refs in enumerate(wanted):
            assert pool.refs(block) == refs, f"block {block}: {refs} owners"
