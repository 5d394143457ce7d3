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
_PLACES: list[bytes] = []
"""Numbers of blocks in a prompt, as they stand in names; as many as were asked for."""
_OWN = 1 << 40
"""Numbers from here on are requests' own; below are ids of blocks."""
_HALF = KEY_BYTES // 2


def extend_names(
    keys: list[bytes], root: bytes, token_ids: Seq[int], block_size: int, number: int
) -> None:
    """An `ExtendKeys`: 32 bytes a block, the first half of them telling tenants apart."""
    prefix, first = root[:_HALF], len(keys)
    last = token_ids[(first + 1) * block_size - 1]
    places = _places(number)
    if number == first + 1:  # an answer that has filled a block
        keys.append(prefix + last.to_bytes(8, "little") + places[first])
        return
    if not first and last >= _OWN:  # all that follows is the request's own
        names = _own_names(prefix, last)
        begin = prefix + last.to_bytes(8, "little")
        names += [begin + place for place in places[len(names) : number]]
        keys += names[:number]
        return
    lasts = token_ids[(first + 1) * block_size - 1 : number * block_size : block_size]
    keys += [
        prefix + last.to_bytes(8, "little") + place
        for last, place in zip(lasts, places[first:number], strict=True)
    ]


def _places(number: int) -> list[bytes]:
    """At least `number` of them."""
    _PLACES.extend(place.to_bytes(8, "little") for place in range(len(_PLACES), number))
    return _PLACES


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
