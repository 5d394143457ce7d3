"""What the gateway offers a decode worker while a prompt is computed elsewhere.

    like ends      what was sealed, as it is
    unlike ends    as soon as it completes blocks of the reader's: the sealed blocks that hold their
                   tokens, with the reader's own keys for them (`Recast`)

Only the gateway has the tokens by then, so the reader's keys are worked out here, once a prompt,
and the writer's, for blocks of other tokens must not come to bear those keys.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton.core.instructions import Offer
from baton.core.keys import ExtendKeys, root_key
from baton.core.life import Content, Life
from baton.core.members import Members
from baton.types import Recast, Sealed


class Offers:
    """Of one attempt, to a reader that is unlike its writer. Pure; part of the request's `Life`."""

    def __init__(
        self, writer: Content, reader: Content, salt: bytes, extend_keys: ExtendKeys
    ) -> None:
        self._writer = writer
        self._reader = reader
        self._salt = salt
        self._extend_keys = extend_keys
        self._sealed: list[tuple[bytes, bytes, int]] = []
        self._theirs: list[bytes] = []  # keys of the writer's blocks
        self._keys: list[bytes] = []
        self._num_offered = 0

    def add(self, sealed: Sealed, tokens: Sequence[int]) -> Sealed | None:
        """More was sealed of a sequence that begins with `tokens`; what to offer, if anything.

        Blocks come in order; from a gap on, or one of other tokens, nothing is offered.
        """
        fmt, ours = self._writer.kv_format, self._reader.block_size
        num_sealed = sealed.first + len(sealed.keys)
        if fmt is None or sealed.first != len(self._sealed) or not self._are_of(sealed, tokens):
            return None
        theirs = fmt.block_size
        self._sealed += zip(sealed.keys, sealed.digests, sealed.frames, strict=True)
        first, end = self._num_offered, num_sealed * theirs // ours
        if end == first:
            return None
        self._num_offered = end
        self._extend(self._keys, self._reader, tokens, end)
        begin = first * ours // theirs
        keys, digests, frames = zip(*self._sealed[begin : -(-end * ours // theirs)], strict=True)
        return Sealed(
            sealed.request_id,
            sealed.choice,
            sealed.attempt,
            sealed.grant,
            begin,
            keys,
            digests,
            frames,
            Recast(fmt, self._writer.numerics, first, tuple(self._keys[first:end])),
        )

    def _are_of(self, sealed: Sealed, tokens: Sequence[int]) -> bool:
        """Whether these are the writer's blocks of these tokens."""
        end = sealed.first + len(sealed.keys)
        is_whole = len(sealed.keys) == len(sealed.digests) == len(sealed.frames)
        if not is_whole or end * self._writer.block_size > len(tokens):
            return False
        self._extend(self._theirs, self._writer, tokens, end)
        return tuple(self._theirs[sealed.first : end]) == sealed.keys

    def _extend(
        self, keys: list[bytes], of: Content, tokens: Sequence[int], num_blocks: int
    ) -> None:
        root = root_key(of.fingerprint, of.numerics, self._salt)
        self._extend_keys(keys, root, tokens, of.block_size, num_blocks)


def offers(members: Members, life: Life, sealed: Sealed, extend_keys: ExtendKeys) -> list[Offer]:
    """What follows from blocks that the prefill worker of the present placement has sealed."""
    placement = life.placement
    if placement is None or placement.prefill is None:
        return []
    ends = placement.prefill, placement.decode
    if members.are_alike(*ends):
        return [Offer(placement.decode, sealed)]
    if not all(end in members for end in ends):
        return []
    if life.offers is None:
        writer, reader = map(members.content, ends)
        life.offers = Offers(writer, reader, life.request.salt, extend_keys)
    found = life.offers.add(sealed, (*life.request.prompt, *life.tokens))
    return [] if found is None else [Offer(placement.decode, found)]
