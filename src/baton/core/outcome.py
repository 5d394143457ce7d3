"""What the outcome of a step, or of a fetch, means for the sequences that were in it."""

from __future__ import annotations

from baton.core.books import Books
from baton.core.plan import Chunk, StepOutput, StepPlan
from baton.core.sequence import Sequence, Status
from baton.types import FinishReason, TokenDelta


def take_in(books: Books, plan: StepPlan, output: StepOutput, now: float) -> None:
    """See `Scheduler.update`."""
    num_generated = num_computed = 0
    config, update, exports = books.config, books.update, books.exports
    tell = update.deltas.append
    counting = books.in_flight.end(plan.step)
    all_count = len(counting) == len(plan.chunks)
    for chunk, tokens, logprobs in zip(plan.chunks, output.token_ids, output.logprobs, strict=True):
        seq, num_tokens = chunk.seq, chunk.num_tokens
        num_computed += num_tokens
        if not all_count and seq.id not in counting:
            continue  # ended or preempted while the step ran
        start, hand_off = chunk.start, seq.ends_early and seq.request.hand_off
        if start < seq.num_prompt:
            _count_prompt(books, seq, chunk)
        seq.num_computed = end = start + num_tokens
        if end >= (seq.num_published + 1) * seq.block_size:
            publish(books, seq)
            if config.keep_blocks and not hand_off:
                update.exports += exports.keep(seq)
        if hand_off:
            update.exports += exports.export_full_blocks(seq)
            exports.note(seq.id, now)
        if not chunk.samples:
            continue
        (token,) = tokens
        num_generated += 1
        if not seq.prefilled:
            seq.prefilled = now
        seq.token_ids.append(token)
        num_there = len(seq.token_ids)
        ends = num_there >= seq.max_tokens or seq.ends_early
        finish = finish_of(seq) if ends else None
        if not seq.tells_each and finish is None and seq.told_cached:
            continue  # `hand_off` ends with the token that is told at once
        request_id, choice, attempt = seq.id
        num_told = seq.num_told
        tell(
            TokenDelta(
                request_id,
                choice,
                attempt,
                num_told - seq.num_prompt,
                (token,) if num_told + 1 == num_there else tuple(seq.token_ids[num_told:]),
                None if logprobs is None else (logprobs,),
                finish,
                None,
                None if seq.told_cached else seq.num_cached,
            )
        )
        seq.told_cached = True
        seq.num_told = num_there
        if finish is not None:
            finish_sequence(books, seq, now)
        elif hand_off:
            _await_seals(books, seq, now)
    books.counters["tokens_computed"] += num_computed
    books.counters["tokens_generated"] += num_generated


def tell_rest(books: Books) -> None:
    """See `Scheduler.tell_rest`."""
    for seq in books.sequences.values():
        if untold := tuple(seq.token_ids[seq.num_told :]):
            first_index = seq.num_told - seq.num_prompt
            books.update.deltas.append(TokenDelta(*seq.id, first_index, untold))
            seq.num_told = len(seq.token_ids)


def publish(books: Books, seq: Sequence) -> None:
    """Let others find the blocks of `seq` that are full by now."""
    num_full = seq.num_computed // seq.block_size
    if books.config.prefix_cache and num_full > seq.num_published:
        begin, keys = seq.num_published, seq.class_keys(seq.num_computed)
        books.pool.publish_all(seq.blocks[begin:num_full], keys[begin:])
    seq.num_published = num_full


def finish_of(seq: Sequence) -> FinishReason | None:
    """How `seq` ends with the token that it has last; None if it goes on."""
    stops = seq.request.sampling.stop_token_ids
    if stops and seq.token_ids[-1] in stops:
        return FinishReason.STOP
    return FinishReason.LENGTH if len(seq.token_ids) >= seq.max_tokens else None


def finish_sequence(books: Books, seq: Sequence, now: float) -> None:
    """It has its last token."""
    books.admission.lengths.observe(seq.num_generated)
    books.end(seq, now)


def try_commit(books: Books, seq: Sequence, now: float) -> None:
    """Hand `seq` off, if all its blocks are sealed."""
    handoff = books.exports.commit(seq.id, now)
    if handoff is not None:
        seq.exported = now
        books.update.handoffs.append(handoff)
        books.end(seq, now)


def take_over(books: Books, seq: Sequence, num_verified: int, now: float) -> None:
    """The fetch that `seq` waited for has ended: it runs, `num_verified` blocks further on."""
    if num_verified:
        computed = seq.num_computed + num_verified * seq.block_size
        # The last token is always computed, and the last block may be a partial one.
        seq.num_computed = seq.num_scheduled = min(computed, seq.num_tokens - 1)
        seq.num_imported_blocks = num_verified
        seq.num_kept = seq.num_computed // seq.block_size
        publish(books, seq)
    seq.import_done = now
    books.run(seq)


def give_up_fetches(books: Books, now: float) -> None:
    """What waited for fetches that do not end goes back to the queue.

    A sequence that imports comes back as one that was preempted does: to other blocks, and without
    reading its handoff again.
    """
    for seq in books.fetches.give_up(now):
        if seq.status is Status.IMPORTING:
            seq.num_preemptions += 1
            books.pool.release(seq.blocks)
            seq.reset()
        books.wait(seq)


def _count_prompt(books: Books, seq: Sequence, chunk: Chunk) -> None:
    num_prompt = min(seq.num_prompt - chunk.start, chunk.num_tokens)
    again = "recomputed" if seq.num_preemptions else "computed"
    books.counters[f"prompt_tokens_{again}"] += num_prompt
    seq.num_prompt_computed += num_prompt


def _await_seals(books: Books, seq: Sequence, now: float) -> None:
    """Its prompt is computed and its first token drawn: only copies keep it here."""
    books.update.exports += books.exports.close(seq)
    books.close(seq)
    try_commit(books, seq, now)
