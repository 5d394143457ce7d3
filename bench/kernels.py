"""The CPU kernels by themselves, beside what the machine allows: all linear layers of a 0.5 B
Llama for M rows, and paged attention.

    python bench/kernels.py [--threads 2] [--isa avx512bf16] [--rounds 5]

In each round the memory's bandwidth (reading) and the peak of bf16 matrix products (torch's, of
1,024 x 4,096 x 4,096) are measured, then every case once. `roofline` is the least time that these
medians allow, bytes read or operations done, whichever takes longer, divided by the time taken. It
can exceed 1, where the kernels' products are faster than torch's.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from parts.big_model import SHAPES
from parts.table import Row, render

from baton.model.native import (
    ISAS,
    Kernels,
    LayerArgs,
    Packed,
    StepArgs,
    find_kernels,
)

ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128, 512, 2048)
ATTENTION = ((1, 128, 1), (8, 128, 1), (32, 128, 1), (8, 1000, 1), (8, 4096, 1), (1, 2048, 512))
"""Sequences, context, new tokens each."""
SHAPE = SHAPES["0.5B"]
HIDDEN, INNER, LAYERS = SHAPE.hidden, SHAPE.inner, SHAPE.layers
HEADS, KV_HEADS, VOCAB = SHAPE.heads, SHAPE.kv_heads, SHAPE.vocab
DIM, BLOCK_SIZE = HIDDEN // HEADS, 16
PEAK_SHAPE = (1024, 4096, 4096)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", choices=ISAS, help="default: the best here")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = [k for isa in ISAS if args.isa in (None, isa) and (k := find_kernels(isa)) is not None]
    if not found:
        sys.exit("no such kernels here: make kernels")
    kernels = found[0]
    print(f"{kernels.isa}, {args.threads} threads, {args.rounds} rounds, medians\n")
    print(render(linear(kernels, args.rounds) + attention(kernels, args.rounds)))
    return 0


def linear(kernels: Kernels, rounds: int) -> list[Row]:
    """All linear layers, for M rows; the bytes are those of the weights."""
    shapes = [(HIDDEN + 2 * KV_HEADS * DIM, HIDDEN), (HIDDEN, HIDDEN)]
    shapes += [(2 * INNER, HIDDEN), (HIDDEN, INNER)]
    shapes = shapes * LAYERS + [(VOCAB, HIDDEN)]
    weights = [Packed(kernels, torch.randn(shape).to(torch.bfloat16)) for shape in shapes]
    num_weights = sum(n * k for n, k in shapes)

    def case(m: int) -> Callable[[], None]:
        inputs = {k: torch.randn(m, k).to(torch.bfloat16) for k in (HIDDEN, INNER)}

        def run() -> None:
            for weight in weights:
                kernels.linear(inputs[weight.args.k], weight)

        return run

    cases = {f"M={m}": (case(m), 2.0 * num_weights, 2.0 * m * num_weights) for m in ROWS}
    return _measure("linear layers", cases, rounds)


def attention(kernels: Kernels, rounds: int) -> list[Row]:
    """One layer's attention, averaged over layers whose KV lies in one pool; bytes of K and V."""
    cases = {}
    for batch, context, new in ATTENTION:
        pairs = batch * (new * (context - new) + new * (new + 1) / 2)
        read = 4.0 * batch * context * KV_HEADS * DIM
        name = f"{batch} x {new} of {context}"
        cases[name] = (_attention(kernels, batch, context, new), read, 4.0 * HEADS * DIM * pairs)
    return _measure("attention of a layer", cases, rounds, repeats=LAYERS)


def _attention(kernels: Kernels, batch: int, context: int, new: int) -> Callable[[], None]:
    num_blocks = -(-context // BLOCK_SIZE)
    shape = (batch * num_blocks, LAYERS, 2, BLOCK_SIZE, KV_HEADS, DIM)
    kv = torch.randn(shape, dtype=torch.bfloat16)
    tables = torch.randperm(batch * num_blocks).view(batch, num_blocks).contiguous()
    starts = torch.arange(0, (batch + 1) * new, new)
    contexts = torch.full((batch,), context)
    qkv = torch.randn(batch * new, (HEADS + 2 * KV_HEADS) * DIM).to(torch.bfloat16)
    out = torch.empty(batch * new, HEADS * DIM, dtype=torch.bfloat16)
    step = StepArgs(
        tokens=batch * new,
        sequences=batch,
        query_starts=starts.data_ptr(),
        context_lens=contexts.data_ptr(),
        tables=tables.data_ptr(),
        max_blocks=num_blocks,
        kv=kv.data_ptr(),
        block_stride=kv.stride(0),
        block_size=BLOCK_SIZE,
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=DIM,
        scale=DIM**-0.5,
        qkv=qkv.data_ptr(),
        attended=out.data_ptr(),
        dtype=0,
        threads=torch.get_num_threads(),
    )
    memory = (kv, tables, starts, contexts, qkv, out)  # what `step` points into

    def run() -> None:
        assert memory
        for index in range(LAYERS):
            kernels.table.attend(LayerArgs(window=0), step, index)

    return run


def _measure(
    part: str,
    cases: dict[str, tuple[Callable[[], None], float, float]],
    rounds: int,
    repeats: int = 1,
) -> list[Row]:
    """Every case is a call, its bytes and its operations, both of one of the call's `repeats`."""
    big = torch.zeros(1 << 27)
    a, b = (torch.randn(s).to(torch.bfloat16) for s in (PEAK_SHAPE[:2], PEAK_SHAPE[1:]))
    seconds: dict[str, list[float]] = {name: [] for name in ("read", "product", *cases)}
    for _ in range(rounds + 1):
        seconds["read"].append(_seconds(lambda: big.sum()))
        seconds["product"].append(_seconds(lambda: a @ b))
        for name, (call, _, _) in cases.items():
            seconds[name].append(_seconds(call) / repeats)
    medians = {name: float(np.median(times[1:])) for name, times in seconds.items()}  # first: warm
    bandwidth = big.nbytes / medians["read"]
    peak = 2.0 * np.prod(PEAK_SHAPE) / medians["product"]
    return [
        Row(part, name, {
            "ms": 1e3 * medians[name],
            "GB/s": num_bytes / medians[name] / 1e9,
            "GFLOP/s": operations / medians[name] / 1e9,
            "roofline": max(num_bytes / bandwidth, operations / peak) / medians[name],
            "machine GB/s": bandwidth / 1e9,
            "machine GFLOP/s": peak / 1e9,
        })
        for name, (_, num_bytes, operations) in cases.items()
    ]  # fmt: skip


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
