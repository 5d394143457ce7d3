"""Prompts that were never written: tokens that stand for what a trace says of sharing.

All tokens of a trace's block are its id, and all others of a request (the rest of its prompt, its
answer) are a number of its own. So equal blocks have equal tokens, and a block is named by the
last token in it, together with its place: equal names mean equal tokens from the start on, as
equal content keys do. Naming a block so costs a tenth of digesting it.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from functools import lru_cache

from baton.core.keys import KEY_BYTES
from baton.twin.workload import TraceRequest

VOCAB_SIZE = 1 << 62
_OWN = 1 << 40
"""Numbers from here on are requests' own; below are ids of blocks."""
_HALF = KEY_BYTES // 2


def extend_names(
    keys: list[bytes], root: bytes, token_ids: Seq[int], block_size: int, number: int
) -> None:
    """An `ExtendKeys`: 32 bytes a block, the first half of them telling tenants apart."""
    prefix, first = root[:_HALF], len(keys)
    last = token_ids[(first + 1) * block_size - 1]
    if number == first + 1:  # an answer that has filled a block
        keys.append(prefix + (last << 64 | first).to_bytes(_HALF, "little"))
        return
    if not first and last >= _OWN:  # all that follows is the request's own
        names = _own_names(prefix, last)
        names += [
            prefix + (last << 64 | i).to_bytes(_HALF, "little") for i in range(len(names), number)
        ]
        keys += names[:number]
        return
    lasts = token_ids[(first + 1) * block_size - 1 : number * block_size : block_size]
    keys += [
        prefix + (last << 64 | i).to_bytes(_HALF, "little") for i, last in enumerate(lasts, first)
    ]


@lru_cache(maxsize=4096)
def _own_names(prefix: bytes, own: int) -> list[bytes]:
    """Of the blocks of a prompt that shares nothing, as many as were asked for: gateway and workers
    ask for the same ones."""
    return []


class Prompts:
    """Tokens for the requests of one trace."""

    def __init__(self) -> None:
        self._ids: dict[int, int] = {}

    def own_token(self, number: int) -> int:
        """The token that request `number` shares with nobody; its answer consists of it."""
        return _OWN + number

    def tokens(self, request: TraceRequest, number: int) -> tuple[int, ...]:
        """The prompt of request `number`."""
        own, size = self.own_token(number), request.block_size
        if not request.blocks:
            return (own,) * request.num_prompt_tokens
        tokens: list[int] = []
        for block in request.blocks[: request.num_prompt_tokens // size]:
            tokens += [self._ids.setdefault(block, len(self._ids))] * size
        tokens += [own] * (request.num_prompt_tokens - len(tokens))
        return tuple(tokens)
