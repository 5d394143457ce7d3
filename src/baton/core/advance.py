"""Many steps at once, where each is known to bring one token a sequence and nothing else.

    schedule, update, schedule, update, … schedule, update        k updates
    schedule, advance(plan, k)                                    the same, in one call

A plan is *steady* for k steps when all that runs decodes, nobody can be admitted, no block has to
be taken from anyone, and no sequence ends before the last of the k steps. Then each further plan
is the one before it moved on by a token, and what the steps do can be worked out without making
them: only block borders are visited, in the order in which the steps would come to them.

News ends it: messages are looked at between two steps, so whoever jumps must not jump over one
that `Scheduler` would have acted upon. The same holds for `next_deadline`. What comes out is that
of the k updates, but that a sequence's tokens are one delta.

With a step planned ahead the same holds for the pair, if it is one: the second plan is the first
one moved on by a token. Each update is then followed by the plan after the next, so blocks are
wanted a step earlier; k updates leave one plan in flight, which must not run past an end.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

from baton.core.outcome import finish_of, finish_sequence, publish
from baton.core.plan import Chunk, StepPlan
from baton.core.sequence import Sequence
from baton.types import TokenDelta

if TYPE_CHECKING:
    from baton.core.scheduler import Scheduler

_PUBLISH, _ALLOCATE = 0, 1


def steady_steps(scheduler: Scheduler, plan: StepPlan) -> int:
    """See `Scheduler.steady_steps`."""
    chunks = plan.chunks
    if len(chunks) != len(scheduler._running) or scheduler.fetches.orders:
        return 1
    if not chunks or chunks[-1].num_tokens != 1:
        return 1  # prompts come last
    ahead = scheduler._in_flight.num_like(plan.step, len(chunks)) - 1
    has_room = scheduler._budget > 0 and scheduler._num_active() < scheduler._max_running
    if ahead < 0 or (has_room and scheduler._waiting):
        return 1
    size = scheduler.config.kv_format.block_size
    steps = scheduler.config.max_model_len
    rooms = []  # for how many steps the blocks of each sequence last
    for chunk in chunks:
        seq, start = chunk.seq, chunk.start
        if chunk.num_tokens != 1 or start < seq.num_prompt or not chunk.samples:
            return 1  # it catches up with its prompt, or with what was drawn elsewhere
        if seq.ends_early:
            return 1
        # The next token is drawn when `start + 1` are there.
        left = seq.max_tokens - start - 1
        if left < steps:
            steps = left
        rooms.append(len(seq.blocks) * size - start - ahead)
    return max(1, _within_room(rooms, steps - ahead, scheduler.pool.num_free, size))


def _within_room(rooms: list[int], steps: int, num_free: int, block_size: int) -> int:
    """Of `steps`, as many as the free blocks last for."""
    if num_free >= len(rooms) * -(-steps // block_size):
        return steps  # each has some room, so none wants more than that

    def wanted(steps: int) -> int:
        return sum([-(-(steps - room) // block_size) for room in rooms if room < steps])

    if wanted(steps) <= num_free:
        return steps
    low, high = 1, steps - 1
    while low < high:
        middle = (low + high + 1) // 2
        if wanted(middle) <= num_free:
            low = middle
        else:
            high = middle - 1
    return low


def advance(
    scheduler: Scheduler, plan: StepPlan, token_ids: Seq[Seq[int]], nows: Seq[float]
) -> StepPlan | None:
    """See `Scheduler.advance`."""
    steps, chunks = len(nows), plan.chunks
    assert steps >= 1
    size = scheduler.config.kv_format.block_size
    ahead = len(scheduler._in_flight) - 1
    scheduler._in_flight.end(plan.step)
    scheduler._step += steps - 1
    borders: list[tuple[int, int, int]] = []
    for order, (chunk, tokens) in enumerate(zip(chunks, token_ids, strict=True)):
        seq, start = chunk.seq, chunk.start
        seq.token_ids += tokens
        if start % size + steps >= size:
            full = range(size - start % size, steps + 1, size)
            lacking = range(len(seq.blocks) * size - start - ahead, steps, size)
            borders += [(update, _PUBLISH, order) for update in full]
            borders += [(update, _ALLOCATE, order) for update in lacking]
    at_end: set[int] = set()
    if borders:
        borders.sort()
        at_end = {order for update, _, order in borders if update == steps}
        _visit(scheduler, plan, borders[: len(borders) - len(at_end)])
    tell, first, last = scheduler._update.deltas.append, nows[0], nows[-1]
    for order, (chunk, tokens) in enumerate(zip(chunks, token_ids, strict=True)):
        seq = chunk.seq
        seq.num_computed = chunk.start + steps
        seq.num_scheduled = seq.num_computed + ahead
        seq.num_expected = num_tokens = len(seq.token_ids) + ahead
        if order in at_end:
            _publish(scheduler, seq)
        if not seq.prefilled:
            seq.prefilled = first
        finish = finish_of(seq) if num_tokens >= seq.max_tokens and not ahead else None
        if not seq.tells_each and finish is None and seq.told_cached:
            continue
        request_id, choice, attempt = seq.id
        num_told = seq.num_told
        seq.num_told = num_there = num_tokens - ahead
        tell(
            TokenDelta(
                request_id,
                choice,
                attempt,
                num_told - seq.num_prompt,
                tuple(tokens if num_told + steps == num_there else seq.token_ids[num_told:]),
                None,
                finish,
                None,
                None if seq.told_cached else seq.num_cached,
            )
        )
        seq.told_cached = True
        if finish is not None:
            finish_sequence(scheduler, seq, last)
    scheduler.counters["tokens_computed"] += steps * len(chunks)
    scheduler.counters["tokens_generated"] += steps * len(chunks)
    return _plan_ahead(scheduler, chunks, steps) if ahead else None


def _visit(scheduler: Scheduler, plan: StepPlan, borders: list[tuple[int, int, int]]) -> None:
    """Do what is due at block borders before the last update, in the order of the steps.

    borders: (update after which, what is due, whose): when a sequence fills a block, and when it
    wants one. The update is counted from 1. After the last one nothing is planned, so nothing is
    wanted.
    """
    for update, due, order in borders:
        chunk = plan.chunks[order]
        seq = chunk.seq
        if due == _ALLOCATE:
            seq.blocks += scheduler.pool.allocate(1)
        else:
            seq.num_computed = chunk.start + update
            _publish(scheduler, seq)


def _publish(scheduler: Scheduler, seq: Sequence) -> None:
    publish(scheduler, seq)
    if scheduler.config.keep_blocks:
        scheduler._update.exports += scheduler.exports.keep(seq)


def _plan_ahead(scheduler: Scheduler, chunks: Seq[Chunk], steps: int) -> StepPlan:
    """The step that was planned last, and is in flight."""
    moved = [Chunk(chunk.seq, chunk.start + steps, 1, True) for chunk in chunks]
    scheduler._chunks = {chunk.seq.id: chunk for chunk in moved}
    scheduler._in_flight.replace(scheduler._step, scheduler._chunks)
    return StepPlan(scheduler._step, tuple(moved))
