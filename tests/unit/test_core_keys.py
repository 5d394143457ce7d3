"""Content keys: what they cover, and what they do not confuse."""

from __future__ import annotations

import hashlib

from sim_engine import make_request

from baton.core.keys import KEY_BYTES, block_key, chain, private_key, root_key
from baton.core.sequence import Sequence


def test_root_covers_each_part_and_their_borders() -> None:
    roots = {
        root_key(b"w", "exact", b"s"),
        root_key(b"v", "exact", b"s"),
        root_key(b"w", "fast", b"s"),
        root_key(b"w", "exact", b"t"),
        root_key(b"w", "exact", b""),
        root_key(b"we", "xact", b"s"),
        root_key(b"", "wexact", b"s"),
    }
    assert len(roots) == 7
    assert all(len(root) == KEY_BYTES for root in roots)


def test_block_key_is_sha256_of_parent_and_int64_tokens() -> None:
    parent = bytes(range(32))
    tokens = b"".join(t.to_bytes(8, "little") for t in (1, 2, 70000))
    assert block_key(parent, (1, 2, 70000)) == hashlib.sha256(parent + tokens).digest()


def test_chain_names_everything_before() -> None:
    root = root_key(b"w", "exact", b"")
    first = chain(root, [1, 2, 3, 4, 5], 2)
    assert len(first) == 2  # the fifth token is in no full block
    assert chain(root, [1, 2, 3, 4], 2) == first
    assert chain(root, [9, 2, 3, 4], 2)[1] != first[1]
    assert chain(root_key(b"w", "exact", b"t"), [1, 2, 3, 4], 2)[0] != first[0]
    assert chain(root, [1], 2) == []


def test_private_key_belongs_to_one_attempt() -> None:
    parent = bytes(32)
    keys = {
        private_key(parent, (1,), "a", 0, 0),
        private_key(parent, (1,), "a", 0, 1),
        private_key(parent, (1,), "a", 1, 0),
        private_key(parent, (1,), "b", 0, 0),
        private_key(parent, (2,), "a", 0, 0),
        private_key(bytes(31) + b"1", (1,), "a", 0, 0),
        block_key(parent, (1,)),
    }
    assert len(keys) == 7


def test_sequence_extends_its_keys() -> None:
    root = root_key(b"w", "exact", b"")
    seq = Sequence(make_request("a", [1, 2, 3, 4, 5]), root, 2, 0.0)
    assert seq.full_keys(5) == chain(root, [1, 2, 3, 4, 5], 2)
    seq.token_ids.append(6)
    assert seq.full_keys(6) == chain(root, [1, 2, 3, 4, 5, 6], 2)
    assert seq.full_keys(3) == chain(root, [1, 2], 2)
    assert seq.handoff_keys(4, 0) == seq.full_keys(4)
    tail = private_key(seq.full_keys(4)[-1], [5], "a", 0, 3)
    assert seq.handoff_keys(5, 3) == [*seq.full_keys(4), tail]
    assert seq.handoff_keys(1, 0) == [private_key(root, [1], "a", 0, 0)]
