from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from numerics.by_hand import BLOCK_SIZE, Handmade, Sequence_, random_prompt
from numerics.tiny_models import VOCAB_SIZE, make_checkpoint

from baton.model.kv_cache import KvCache, kv_block_bytes
from baton.model_spec import load_model_spec


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_is_where_the_layout_says(checkpoint, dtype):
    kv = KvCache(load_model_spec(checkpoint), 5, 4, dtype)
    kv.data.zero_()
    slots = torch.tensor([4 * 3 + 2, 0, 4 * 4 + 3])
    k, v = torch.rand(2, 3, 2, 16).to(kv.dtype)
    kv.write(kv.rows(slots), 1, k, v)
    for i, slot in enumerate(slots.tolist()):
        assert torch.equal(kv.data[slot // 4, 1, 0, slot % 4], k[i])
        assert torch.equal(kv.data[slot // 4, 1, 1, slot % 4], v[i])
    assert kv.data.count_nonzero() == k.count_nonzero() + v.count_nonzero()
    found_k, found_v = kv.gather(kv.rows(slots), 1)
    assert torch.equal(found_k.view_as(k), k)
    assert torch.equal(found_v.view_as(v), v)


def test_sizes_are_known_before(checkpoint):
    spec = load_model_spec(checkpoint)
    assert kv_block_bytes(spec, 16, "bfloat16") == 16 * 3 * 2 * 2 * 16 * 2
    kv = KvCache(spec, 7, 16, "bfloat16")
    assert kv.block_bytes == kv_block_bytes(spec, 16, "bfloat16")
    assert kv.data.nbytes == 7 * kv.block_bytes


def test_blocks_move_to_another_pool_as_bytes(checkpoint):
    """What one pool computed goes on in another, copied block by block on another thread."""
    source, target = Handmade.load(checkpoint), Handmade.load(checkpoint)
    prompt = random_prompt(45, VOCAB_SIZE, seed=1)
    sequence = Sequence_(prompt)
    source.step([(sequence, 44)])
    moved = Sequence_(prompt, computed=44, table=[target.free.pop(3) for _ in sequence.table])

    def copy():
        for here, there in zip(sequence.table, moved.table, strict=True):
            view = target.kv.landing(there)
            assert view.dtype == np.uint8
            assert view.flags.c_contiguous
            assert view.nbytes == target.kv.block_bytes
            view[:] = source.kv.read_block(here)
            target.kv.land(there, view)

    thread = threading.Thread(target=copy)
    thread.start()
    thread.join()
    assert moved.table != sequence.table
    assert len(moved.table) == -(-44 // BLOCK_SIZE)
    assert torch.equal(target.step([(moved, 1)]), source.step([(sequence, 1)]))


def test_pages_are_not_touched_before_they_are_used(checkpoint):
    def resident() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * 4096

    before = resident()
    kv = KvCache(load_model_spec(checkpoint), 65536, 16, "float32")
    assert kv.data.nbytes == 65536 * kv.block_bytes > 700 << 20
    assert resident() - before < 50 << 20


def test_a_reader_sees_the_block_when_it_is_called(checkpoint):
    kv = KvCache(load_model_spec(checkpoint), 2, 16, "float32")
    kv.data.zero_()
    read = kv.reader(1, passes_since=1)
    kv.mark()  # nothing to mark on a host
    kv.data[1] = 1.0
    assert (read().view(np.float32) == 1.0).all()
    assert read().base is kv.read_block(1).base, "a view of the pool"
