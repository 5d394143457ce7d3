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

Depth 1 only: with a step planned ahead there is nothing steady.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

from baton.core.outcome import finish_of, finish_sequence
from baton.core.plan import StepPlan
from baton.core.sequence import Sequence
from baton.types import TokenDelta

if TYPE_CHECKING:
    from baton.core.scheduler import Scheduler

_PUBLISH, _ALLOCATE = 0, 1


def steady_steps(scheduler: Scheduler, plan: StepPlan) -> int:
    """See `Scheduler.steady_steps`; `plan` is the one in flight."""
    chunks = plan.chunks
    running = scheduler._running
    if len(chunks) != len(running) or len(scheduler._in_flight) != 1 or scheduler.fetches.orders:
        return 1
    has_room = scheduler._budget > 0 and scheduler._num_active() < scheduler._max_running
    if has_room and scheduler._waiting:
        return 1
    steps = longest = scheduler.config.max_model_len
    for chunk in chunks:
        request, start = chunk.seq.request, chunk.start
        sampling, num_prompt = request.sampling, len(request.prompt)
        if chunk.num_tokens != 1 or not chunk.samples or start < num_prompt:
            return 1  # it catches up with its prompt, or with what was drawn elsewhere
        if sampling.stop_token_ids or request.hand_off:
            return 1
        # The next token is drawn when `start + 1` are there.
        left = min(num_prompt + sampling.max_tokens, longest) - start - 1
        if left < steps:
            steps = left
    return max(1, _within_room(scheduler, plan, steps))


def _within_room(scheduler: Scheduler, plan: StepPlan, steps: int) -> int:
    """Of `steps`, as many as the free blocks last for."""
    free, size = scheduler.pool.num_free, scheduler.config.kv_format.block_size
    if len(plan.chunks) * (steps // size + 1) <= free:
        return steps
    low, high = 1, steps
    while low < high:
        middle = (low + high + 1) // 2
        wanted = 0
        for chunk in plan.chunks:
            missing = chunk.start + middle - len(chunk.seq.blocks) * size
            if missing > 0:
                wanted += -(-missing // size)
        if wanted <= free:
            low = middle
        else:
            high = middle - 1
    return low


def advance(
    scheduler: Scheduler, plan: StepPlan, token_ids: Seq[list[int]], nows: Seq[float]
) -> None:
    """See `Scheduler.advance`."""
    steps = len(nows)
    assert steps >= 1
    size = scheduler.config.kv_format.block_size
    scheduler._in_flight.end(plan.step)
    scheduler._step += steps - 1
    borders = []
    for order, (chunk, tokens) in enumerate(zip(plan.chunks, token_ids, strict=True)):
        start = chunk.start
        chunk.seq.token_ids += tokens
        if start % size + steps >= size:
            borders += _borders(chunk.seq, start, steps, size, order)
    at_end: set[int] = set()
    if borders:
        borders.sort()
        at_end = {order for update, _, order in borders if update == steps}
        _visit(scheduler, plan, borders[: len(borders) - len(at_end)])
    for order, (chunk, tokens) in enumerate(zip(plan.chunks, token_ids, strict=True)):
        seq = chunk.seq
        seq.num_computed = seq.num_scheduled = chunk.start + steps
        seq.num_expected = len(seq.token_ids)
        if order in at_end:
            _publish(scheduler, seq)
        _tell_tokens(scheduler, seq, tokens, nows)
    scheduler.counters["tokens_computed"] += steps * len(plan.chunks)
    scheduler.counters["tokens_generated"] += steps * len(plan.chunks)


def _borders(
    seq: Sequence, start: int, steps: int, size: int, order: int
) -> list[tuple[int, int, int]]:
    """(update after which, what is due, whose): when `seq` fills a block, and when it wants one.

    The update is counted from 1. After the last one nothing is planned, so nothing is wanted.
    """
    full = range(size - start % size, steps + 1, size)
    lacking = range(len(seq.blocks) * size - start, steps, size)
    due = [(update, _PUBLISH, order) for update in full]
    return due + [(update, _ALLOCATE, order) for update in lacking]


def _visit(scheduler: Scheduler, plan: StepPlan, borders: list[tuple[int, int, int]]) -> None:
    """Do what is due at block borders before the last update, in the order of the steps."""
    for update, due, order in borders:
        chunk = plan.chunks[order]
        seq = chunk.seq
        if due == _ALLOCATE:
            seq.blocks += scheduler.pool.allocate(1)
        else:
            seq.num_computed = chunk.start + update
            _publish(scheduler, seq)


def _publish(scheduler: Scheduler, seq: Sequence) -> None:
    scheduler._publish(seq)
    if scheduler.config.keep_blocks:
        scheduler._update.exports += scheduler.exports.keep(seq)


def _tell_tokens(
    scheduler: Scheduler, seq: Sequence, token_ids: list[int], nows: Seq[float]
) -> None:
    if not seq.prefilled:
        seq.prefilled = nows[0]
    finish = finish_of(seq, scheduler.config)
    request_id, choice, attempt = seq.id
    scheduler._update.deltas.append(
        TokenDelta(
            request_id,
            choice,
            attempt,
            len(seq.token_ids) - len(seq.request.prompt) - len(token_ids),
            tuple(token_ids),
            None,
            finish,
            None,
            None if seq.told_cached else seq.num_cached,
        )
    )
    seq.told_cached = True
    if finish is not None:
        finish_sequence(scheduler, seq, nows[-1])
