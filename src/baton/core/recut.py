"""Which tokens of a source's blocks go where in ours, when the two are of different sizes.

    theirs   |0  ·  ·  ·  ·  ·|6  ·  ·  ·  ·  ·|12 ·
    ours     |0  ·  ·  ·|4  ·  ·  ·|8  ·  ·  ·|12 ·        block 1 has slots 4 5 of 0, 0 1 of 1

Pure. The copy, and the conversion where types differ as well, is the fabric's.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton.core.plan import Piece, Recut, SourceBlock
from baton.types import Handoff, KvFormat, Sealed


def recut(handoff: Handoff, target: KvFormat, indices: Sequence[int]) -> Recut:
    """What to fetch of `handoff`, for our blocks `indices` of the sequence (ascending).

    Every token that the handoff covers and that lies in one of these blocks is in exactly one
    piece; `Piece.turn` counts in `indices`. Source blocks come once each, in their order.
    """
    return _recut(handoff.kv_format, handoff, 0, handoff.num_tokens, target, indices)


def recut_sealed(
    sealed: Sealed, source: KvFormat, target: KvFormat, indices: Sequence[int]
) -> Recut:
    """As `recut`, of full blocks in the form `source`, which cover our blocks `indices`."""
    num_tokens = (sealed.first + len(sealed.keys)) * source.block_size
    return _recut(source, sealed, sealed.first, num_tokens, target, indices)


def _recut(
    source: KvFormat,
    places: Handoff | Sealed,
    first: int,
    num_tokens: int,
    target: KvFormat,
    indices: Sequence[int],
) -> Recut:
    """`places` are those of the source's blocks from `first` on."""
    theirs, ours = source.block_size, target.block_size
    pieces: dict[int, list[Piece]] = {}
    for turn, index in enumerate(indices):
        token, end = index * ours, min((index + 1) * ours, num_tokens)
        while token < end:
            block = token // theirs
            upto = min(end, (block + 1) * theirs)
            piece = Piece(token - block * theirs, turn, token - index * ours, upto - token)
            pieces.setdefault(block, []).append(piece)
            token = upto
    blocks = tuple(
        SourceBlock(*place, tuple(parts))
        for i, parts in pieces.items()
        for place in [(places.keys[i - first], places.frames[i - first], places.digests[i - first])]
    )
    return Recut(source, target, blocks)
