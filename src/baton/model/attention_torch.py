"""The plain-torch body of attention, for any device; the one that other bodies are compared with.

K and V are gathered out of the pool into contiguous tensors, then given to PyTorch's fused
attention. Sequences with one new token (decode) are gathered and computed together, padded to the
longest of their group; longer chunks (prefill) one sequence at a time.

The heads that share a KV head are folded: they are the rows of one small matrix for decode, a
batch of their own with an unexpanded K for prefill. (`enable_gqa` at query length 1 is six times
slower on the CPU, and on CUDA excludes the kernel that takes a mask without materialising scores.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from baton.model.batch import Batch
from baton.model.kv_cache import KvCache

# Bounds the gathered copies of a decode step, in tokens with padding: 2 x 64 MiB at 1,024 KV
# elements a token in bf16.
_MAX_GATHERED = 32_768


@dataclass(slots=True)
class _Decode:
    """n sequences of one new token: `tokens` [n], `rows` [n * length], `mask` [n, 1, 1, length]."""

    tokens: Tensor
    rows: Tensor
    mask: Tensor | None


@dataclass(slots=True)
class _Prefill:
    """Tokens start..end of one sequence: `rows` [length], `mask` [end - start, length].

    Without a mask the chunk is the whole context, and plain causal.
    """

    start: int
    end: int
    rows: Tensor
    mask: Tensor | None


@dataclass(slots=True)
class _Plan:
    """All that does not depend on the layer."""

    write_rows: Tensor
    decodes: list[_Decode]
    prefills: list[_Prefill]


def attend_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: KvCache,
    layer: int,
    batch: Batch,
    window: int | None,
    scale: float,
) -> Tensor:
    """See `attention.Attend`."""
    plan = batch.derived.get(window)
    if plan is None:
        plan = batch.derived[window] = _plan(batch, kv, window)
    kv.write(plan.write_rows, layer, k, v)
    num_tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    q = q.view(num_tokens, kv_heads, heads // kv_heads, dim)
    out = torch.empty_like(q)
    for part in plan.decodes:
        n = part.tokens.numel()
        keys, values = (
            x.view(n, -1, kv_heads, dim).transpose(1, 2) for x in kv.gather(part.rows, layer)
        )
        found = F.scaled_dot_product_attention(
            q.index_select(0, part.tokens), keys, values, attn_mask=part.mask, scale=scale
        )
        out.index_copy_(0, part.tokens, found)
    for chunk in plan.prefills:
        folded = q[chunk.start : chunk.end].permute(1, 2, 0, 3)
        keys, values = (
            x.view(-1, kv_heads, 1, dim).permute(1, 2, 0, 3).expand(-1, folded.shape[1], -1, -1)
            for x in kv.gather(chunk.rows, layer)
        )
        found = F.scaled_dot_product_attention(
            folded, keys, values, attn_mask=chunk.mask, is_causal=chunk.mask is None, scale=scale
        )
        out[chunk.start : chunk.end] = found.permute(2, 0, 1, 3)
    return out.view(num_tokens, heads * dim)


def _plan(batch: Batch, kv: KvCache, window: int | None) -> _Plan:
    starts, contexts = batch.query_starts, batch.context_lens
    decoding = [i for i in range(len(contexts)) if starts[i + 1] - starts[i] == 1]
    chunks = [i for i in range(len(contexts)) if starts[i + 1] - starts[i] > 1]
    return _Plan(
        kv.rows(batch.slots),
        [_plan_decode(batch, kv, window, group) for group in _groups(decoding, contexts, window)],
        [_plan_prefill(batch, kv, window, i) for i in chunks],
    )


def _groups(sequences: list[int], contexts: list[int], window: int | None) -> list[list[int]]:
    """Cut the decoding sequences into groups of like length, none too large to gather."""
    groups: list[list[int]] = []
    limit = 0
    for i in sorted(sequences, key=lambda i: contexts[i]):
        length = min(contexts[i], window or contexts[i])
        if length > limit or (len(groups[-1]) + 1) * length > _MAX_GATHERED:
            groups.append([])
            limit = max(2 * length, 256)
        groups[-1].append(i)
    return groups


def _plan_decode(batch: Batch, kv: KvCache, window: int | None, group: list[int]) -> _Decode:
    device = batch.slots.device
    contexts = [batch.context_lens[i] for i in group]
    lengths = [min(context, window or context) for context in contexts]
    longest = max(lengths)
    steps = torch.arange(longest, device=device)
    last = torch.tensor(contexts, device=device)[:, None] - 1
    length = torch.tensor(lengths, device=device)[:, None]
    # Where a row is shorter than the longest, its own last token stands in: unlike the slots
    # beyond a sequence, which may hold NaN, it is harmless under a mask.
    positions = torch.minimum(last - length + 1 + steps, last)
    tables = batch.block_tables[torch.tensor(group, device=device)]
    slots = tables.gather(1, positions // kv.block_size) * kv.block_size
    rows = kv.rows(slots + positions % kv.block_size).flatten()
    mask = None
    if min(lengths) < longest:
        mask = torch.zeros(len(group), longest, dtype=kv.dtype, device=device)
        mask = mask.masked_fill_(steps >= length, float("-inf"))[:, None, None]
    tokens = torch.tensor([batch.query_starts[i] for i in group], device=device)
    return _Decode(tokens, rows, mask)


def _plan_prefill(batch: Batch, kv: KvCache, window: int | None, sequence: int) -> _Prefill:
    start, end = batch.query_starts[sequence], batch.query_starts[sequence + 1]
    context = batch.context_lens[sequence]
    before = context - (end - start)  # tokens of this sequence that were computed earlier
    first = max(0, before - window + 1) if window else 0
    positions = torch.arange(first, context, device=batch.slots.device)
    slots = batch.block_tables[sequence, positions // kv.block_size] * kv.block_size
    rows = kv.rows(slots + positions % kv.block_size)
    if before == 0 and (window is None or context <= window):
        return _Prefill(start, end, rows, None)
    shape = (end - start, context - first)
    hidden = torch.full(shape, float("-inf"), dtype=kv.dtype, device=batch.slots.device)
    mask = hidden.triu(before - first + 1)
    if window:
        mask += hidden.tril(before - first - window)
    return _Prefill(start, end, rows, mask)
