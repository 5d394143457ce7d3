"""What a worker does under a constant number of requests, without simulating it.

`concurrency` requests are always there, each with the same prompt and answer. Decode steps carry
them all, at a context half-way through the answer; every prompt is computed between them, so while
one request decodes, the others' prompts get in its way. Where arrivals come in waves, half of them
do; where they are spread out, all of them. `interference` is that share, an engine's own.
"""

from __future__ import annotations

import msgspec

from baton.core.cost import ChunkShape, StepCost, StepShape


class Load(msgspec.Struct, frozen=True):
    """The same request over and over. concurrency: requests in the worker at any time."""

    num_prompt_tokens: int
    num_output_tokens: int
    concurrency: float


class Steady(msgspec.Struct, frozen=True):
    """Predicted means. ttft_s is without any other queue than the other requests' prompts."""

    ttft_s: float
    tpot_s: float
    tokens_per_s: float


def decode_shape(load: Load) -> StepShape:
    """The step of all requests decoding, half-way through their answers."""
    batch = max(1, round(load.concurrency))
    context = load.num_prompt_tokens + load.num_output_tokens // 2
    return StepShape(batch, batch, batch, batch * context, float(batch * context))


def prompt_shape(num_tokens: int) -> StepShape:
    """A whole prompt in one chunk."""
    return StepShape.of([ChunkShape(num_tokens, 0, True)])


def joined(first: StepShape, second: StepShape) -> StepShape:
    """Both in one step."""
    return StepShape(
        first.num_tokens + second.num_tokens,
        first.num_samples + second.num_samples,
        first.num_seqs + second.num_seqs,
        first.kv_tokens + second.kv_tokens,
        first.attention_pairs + second.attention_pairs,
    )


def steady(
    cost: StepCost, load: Load, interference: float = 1.0, queue: float = 0.5, start_s: float = 0.0
) -> Steady:
    """Prefill and decode on the same worker.

    queue: share of the other requests' prompts that a new one waits for. start_s: what a request
    takes besides, once (tokenizing, the network).
    """
    decode, prompt = decode_shape(load), prompt_shape(load.num_prompt_tokens)
    decode_s = cost.stage_s(decode)
    others = load.concurrency - 1
    # A prompt rides along with the decodes, so the step's own overhead is paid already.
    prompt_s = max(cost.stage_s(joined(decode, prompt)) - decode_s, 0.0)
    tpot_s = decode_s + interference * others * prompt_s / load.num_output_tokens
    ttft_s = start_s + cost.step_s(prompt) + queue * others * prompt_s
    return _steady(load, ttft_s, tpot_s)


def steady_split(
    prefill: StepCost,
    decode: StepCost,
    load: Load,
    num_prefill: int,
    num_decode: int,
    transfer_s: float = 0.0,
    start_s: float = 0.0,
) -> Steady:
    """Prefill and decode on workers of their own, `concurrency` over all of them.

    Where prompts come faster than they are computed, requests wait at prefill, and fewer decode.
    """
    prompt_s = prefill.stage_s(prompt_shape(load.num_prompt_tokens))
    ttft_s = start_s + prefill.step_s(prompt_shape(load.num_prompt_tokens)) + transfer_s
    decoding = load.concurrency
    tpot_s = 0.0
    for _ in range(30):  # a fixed point of how many are in which phase; halving makes it settle
        each = Load(load.num_prompt_tokens, load.num_output_tokens, max(1, decoding / num_decode))
        tpot_s = decode.stage_s(decode_shape(each))
        answer_s = tpot_s * load.num_output_tokens
        rate = min(num_prefill / prompt_s, load.concurrency / (ttft_s + answer_s))
        decoding = (decoding + rate * answer_s) / 2
    wait_s = max(ttft_s, load.concurrency / rate - tpot_s * load.num_output_tokens)
    return _steady(load, wait_s, tpot_s)


def _steady(load: Load, ttft_s: float, tpot_s: float) -> Steady:
    life_s = ttft_s + (load.num_output_tokens - 1) * tpot_s
    return Steady(ttft_s, tpot_s, load.concurrency * load.num_output_tokens / life_s)
