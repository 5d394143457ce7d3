"""Content keys of KV blocks.

    root = SHA-256(weights, numerics class, tenant salt)
    key  = SHA-256(parent key, token ids of the block)

A key names the tokens of its block and of everything before it, under one set of weights, one
way of computing and one tenant. The stored form (`KvFormat`) is not part of it; KV that was ever
lossy, or comes from a worker that computes otherwise, has keys of its own. A block that is
not full belongs to one attempt of one request alone: its key covers these as well.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import lru_cache

KEY_BYTES = 32

ExtendKeys = Callable[[list[bytes], bytes, Seq[int], int, int], None]
"""(keys, root, token ids, block size, number): append the keys of full blocks that `keys` lacks to
make up `number`. `extend_chain` where there is KV; where there is none (the twin), whatever tells
blocks apart and costs less."""


@lru_cache(maxsize=1024)
def root_key(fingerprint: bytes, numerics: str, salt: bytes) -> bytes:
    """The parent of a sequence's first block. Each part is length-prefixed: no two collide."""
    digest = hashlib.sha256(b"baton-root-v1")
    for part in (fingerprint, numerics.encode(), salt):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def block_key(parent: bytes, token_ids: Seq[int]) -> bytes:
    """Key of a full block, chained to its parent."""
    return hashlib.sha256(parent + array("q", token_ids).tobytes()).digest()


def extend_chain(
    keys: list[bytes], root: bytes, token_ids: Seq[int], block_size: int, number: int
) -> None:
    """See `ExtendKeys`; `token_ids` has all tokens of `number` blocks."""
    parent = keys[-1] if keys else root
    for i in range(len(keys), number):
        parent = block_key(parent, token_ids[i * block_size : (i + 1) * block_size])
        keys.append(parent)


def chain(root: bytes, token_ids: Seq[int], block_size: int) -> list[bytes]:
    """Keys of every full block of `token_ids`, in order."""
    keys: list[bytes] = []
    extend_chain(keys, root, token_ids, block_size, len(token_ids) // block_size)
    return keys


def lossy_key(key: bytes, kv_class: str) -> bytes:
    """Key of a block whose KV, or that of one before it, is not what would be computed here.

    kv_class: the lossy codec that it went through, or whose arithmetic it comes from. It answers
    no look-up for `key`, nor for another class.
    """
    return hashlib.sha256(b"lossy" + kv_class.encode() + b"\0" + key).digest()


def handoff_keys(
    root: bytes, token_ids: Seq[int], block_size: int, request_id: str, choice: int, attempt: int
) -> list[bytes]:
    """Keys of all blocks of `token_ids`, as an attempt hands them off from any worker."""
    full = chain(root, token_ids, block_size)
    tail = token_ids[len(full) * block_size :]
    if not tail:
        return full
    parent = full[-1] if full else root
    return [*full, private_key(parent, tail, request_id, choice, attempt)]


def private_key(
    parent: bytes, token_ids: Seq[int], request_id: str, choice: int, attempt: int
) -> bytes:
    """Key of a partial last block, which nobody but this attempt may find."""
    owner = f"{request_id}\0{choice}\0{attempt}".encode()
    body = parent + array("q", token_ids).tobytes()
    return hashlib.sha256(b"private" + len(body).to_bytes(8, "little") + body + owner).digest()
