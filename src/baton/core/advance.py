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

from baton.core.books import Books
from baton.core.next_step import NextStep
from baton.core.outcome import finish_of, finish_sequence, publish
from baton.core.plan import Chunk, StepPlan
from baton.core.sequence import Sequence
from baton.types import TokenDelta

_PUBLISH, _ALLOCATE = 0, 1


def steady_steps(books: Books, latest: NextStep, plan: StepPlan) -> int:
    """See `Scheduler.steady_steps`."""
    chunks = plan.chunks
    if len(chunks) != len(books.running) or books.fetches.orders:
        return 1
    if not chunks or chunks[-1].num_tokens != 1:
        return 1  # prompts come last
    ahead = books.in_flight.num_like(plan.step, len(chunks)) - 1
    if ahead < 0 or (books.waiting and latest.has_room()):
        return 1
    size = books.config.kv_format.block_size
    steps = books.config.max_model_len
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
    return max(1, _within_room(rooms, steps - ahead, books.pool.num_free, size))


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
    books: Books, latest: NextStep, plan: StepPlan, token_ids: Seq[Seq[int]], nows: Seq[float]
) -> StepPlan | None:
    """See `Scheduler.advance`."""
    steps, chunks = len(nows), plan.chunks
    assert steps >= 1
    size = books.config.kv_format.block_size
    ahead = len(books.in_flight) - 1
    books.in_flight.end(plan.step)
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
        _visit(books, plan, borders[: len(borders) - len(at_end)])
    tell, first, last = books.update.deltas.append, nows[0], nows[-1]
    for order, (chunk, tokens) in enumerate(zip(chunks, token_ids, strict=True)):
        seq = chunk.seq
        seq.num_computed = chunk.start + steps
        seq.num_scheduled = seq.num_computed + ahead
        seq.num_expected = num_tokens = len(seq.token_ids) + ahead
        if order in at_end:
            _publish(books, seq)
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
            finish_sequence(books, seq, last)
    books.counters["tokens_computed"] += steps * len(chunks)
    books.counters["tokens_generated"] += steps * len(chunks)
    moved = [Chunk(chunk.seq, chunk.start + steps, 1, True) for chunk in chunks] if ahead else ()
    return latest.moved_on(steps - 1, moved)


def _visit(books: Books, plan: StepPlan, borders: list[tuple[int, int, int]]) -> None:
    """Do what is due at block borders before the last update, in the order of the steps.

    borders: (update after which, what is due, whose): when a sequence fills a block, and when it
    wants one. The update is counted from 1. After the last one nothing is planned, so nothing is
    wanted.
    """
    for update, due, order in borders:
        chunk = plan.chunks[order]
        seq = chunk.seq
        if due == _ALLOCATE:
            seq.blocks += books.pool.allocate(1)
        else:
            seq.num_computed = chunk.start + update
            _publish(books, seq)


def _publish(books: Books, seq: Sequence) -> None:
    publish(books, seq)
    if books.config.keep_blocks:
        books.update.exports += books.exports.keep(seq)
