"""What is measured, and the least time that it can take on this machine.

    roofline: time ≥ max(bytes / bandwidth, FLOP / peak)

Bytes are the weights, once a step, and the KV that a step reads; FLOP are those of the matrix
products and of attention. The input embedding is looked up, not multiplied, and the vocabulary's
projection is due for a prompt's last token only.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from baton.model_spec import ModelSpec

NUM_STEPS = 32
WEIGHT_BYTES = 2


class Cell(msgspec.Struct, frozen=True):
    """One measurement; what its seconds mean depends on `kind`.

    decode: of one step in which `batch` sequences, `context` tokens long at first, get a token;
    the mean of `steps`. prefill: from a prompt of `context` tokens to its first token. mixed: all
    of `steps` steps of `batch` sequences, and `arrivals` prompts of `arrival_tokens` tokens, each
    to its first token, that come while they run. burst: `batch` prompts of `context` tokens at
    once, until each has `steps` tokens.
    """

    name: str
    kind: Literal["decode", "prefill", "mixed", "burst"]
    batch: int = 1
    context: int = 128
    steps: int = NUM_STEPS
    arrivals: int = 0
    arrival_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens whose rate the table shows, in the time that is measured."""
        if self.kind == "prefill":
            return self.context
        if self.kind == "decode":
            return self.batch
        return self.batch * self.steps + self.arrivals * self.arrival_tokens

    @property
    def num_kv_tokens(self) -> int:
        """Most tokens in the KV cache at once, with room for an engine's unmeasured steps."""
        return self.batch * (self.context + self.steps + 96) + self.arrivals * self.arrival_tokens


def decode(batch: int, context: int = 128) -> Cell:
    name = f"decode B={batch}" + (f" context {context}" if context != 128 else "")
    return Cell(name=name, kind="decode", batch=batch, context=context)


def prefill(num_tokens: int) -> Cell:
    return Cell(name=f"prefill {num_tokens}", kind="prefill", context=num_tokens, steps=1)


MIXED = Cell(
    name="mixed 32 + 4 x 512", kind="mixed", batch=32, arrivals=4, arrival_tokens=512
)  # fmt: skip
CELLS = {
    cell.name.replace("decode B=", "d").replace("prefill ", "p").replace(" context ", "c"): cell
    for cell in [
        *(decode(batch) for batch in (1, 8, 32, 64)),
        decode(8, 4096),
        *(prefill(num_tokens) for num_tokens in (128, 512, 2048)),
    ]
} | {"mixed": MIXED}
"""By the name that `--cells` takes: d1, d8, d32, d64, d8c4096, p128, p512, p2048, mixed."""


class Cost(msgspec.Struct, frozen=True):
    """The least that a cell must move and compute."""

    bytes: float
    flops: float

    def floor_s(self, bytes_per_s: float, flops_per_s: float) -> float:
        return max(self.bytes / bytes_per_s, self.flops / flops_per_s)


def cost(cell: Cell, spec: ModelSpec) -> Cost:
    """What `cell` costs at least; of a burst, all of its prompts and all of its steps."""
    prompt = _prefill(spec, cell.context)
    step = _step(spec, cell.batch, cell.context + cell.steps / 2)
    if cell.kind == "prefill":
        return prompt
    if cell.kind == "decode":
        return step
    arrival = _prefill(spec, cell.arrival_tokens)
    # Prompts may ride in the steps that read the weights anyhow: only their own KV is extra.
    num_prompts, flops = cell.arrivals, arrival.flops
    if cell.kind == "burst":
        num_prompts, flops = cell.batch, prompt.flops
    return Cost(cell.steps * step.bytes, cell.steps * step.flops + num_prompts * flops)


def _prefill(spec: ModelSpec, num_tokens: int) -> Cost:
    layers = 2 * _layer_weights(spec) * num_tokens
    attention = _attention_flops(spec) * num_tokens**2 / 2
    weights = WEIGHT_BYTES * (_layer_weights(spec) + _head_weights(spec))
    return Cost(weights, layers + 2 * _head_weights(spec) + attention)


def _step(spec: ModelSpec, batch: int, context: float) -> Cost:
    weights = _layer_weights(spec) + _head_weights(spec)
    kv = batch * context * spec.kv_bytes_per_token()
    flops = batch * (2 * weights + _attention_flops(spec) * context)
    return Cost(WEIGHT_BYTES * weights + kv, flops)


def _layer_weights(spec: ModelSpec) -> int:
    """Of the matrices in all layers; norms and biases are too small to count."""
    width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    attention = spec.hidden_size * (width + spec.num_heads * spec.head_dim)
    return spec.num_layers * (attention + 3 * spec.hidden_size * spec.intermediate_size)


def _head_weights(spec: ModelSpec) -> int:
    return spec.vocab_size * spec.hidden_size


def _attention_flops(spec: ModelSpec) -> int:
    """Per query token and token of context: a product with K and one with V."""
    return 4 * spec.num_layers * spec.num_heads * spec.head_dim
