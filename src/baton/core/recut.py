"""Which tokens of a source's blocks go where in ours, when the two are of different sizes.

    theirs   |0  ·  ·  ·  ·  ·|6  ·  ·  ·  ·  ·|12 ·
    ours     |0  ·  ·  ·|4  ·  ·  ·|8  ·  ·  ·|12 ·        block 1 has slots 4 5 of 0, 0 1 of 1

Pure. The copy, and the conversion where types differ as well, is the fabric's.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton.core.plan import Piece, Recut, SourceBlock
from baton.types import Handoff, KvFormat


def recut(handoff: Handoff, target: KvFormat, indices: Sequence[int]) -> Recut:
    """What to fetch of `handoff`, for our blocks `indices` of the sequence (ascending).

    Every token that the handoff covers and that lies in one of these blocks is in exactly one
    piece; `Piece.turn` counts in `indices`. Source blocks come once each, in their order.
    """
    theirs, ours = handoff.kv_format.block_size, target.block_size
    pieces: dict[int, list[Piece]] = {}
    for turn, index in enumerate(indices):
        token, end = index * ours, min((index + 1) * ours, handoff.num_tokens)
        while token < end:
            block = token // theirs
            upto = min(end, (block + 1) * theirs)
            piece = Piece(token - block * theirs, turn, token - index * ours, upto - token)
            pieces.setdefault(block, []).append(piece)
            token = upto
    blocks = tuple(
        SourceBlock(handoff.keys[i], handoff.frames[i], handoff.digests[i], tuple(parts))
        for i, parts in pieces.items()
    )
    return Recut(handoff.kv_format, target, blocks)
