"""What prompts share: hits of a prefix cache of any size, and turns of conversations."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence

import msgspec

from baton.twin.workload import TraceRequest

DEFAULT_CACHES = (300_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000, 100_000_000)
"""Tokens: from what one GPU has left beside a model to a rack's host memory."""
COMMON_PROMPTS = 20
COMMON_SHARE = 0.1


class CacheHits(msgspec.Struct, frozen=True):
    """Of a cache of `num_tokens` (None: without end) that drops what was used least recently.

    Ratios are over all requests: blocks found at the start of prompts over full blocks, tokens
    found over prompt tokens, and the share of requests that found at least one block.
    """

    num_tokens: int | None
    block_ratio: float
    token_ratio: float
    request_ratio: float


class Sharing(msgspec.Struct, frozen=True):
    """Prefix sharing; `caches` is empty where the trace has no block ids.

    num_blocks, num_distinct: full blocks in all prompts, and how many of them are unlike.
    top_block_share: share of the requests that begin with the most common first block.
    measured_ratio: prompt tokens that the server itself took from its cache, over all.
    """

    block_size: int
    num_blocks: int
    num_distinct: int
    top_block_share: float
    caches: tuple[CacheHits, ...]
    measured_ratio: float | None

    @property
    def infinite(self) -> CacheHits | None:
        return next((hits for hits in self.caches if hits.num_tokens is None), None)


class Turns(msgspec.Struct, frozen=True):
    """Multi-turn traffic. `told_by`: session, blocks (a prompt that begins with a whole earlier
    one), or nothing.

    follow_up_share: share of requests that continue a conversation. mean_turns: requests a
    conversation, by session only.
    """

    told_by: str
    follow_up_share: float | None
    num_conversations: int | None
    mean_turns: float | None


def sharing(
    requests: Sequence[TraceRequest],
    capacities: Sequence[int] = DEFAULT_CACHES,
    num_cached_tokens: int | None = None,
) -> Sharing:
    """Replay the prompts, in order, through caches of these sizes (tokens), and one without end."""
    total = sum(request.num_prompt_tokens for request in requests)
    measured = None if num_cached_tokens is None else num_cached_tokens / total
    size = max((request.block_size for request in requests), default=0)
    if not size:
        return Sharing(0, 0, 0, 0.0, (), measured)
    firsts = Counter(request.blocks[0] for request in requests if request.blocks)
    sizes: list[int | None] = [*sorted(set(capacities)), None]
    return Sharing(
        block_size=size,
        num_blocks=sum(len(request.blocks) for request in requests),
        num_distinct=len({block for request in requests for block in request.blocks}),
        top_block_share=max(firsts.values(), default=0) / len(requests),
        caches=tuple(_replay(requests, tokens, total) for tokens in sizes),
        measured_ratio=measured,
    )


def hit_blocks(requests: Sequence[TraceRequest], num_tokens: int | None) -> Iterator[int]:
    """For each request, how many blocks at its start a cache of that size holds.

    Blocks are touched from the last to the first, so that a prefix outlives what continues it.
    """
    cache: OrderedDict[int, None] = OrderedDict()
    for request in requests:
        num_hits = 0
        for block in request.blocks:
            if block not in cache:
                break
            num_hits += 1
        yield num_hits
        for block in reversed(request.blocks):
            cache[block] = None
            cache.move_to_end(block)
        if num_tokens is not None:
            keep = num_tokens // request.block_size if request.block_size else len(cache)
            while len(cache) > keep:
                cache.popitem(last=False)


def _replay(
    requests: Sequence[TraceRequest], num_tokens: int | None, num_prompt_tokens: int
) -> CacheHits:
    blocks = tokens = touched = 0
    for request, num_hits in zip(requests, hit_blocks(requests, num_tokens), strict=True):
        blocks += num_hits
        tokens += num_hits * request.block_size
        touched += num_hits > 0
    num_blocks = sum(len(request.blocks) for request in requests)
    return CacheHits(
        num_tokens,
        blocks / max(num_blocks, 1),
        tokens / num_prompt_tokens,
        touched / len(requests),
    )


def turns(requests: Sequence[TraceRequest]) -> Turns:
    """Sessions where the trace names them, else prompts that continue an earlier one."""
    sessions = Counter(request.session for request in requests if request.session)
    if sessions:
        named = sum(sessions.values())
        return Turns(
            "session", 1 - len(sessions) / named, len(sessions), named / len(sessions)
        )
    if not any(request.blocks for request in requests):
        return Turns("nothing", None, None, None)
    return Turns("blocks", _continuations(requests) / len(requests), None, None)


def _continuations(requests: Sequence[TraceRequest]) -> int:
    """How many prompts hold all full blocks of an earlier, shorter one: an estimate.

    A turn's prompt is the one before, its answer and a new question. What stands in very many
    prompts is no conversation but a system prompt, and does not count as the end of one.
    """
    in_prompts = Counter(block for request in requests for block in request.blocks)
    common = max(COMMON_PROMPTS, len(requests) * COMMON_SHARE)
    ends: dict[int, int] = {}  # last full block of a prompt -> the prompt's length
    found = 0
    for request in requests:
        length = request.num_prompt_tokens
        found += any(ends.get(block, length) < length for block in request.blocks)
        if request.blocks and in_prompts[request.blocks[-1]] < common:
            last = request.blocks[-1]
            ends[last] = min(length, ends.get(last, length))
    return found
