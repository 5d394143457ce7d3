"""What the outcome of a step, or of a fetch, means for the sequences that were in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from baton.core.limits import SchedulerConfig
from baton.core.plan import Chunk, StepOutput, StepPlan
from baton.core.sequence import Sequence, Status
from baton.types import FinishReason, SampledLogprobs, TokenDelta

if TYPE_CHECKING:
    from baton.core.scheduler import Scheduler


def take_in(scheduler: Scheduler, plan: StepPlan, output: StepOutput, now: float) -> None:
    """See `Scheduler.update`."""
    num_generated = 0
    config, update, exports = scheduler.config, scheduler._update, scheduler.exports
    counting = scheduler._in_flight.end(plan.step)
    all_count = len(counting) == len(plan.chunks)
    for chunk, tokens, logprobs in zip(plan.chunks, output.token_ids, output.logprobs, strict=True):
        seq = chunk.seq
        if not all_count and seq.id not in counting:
            continue  # ended or preempted while the step ran
        request, start = seq.request, chunk.start
        if start < len(request.prompt):
            _count_prompt(scheduler, seq, chunk)
        seq.num_computed = end = start + chunk.num_tokens
        if end >= (seq.num_published + 1) * seq.block_size:
            scheduler._publish(seq)
            if config.keep_blocks and not request.hand_off:
                update.exports += exports.keep(seq)
        if request.hand_off:
            update.exports += exports.export_full_blocks(seq)
            tell(scheduler, seq, now)
        if chunk.samples:
            (token,) = tokens
            num_generated += 1
            _append(scheduler, seq, token, logprobs, now)
    scheduler.counters["tokens_computed"] += plan.num_tokens
    scheduler.counters["tokens_generated"] += num_generated


def finish_of(seq: Sequence, config: SchedulerConfig) -> FinishReason | None:
    """How `seq` ends with the token that it has last; None if it goes on."""
    request, num_tokens = seq.request, len(seq.token_ids)
    sampling = request.sampling
    if sampling.stop_token_ids and seq.token_ids[-1] in sampling.stop_token_ids:
        return FinishReason.STOP
    if num_tokens - len(request.prompt) >= sampling.max_tokens:
        return FinishReason.LENGTH
    return FinishReason.LENGTH if num_tokens >= config.max_model_len else None


def finish_sequence(scheduler: Scheduler, seq: Sequence, now: float) -> None:
    """It has its last token."""
    scheduler.admission.lengths.observe(seq.num_generated)
    scheduler._end(seq, now)


def tell(scheduler: Scheduler, seq: Sequence, now: float) -> None:
    """Say which blocks of a prompt that is handed off have been sealed since the last time."""
    sealed = scheduler.exports.tell(seq.id, now)
    if sealed is not None:
        scheduler._update.sealed.append(sealed)


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
        scheduler._publish(seq)
    seq.import_done = now
    seq.status = Status.RUNNING
    scheduler._running[seq.id] = seq


def _count_prompt(scheduler: Scheduler, seq: Sequence, chunk: Chunk) -> None:
    num_prompt = min(seq.num_prompt - chunk.start, chunk.num_tokens)
    again = "recomputed" if seq.num_preemptions else "computed"
    scheduler.counters[f"prompt_tokens_{again}"] += num_prompt
    seq.num_prompt_computed += num_prompt


def _append(
    scheduler: Scheduler, seq: Sequence, token: int, logprobs: SampledLogprobs | None, now: float
) -> None:
    if not seq.prefilled:
        seq.prefilled = now
    seq.token_ids.append(token)
    finish = finish_of(seq, scheduler.config)
    update = scheduler._update
    request_id, choice, attempt = seq.id
    update.deltas.append(
        TokenDelta(
            request_id,
            choice,
            attempt,
            len(seq.token_ids) - len(seq.request.prompt) - 1,
            (token,),
            None if logprobs is None else (logprobs,),
            finish,
            None,
            None if seq.told_cached else seq.num_cached,
        )
    )
    seq.told_cached = True
    if finish is not None:
        finish_sequence(scheduler, seq, now)
    elif seq.request.hand_off:
        update.exports += scheduler.exports.close(seq)
        del scheduler._running[seq.id]
        seq.status = Status.EXPORTING
        try_commit(scheduler, seq, now)
