"""What the outcome of a step, or of a fetch, means for the sequences that were in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from baton.core.plan import Chunk, StepOutput, StepPlan
from baton.core.sequence import Sequence, Status
from baton.types import FinishReason, TokenDelta

if TYPE_CHECKING:
    from baton.core.scheduler import Scheduler


def take_in(scheduler: Scheduler, plan: StepPlan, output: StepOutput, now: float) -> None:
    """See `Scheduler.update`."""
    num_generated = num_computed = 0
    config, update, exports = scheduler.config, scheduler._update, scheduler.exports
    tell = update.deltas.append
    counting = scheduler._in_flight.end(plan.step)
    all_count = len(counting) == len(plan.chunks)
    for chunk, tokens, logprobs in zip(plan.chunks, output.token_ids, output.logprobs, strict=True):
        seq, num_tokens = chunk.seq, chunk.num_tokens
        num_computed += num_tokens
        if not all_count and seq.id not in counting:
            continue  # ended or preempted while the step ran
        start, hand_off = chunk.start, seq.ends_early and seq.request.hand_off
        if start < seq.num_prompt:
            _count_prompt(scheduler, seq, chunk)
        seq.num_computed = end = start + num_tokens
        if end >= (seq.num_published + 1) * seq.block_size:
            publish(scheduler, seq)
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
            finish_sequence(scheduler, seq, now)
        elif hand_off:
            _await_seals(scheduler, seq, now)
    scheduler.counters["tokens_computed"] += num_computed
    scheduler.counters["tokens_generated"] += num_generated


def tell_rest(scheduler: Scheduler) -> None:
    """See `Scheduler.tell_rest`."""
    for seq in scheduler._sequences.values():
        if untold := tuple(seq.token_ids[seq.num_told :]):
            first_index = seq.num_told - seq.num_prompt
            scheduler._update.deltas.append(TokenDelta(*seq.id, first_index, untold))
            seq.num_told = len(seq.token_ids)


def publish(scheduler: Scheduler, seq: Sequence) -> None:
    """Let others find the blocks of `seq` that are full by now."""
    num_full = seq.num_computed // seq.block_size
    if scheduler.config.prefix_cache and num_full > seq.num_published:
        begin, keys = seq.num_published, seq.class_keys(seq.num_computed)
        scheduler.pool.publish_all(seq.blocks[begin:num_full], keys[begin:])
    seq.num_published = num_full


def finish_of(seq: Sequence) -> FinishReason | None:
    """How `seq` ends with the token that it has last; None if it goes on."""
    stops = seq.request.sampling.stop_token_ids
    if stops and seq.token_ids[-1] in stops:
        return FinishReason.STOP
    return FinishReason.LENGTH if len(seq.token_ids) >= seq.max_tokens else None


def finish_sequence(scheduler: Scheduler, seq: Sequence, now: float) -> None:
    """It has its last token."""
    scheduler.admission.lengths.observe(seq.num_generated)
    scheduler._end(seq, now)


def try_commit(scheduler: Scheduler, seq: Sequence, now: float) -> None:
    """Hand `seq` off, if all its blocks are sealed."""
    handoff = scheduler.exports.commit(seq.id, now)
    if handoff is not None:
        seq.exported = now
        scheduler._update.handoffs.append(handoff)
        scheduler._end(seq, now)


def take_over(scheduler: Scheduler, seq: Sequence, num_verified: int, now: float) -> None:
    """The fetch that `seq` waited for has ended: it runs, `num_verified` blocks further on."""
    if num_verified:
        computed = seq.num_computed + num_verified * seq.block_size
        # The last token is always computed, and the last block may be a partial one.
        seq.num_computed = seq.num_scheduled = min(computed, seq.num_tokens - 1)
        seq.num_imported_blocks = num_verified
        seq.num_kept = seq.num_computed // seq.block_size
        publish(scheduler, seq)
    seq.import_done = now
    seq.status = Status.RUNNING
    scheduler._running[seq.id] = seq


def _count_prompt(scheduler: Scheduler, seq: Sequence, chunk: Chunk) -> None:
    num_prompt = min(seq.num_prompt - chunk.start, chunk.num_tokens)
    again = "recomputed" if seq.num_preemptions else "computed"
    scheduler.counters[f"prompt_tokens_{again}"] += num_prompt
    seq.num_prompt_computed += num_prompt


def _await_seals(scheduler: Scheduler, seq: Sequence, now: float) -> None:
    """Its prompt is computed and its first token drawn: only copies keep it here."""
    scheduler._update.exports += scheduler.exports.close(seq)
    del scheduler._running[seq.id]
    seq.status = Status.EXPORTING
    try_commit(scheduler, seq, now)
