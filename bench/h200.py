"""One GPU, Llama-3.1-8B's shape, bf16, random weights: beside transformers and the hardware.

    python bench/h200.py [--json FILE] [--part NAME]... [--dry]

`device`   copy bandwidth and GEMM peak, which everything else is a fraction of
`decode`   B=1 at a context of 128, B=64 at 2,048: the model's step, greedy, recorded as a graph
`prefill`  8,192 tokens at once
`exact`    the same cells, where no bit depends on the batch
`peers`    the same cells by transformers: static cache, compiled (prefill: not compiled, sdpa)
`handoff`  4,096 tokens' KV between two processes on this GPU

Takes under ten minutes and no network. A floor is the larger of bytes ÷ bandwidth (weights once,
K and V of the context once) and operations ÷ GEMM peak; "of floor" is floor ÷ time. Times are
medians by the device's clock. A part that fails is printed with its reason, and the exit code is 1.

`--dry` runs it all on a tiny model on the CPU, in Triton's interpreter: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import msgspec
import numpy as np
import torch
from parts.gpu_handoff import measure as measure_handoff
from parts.gpu_model import (
    DRY,
    LLAMA_8B,
    Decoding,
    prompt_batch,
    random_model,
    random_pool,
    seconds,
)
from parts.table import Row, render

from baton.model_spec import ModelSpec

DECODES = ((1, 128), (64, 2048))  # sequences, tokens of context
PROMPT, HANDOFF = 8192, 4096
WARM_UP, STEPS, PREFILLS = 8, 64, 8


class Bench:
    """The cells for one spec and device; `peak` and `bandwidth` are set by `device`."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.device = "cpu" if dry else "cuda"
        self.spec: ModelSpec = DRY if dry else LLAMA_8B
        self.decodes = ((1, 5), (3, 40)) if dry else DECODES
        self.prompt, self.handoff_tokens = (70, 40) if dry else (PROMPT, HANDOFF)
        self.warm_up, self.steps, self.prefills = (1, 2, 1) if dry else (WARM_UP, STEPS, PREFILLS)
        self.bandwidth = self.peak = float("nan")

    def measure_device(self) -> list[Row]:
        """Bytes read and written by a copy, and a product of random matrices."""
        num_bytes, side = (1 << 20, 64) if self.dry else (4 << 30, 8192)
        source = torch.randint(255, (num_bytes,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        copy_s = self._median(lambda: target.copy_(source), 10)
        dtype = getattr(torch, self.spec.dtype)
        a, b = (torch.randn(side, side, dtype=dtype, device=self.device) for _ in range(2))
        gemm_s = self._median(lambda: a @ b, 10)
        self.bandwidth, self.peak = 2 * num_bytes / copy_s, 2 * side**3 / gemm_s
        values = {"bandwidth, TB/s": self.bandwidth / 1e12, "GEMM, TFLOP/s": self.peak / 1e12}
        return [Row("device", "copy; bf16 product", values)]

    def baton(self, exact: bool = False) -> list[Row]:
        """Decode and prefill by our own layers."""
        name = "Baton, exact" if exact else "Baton"
        model = random_model(self.spec, self.device, exact)
        rows = []
        for num_rows, context in self.decodes:
            room = context + self.warm_up + self.steps + 16
            kv = random_pool(self.spec, num_rows * -(-room // 16) * 16, self.device)
            step = Decoding(model, kv, num_rows, context).step
            rows.append(self._decode_row(name, num_rows, context, step))
            del kv, step
        kv = random_pool(self.spec, self.prompt, self.device)
        batch = prompt_batch(self.spec, self.prompt, self.device)
        rows.append(self._prefill_row(name, lambda: model.forward(batch, kv)))
        return rows

    def transformers(self) -> list[Row]:
        """The same cells by transformers, with its static cache."""
        import transformers

        spec = self.spec
        config = transformers.LlamaConfig(
            vocab_size=spec.vocab_size, hidden_size=spec.hidden_size,
            intermediate_size=spec.intermediate_size, num_hidden_layers=spec.num_layers,
            num_attention_heads=spec.num_heads, num_key_value_heads=spec.num_kv_heads,
            max_position_embeddings=spec.max_position, rope_theta=spec.rope.theta,
            tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        dtype = getattr(torch, spec.dtype)
        with torch.device(self.device):
            torch.set_default_dtype(dtype)
            model = transformers.AutoModelForCausalLM.from_config(
                config, attn_implementation="sdpa"
            ).eval()
            torch.set_default_dtype(torch.float32)
        name = f"transformers {transformers.__version__}"
        rows = []
        for num_rows, context in self.decodes:
            length = context + self.warm_up + self.steps + 1
            cache = transformers.StaticCache(config=config, max_cache_len=length)
            step = self._peer_step(model, cache, num_rows, context)
            rows.append(self._decode_row(f"{name}, compiled", num_rows, context, step))
            torch.compiler.reset()
            del cache, step
        ids = torch.randint(spec.vocab_size, (1, self.prompt), device=self.device)

        def prefill() -> None:
            model(ids, use_cache=True, logits_to_keep=1)

        rows.append(self._prefill_row(f"{name}, sdpa", prefill))
        return rows

    def _peer_step(
        self, model: torch.nn.Module, cache: object, num_rows: int, context: int
    ) -> Callable[[], None]:
        """One greedy step over a cache whose first `context` positions are taken as filled."""
        # Dry, it is traced as it would be, but nothing is generated.
        how = {"backend": "eager"} if self.dry else {"mode": "reduce-overhead"}
        forward = torch.compile(model.forward, fullgraph=True, **how)
        ids = torch.zeros((num_rows, 1), dtype=torch.int64, device=self.device)
        # The prompt, in the cache's own way: this allocates it, too.
        prompt = torch.zeros((num_rows, context), dtype=torch.int64, device=self.device)
        model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        position = torch.full((1,), context, dtype=torch.int64, device=self.device)

        def step() -> None:
            logits = forward(
                ids, position_ids=position[None].expand(num_rows, 1), past_key_values=cache,
                use_cache=True,
            ).logits  # fmt: skip
            ids.copy_(logits[:, -1:].argmax(-1))
            position.add_(1)

        return step

    def handoff(self) -> list[Row]:
        values = measure_handoff(self.spec, self.handoff_tokens, self.device)
        return [Row("handoff", f"{self.handoff_tokens} tokens, two processes", values)]

    def _decode_row(
        self, engine: str, num_rows: int, context: int, step: Callable[[], object]
    ) -> Row:
        median = self._median(step, self.steps)
        spec = self.spec
        # One row of the embedding is read a token, so of the embedding nothing to speak of.
        weights = spec.num_parameters() - spec.vocab_size * spec.hidden_size
        read_bytes = weights * getattr(torch, spec.dtype).itemsize
        tokens = num_rows * (context + self.warm_up + self.steps / 2)
        kv_bytes = tokens * spec.kv_bytes_per_token()
        floor = max((read_bytes + kv_bytes) / self.bandwidth, 2 * weights * num_rows / self.peak)
        values = {"ms": 1e3 * median, "tok/s": num_rows / median, "of floor": floor / median}
        return Row("decode", f"B={num_rows}, context {context}: {engine}", values)

    def _prefill_row(self, engine: str, step: Callable[[], object]) -> Row:
        median = self._median(step, self.prefills)
        spec, length = self.spec, self.prompt
        embeddings = 2 * spec.vocab_size * spec.hidden_size
        flops = 2 * (spec.num_parameters() - embeddings) * length
        # Scores and weighted sums, over half of the square.
        flops += 2 * spec.num_layers * length**2 * spec.num_heads * spec.head_dim
        values = {
            "ms": 1e3 * median,
            "tok/s": length / median,
            "of GEMM peak": flops / self.peak / median,
        }
        return Row("prefill", f"{length} tokens: {engine}", values)

    def _median(self, step: Callable[[], object], num_steps: int) -> float:
        return float(np.median(seconds(step, num_steps, self.warm_up, self.device)))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("decode", "exact", "peers", "handoff")
    parser.add_argument("--part", action="append", choices=parts, help="default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    parser.add_argument("--dry", action="store_true", help="a tiny model on the CPU")
    args = parser.parse_args()
    bench = Bench(args.dry)
    measures: dict[str, Callable[[], list[Row]]] = {
        "device": bench.measure_device,
        "decode": bench.baton,  # and prefill
        "exact": lambda: bench.baton(exact=True),
        "peers": bench.transformers,
        "handoff": bench.handoff,
    }
    rows: list[Row] = []
    failed: dict[str, str] = {}
    for name in ("device", *(args.part or parts)):
        try:
            with torch.inference_mode():
                measured = measures[name]()
        except Exception as error:
            traceback.print_exc()
            failed[name] = f"{type(error).__name__}: {error}"
        else:
            print(render(measured), flush=True)
            rows += measured
        if not args.dry:
            torch.cuda.empty_cache()
    conditions = {
        "date": datetime.date.today().isoformat(),
        "device": "dry" if args.dry else torch.cuda.get_device_name(),
        "torch": str(torch.__version__),
        "failed": failed,
    }
    print(", ".join(f"{name} {value}" for name, value in conditions.items()))
    if args.json is not None:
        data = {"conditions": conditions, "rows": rows}
        args.json.write_bytes(msgspec.json.format(msgspec.json.encode(data), indent=2) + b"\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
