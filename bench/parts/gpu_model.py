"""A random Llama on a GPU, and steps of it: no checkpoint, no scheduler, no sampling but argmax."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise

import msgspec
import numpy as np
import torch

from baton.model.batch import Batch
from baton.model.bodies import TritonKernels
from baton.model.kv_cache import KvCache
from baton.model.transformer import Transformer
from baton.model.weights import allocate
from baton.model_spec import ModelSpec, RopeSpec

LLAMA_8B = ModelSpec(
    architecture="LlamaForCausalLM", vocab_size=128_256, hidden_size=4096,
    intermediate_size=14_336, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
    max_position=131_072, rms_norm_eps=1e-5, rope=RopeSpec(theta=500_000.0), qk_norm=False,
    qkv_bias=False, o_bias=False, mlp_bias=False, sliding_window=(None,) * 32,
    tie_word_embeddings=False, dtype="bfloat16",
)  # fmt: skip
# The interpreter cannot multiply bf16 matrices.
DRY = msgspec.structs.replace(
    LLAMA_8B, vocab_size=97, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=4,
    num_kv_heads=2, head_dim=8, max_position=512, sliding_window=(None,), dtype="float32",
)  # fmt: skip
BLOCK_SIZE = 16


def random_model(spec: ModelSpec, device: str, exact: bool) -> Transformer:
    weights, tensors = allocate(spec, getattr(torch, spec.dtype), device)
    torch.manual_seed(0)
    for name, tensor in tensors.items():
        tensor.fill_(1.0) if "norm" in name else tensor.normal_(std=0.02)
    return Transformer(spec, weights, TritonKernels(exact, "here", device))


def random_pool(spec: ModelSpec, num_tokens: int, device: str) -> KvCache:
    """A pool of random K and V, large enough for `num_tokens`."""
    kv = KvCache(spec, -(-num_tokens // BLOCK_SIZE), BLOCK_SIZE, spec.dtype, device)
    kv.data.normal_()
    return kv


def prompt_batch(spec: ModelSpec, length: int, device: str) -> Batch:
    """A random prompt, computed at once into the first blocks of the pool."""
    positions = torch.arange(length, device=device)
    generator = torch.Generator().manual_seed(1)
    return Batch(
        token_ids=torch.randint(spec.vocab_size, (length,), generator=generator).to(device),
        positions=positions,
        slots=positions,
        query_starts=[0, length],
        context_lens=[length],
        block_tables=torch.arange(-(-length // BLOCK_SIZE), device=device)[None],
        sample_rows=positions[-1:],
    )


class Decoding:
    """`num_rows` sequences of `context` tokens each that decode one token a step, greedily."""

    def __init__(self, model: Transformer, kv: KvCache, num_rows: int, context: int) -> None:
        self._model, self._kv, self._context = model, kv, context
        device = kv.data.device
        each = kv.num_blocks // num_rows
        self._tables = torch.arange(num_rows * each, device=device).view(num_rows, each)
        self._rows = torch.arange(num_rows, device=device)
        self.tokens = self._rows % model.spec.vocab_size

    def step(self) -> None:
        context, num_rows = self._context, len(self._rows)
        block, offset = divmod(context, BLOCK_SIZE)
        batch = Batch(
            token_ids=self.tokens,
            positions=torch.full_like(self._rows, context),
            slots=self._tables[:, block] * BLOCK_SIZE + offset,
            query_starts=list(range(num_rows + 1)),
            context_lens=[context + 1] * num_rows,
            block_tables=self._tables[:, : block + 1],
            sample_rows=self._rows,
        )
        self.tokens = self._model.forward(batch, self._kv).argmax(-1)
        self._context += 1


def seconds(step: Callable[[], object], num_steps: int, warm_up: int, device: str) -> list[float]:
    """Seconds of each step, by the device's own clock where it has one."""
    for _ in range(warm_up):
        step()
    if device == "cpu":
        marks = [time.perf_counter()]
        for _ in range(num_steps):
            step()
            marks.append(time.perf_counter())
        return list(np.diff(marks))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(num_steps + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]
