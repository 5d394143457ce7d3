"""What the engine adds to the model's arithmetic in a decode step: the batch and the sampler.

A model of the demo's size with random weights, all sequences decoding, one thread. `step` is
`TorchRunner.submit` and `collect`, `forward` the model's part of the same calls; what is left is
the engine's own.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from baton.core.keys import root_key
from baton.core.plan import Chunk, StepPlan
from baton.core.sequence import Sequence
from baton.engine.runner import TorchRunner
from baton.model.batch import Batch
from baton.model.kv_cache import KvCache
from baton.model.native import ISAS, find_kernels
from baton.model.transformer import Transformer
from baton.model.weights import allocate
from baton.model_spec import ModelSpec, RopeSpec
from baton.types import Request, SamplingParams
from parts.table import Row, timed

BATCHES = (1, 8, 32, 64)
BLOCK_SIZE = 16
NUM_PROMPT = 64
NUM_STEPS = 80
SAMPLING = {
    "T=0": {"temperature": 0.0},
    "T=1": {"temperature": 1.0},
    "T=0.8 top_p=0.95": {"temperature": 0.8, "top_p": 0.95},
}


def demo_size() -> ModelSpec:
    return ModelSpec(
        architecture="LlamaForCausalLM", vocab_size=4096, hidden_size=256, intermediate_size=704,
        num_layers=6, num_heads=8, num_kv_heads=4, head_dim=32, max_position=1024,
        rms_norm_eps=1e-5, rope=RopeSpec(), qk_norm=False, qkv_bias=False, o_bias=False,
        mlp_bias=False, sliding_window=(None,) * 6, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip


def random_model(spec: ModelSpec, dtype: str) -> Transformer:
    weights, tensors = allocate(spec, getattr(torch, dtype), "cpu")
    torch.manual_seed(0)
    for name, tensor in tensors.items():
        tensor.fill_(1.0) if "norm" in name else tensor.normal_(std=0.05)
    return Transformer(spec, weights)


class TimedModel:
    """Passes `forward` on and keeps the CPU time of each call, in microseconds."""

    def __init__(self, model: Transformer) -> None:
        self.spec = model.spec
        self.cpu_us: list[float] = []
        self._model = model

    def forward(self, batch: Batch, kv: KvCache) -> torch.Tensor:
        started = time.thread_time()
        logits = self._model.forward(batch, kv)
        self.cpu_us.append(1e6 * (time.thread_time() - started))
        return logits


class Decoding:
    """`batch` sequences that have their prompts behind them and decode for ever."""

    def __init__(
        self, model: TimedModel, dtype: str, batch: int, sampling: dict[str, float]
    ) -> None:
        num_blocks = 1024 // BLOCK_SIZE
        kv = KvCache(model.spec, batch * num_blocks, BLOCK_SIZE, dtype)
        kv.data.zero_()
        kernels = next(filter(None, map(find_kernels, ISAS)), None)
        self._runner = TorchRunner(model, kv, "cpu", kernels=kernels)  # type: ignore[arg-type]
        self._sequences = []
        for i in range(batch):
            prompt = tuple((7 * i + 3 * j) % model.spec.vocab_size for j in range(NUM_PROMPT))
            params = SamplingParams(max_tokens=900, seed=i, **sampling)  # type: ignore[arg-type]
            root = root_key(b"", "", b"")
            seq = Sequence(Request(f"r{i}", prompt, params), root, BLOCK_SIZE, 0.0)
            seq.blocks = list(range(i * num_blocks, (i + 1) * num_blocks))
            seq.num_computed = NUM_PROMPT - 1
            self._sequences.append(seq)

    def step(self) -> None:
        chunks = (Chunk(seq, seq.num_computed, 1, True) for seq in self._sequences)
        self._runner.submit(StepPlan(0, tuple(chunks)))
        for seq, (token,) in zip(self._sequences, self._runner.collect().token_ids, strict=True):
            seq.num_computed += 1
            seq.token_ids.append(token)


def measure() -> list[Row]:
    torch.set_num_threads(1)
    rows = []
    for dtype in ("bfloat16", "float32"):
        model = random_model(demo_size(), dtype)
        for batch in BATCHES:
            for name, sampling in SAMPLING.items():
                timed_model = TimedModel(model)
                decoding = Decoding(timed_model, dtype, batch, sampling)
                timed(decoding.step, 10)
                timed_model.cpu_us.clear()
                step = np.array(timed(decoding.step, NUM_STEPS).cpu_us)
                own = float(np.median(step - timed_model.cpu_us))
                values = {
                    "step_us": float(np.median(step)),
                    "forward_us": float(np.median(timed_model.cpu_us)),
                    "engine_us": own,
                    "engine_per_token_us": own / batch,
                }
                case = f"{dtype}, {batch} sequences, {name}"
                rows.append(Row("engine: a decode step", case, values))
    return rows
