"""Steps that were planned and whose outcome is not known yet.

    schedule n ─▶ submit n ─▶ schedule n+1 ─▶ submit n+1 ─▶ collect n ─▶ update n ─▶ schedule n+2

Where the runner's depth is 2, a step is planned while the one before it runs. What a sequence
will be is then told by `num_scheduled` and `num_expected`: its next chunk begins where the one in
flight ends, with a token that is being drawn. `num_computed` and `token_ids` stay at what is
known, and only that is published, exported and told. An end that can be foreseen (a length, a
hand-off) is: no chunk runs past it. A stop token cannot: the chunk that follows it is carried out
and its token is thrown away.

A block that a step in flight reads or writes is given to nobody else. So when a sequence ends or
is preempted, its blocks are held until the last step with a chunk of it is collected; nothing
depends on the order in which a device or the fabric do their work.
"""

from __future__ import annotations

from collections import Counter

from baton.core.block_pool import BlockPool
from baton.core.limits import SchedulerConfig
from baton.core.plan import Chunk
from baton.core.sequence import Sequence, SequenceId

MAX_DEPTH = 2
"""Steps that may be submitted before the first of them is collected."""


class InFlight:
    """Chunks and held blocks of the steps in flight; pure, owned by the scheduler."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._steps: dict[int, dict[SequenceId, Chunk]] = {}
        self._held: dict[int, list[int]] = {}
        self._dropped: set[int] = set()  # steps that compute a chunk which counts no more

    def __len__(self) -> int:
        """Steps in flight."""
        return len(self._steps)

    def begin(self, step: int, chunks: dict[SequenceId, Chunk]) -> None:
        self._steps[step] = chunks

    def end(self, step: int) -> dict[SequenceId, Chunk]:
        """A step was collected: lets go of its blocks, returns the chunks that still count."""
        assert step == next(iter(self._steps)), "steps are collected in the order of submission"
        self._pool.release(self._held.pop(step, ()))
        self._dropped.discard(step)
        return self._steps.pop(step)

    def num_like(self, step: int, num_chunks: int) -> int:
        """Steps in flight, if `step` is the first, has `num_chunks` chunks that count, the others
        are of the same sequences in the same order, and nothing is held; else 0."""
        first = self._steps.get(step)
        if first is None or len(first) != num_chunks or self._held:
            return 0
        names = list(first)
        alike = all(list(chunks) == names for chunks in self._steps.values() if chunks is not first)
        return len(self._steps) if alike and step == next(iter(self._steps)) else 0

    def replace(self, step: int, chunks: dict[SequenceId, Chunk]) -> None:
        """In place of the one step in flight there is this one, later by some."""
        assert len(self._steps) == 1
        self._steps = {step: chunks}

    def drop(self, seq: Sequence) -> None:
        """Chunks of `seq` count no more. To be called while it still has its blocks."""
        last = None
        for step, chunks in self._steps.items():
            if chunks.pop(seq.id, None) is not None:
                last = step
                self._dropped.add(step)
        if last is not None:
            self._pool.acquire(seq.blocks)
            self._held.setdefault(last, []).extend(seq.blocks)

    def has_only(self, seq_id: SequenceId) -> bool:
        """Whether no chunk is in flight but of this sequence; those that were dropped are."""
        return not self._dropped and all(c.keys() <= {seq_id} for c in self._steps.values())

    def held_blocks(self) -> list[int]:
        """The references that steps in flight hold, one entry each."""
        return [block for blocks in self._held.values() for block in blocks]

    def num_returning(self) -> int:
        """Blocks that will be free when what is in flight is collected, and are not yet."""
        counts = Counter(self.held_blocks())
        return sum(self._pool.refs(block) == count for block, count in counts.items())


def may_run_ahead(seq: Sequence, config: SchedulerConfig) -> bool:
    """Whether a sequence whose next token is being drawn may have the one after it drawn as well.

    Not if it is known to end with that token, and not if drawing needs to know the token.
    """
    request = seq.request
    params = request.sampling
    return not (
        request.hand_off
        or params.reads_output
        or seq.num_expected - len(request.prompt) >= params.max_tokens
        or seq.num_expected >= config.max_model_len
    )
