"""The model's input, kept from step to step, is what it would be if it were made afresh."""

from __future__ import annotations

import random

import pytest
import torch

from baton.core.keys import root_key
from baton.core.plan import Chunk, StepPlan
from baton.core.sequence import Sequence
from baton.engine.inputs import BlockTables, Inputs
from baton.types import Request, SamplingParams

SIZE = 4


def _sequence(rng: random.Random, number: int) -> Sequence:
    prompt = tuple(rng.randrange(1000) for _ in range(rng.randrange(1, 60)))
    request = Request(f"r{number}", prompt, SamplingParams(max_tokens=99))
    return Sequence(request, root_key(b"", "", b""), SIZE, 0.0)


def _grow(rng: random.Random, seq: Sequence, num_tokens: int) -> None:
    while len(seq.blocks) * SIZE < num_tokens:
        seq.blocks += [rng.randrange(1 << 20)]


def _check(inputs: Inputs, plan: StepPlan) -> None:
    batch = inputs.batch(plan)
    token_ids, positions, slots, starts, sampled = [], [], [], [0], []
    for chunk in plan.chunks:
        for position in range(chunk.start, chunk.end):
            token_ids.append(chunk.seq.token_ids[position])
            positions.append(position)
            slots.append(chunk.seq.blocks[position // SIZE] * SIZE + position % SIZE)
        starts.append(len(token_ids))
        if chunk.samples:
            sampled.append(len(token_ids) - 1)
    assert batch.token_ids.tolist() == token_ids
    assert batch.positions.tolist() == positions
    assert batch.slots.tolist() == slots
    assert batch.query_starts == starts
    assert batch.context_lens == [chunk.end for chunk in plan.chunks]
    assert batch.sample_rows.tolist() == sampled
    assert batch.block_tables.is_contiguous()
    for row, chunk in zip(batch.block_tables.tolist(), plan.chunks, strict=True):
        assert row[: len(chunk.seq.blocks)] == chunk.seq.blocks
    for tensor in (batch.token_ids, batch.positions, batch.slots, batch.block_tables):
        assert tensor.dtype == torch.int64


@pytest.mark.parametrize("seed", range(6))
def test_sequences_come_go_grow_and_lose_their_blocks(seed: int) -> None:
    rng = random.Random(seed)
    inputs = Inputs(SIZE, torch.device("cpu"))
    running: list[Sequence] = []
    for step in range(300):
        if len(running) < 60 and (not running or rng.random() < 0.4):
            running.append(_sequence(rng, step))
        if rng.random() < 0.2:  # ended: others move up
            running.pop(rng.randrange(len(running)))
        for seq in rng.sample(running, len(running) // 8):
            seq.reset()  # preempted, and admitted again at once
        chosen = rng.sample(running, rng.randrange(len(running) + 1))
        chunks = []
        for seq in chosen:
            most = seq.num_remaining
            num_tokens = most if rng.random() < 0.8 else rng.randrange(1, most + 1)
            _grow(rng, seq, seq.num_tokens if rng.random() < 0.5 else seq.num_computed + num_tokens)
            chunks.append(Chunk(seq, seq.num_computed, num_tokens, num_tokens == most))
        if chunks:
            _check(inputs, StepPlan(step, tuple(chunks)))
        for chunk in chunks:
            chunk.seq.num_computed = chunk.end
            if chunk.samples:
                chunk.seq.token_ids.append(rng.randrange(1000))


def test_rows_of_what_has_gone_are_used_again() -> None:
    rng = random.Random(0)
    tables = BlockTables(num_rows=2, num_blocks=2)
    for number in range(100):
        seqs = [_sequence(rng, number) for _ in range(2)]
        for seq in seqs:
            _grow(rng, seq, seq.num_tokens)
        found = tables.take(tuple(Chunk(seq, 0, 1, False) for seq in seqs))
        for row, seq in zip(found.tolist(), seqs, strict=True):
            assert row[: len(seq.blocks)] == seq.blocks
    assert len(tables._array) == 2
