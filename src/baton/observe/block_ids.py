"""Which prompts begin alike, told without a word of what is in them.

Content keys name a prompt's blocks, each together with all that stands before it. They are digests
of tokens under the deployment's secret, and whoever has that could try prompts against them. So
what is told outside is a digest of a key under a salt of this process, which never leaves it: equal
ids mean equal beginnings, as long as the process lives, and nothing else.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from hashlib import blake2b

from baton.errors import ConfigError

ID_BYTES = 7
"""Fits an int64; of a million blocks, two unlike ones meet with a probability of 1 in 100,000."""
MAX_BLOCKS = 2048
"""Of one prompt; what stands behind them is not told. It bounds the memory that a thousand kept
requests take to 14 MB."""


class BlockIds:
    """Makes ids, from a salt of its own."""

    def __init__(self) -> None:
        self._salt = secrets.token_bytes(32)

    def of(self, keys: Sequence[bytes]) -> bytes:
        """`ID_BYTES` for each of the first `MAX_BLOCKS` keys, one after the other."""
        salt = self._salt
        return b"".join(
            [blake2b(key, digest_size=ID_BYTES, key=salt).digest() for key in keys[:MAX_BLOCKS]]
        )


def numbers(ids: bytes) -> tuple[int, ...]:
    """The ids as numbers.

    Raises:
        ConfigError: these are no whole ids.
    """
    if len(ids) % ID_BYTES:
        raise ConfigError(f"block ids have {ID_BYTES} bytes each, and {len(ids)} are no multiple")
    return tuple(
        int.from_bytes(ids[at : at + ID_BYTES], "big") for at in range(0, len(ids), ID_BYTES)
    )
