"""From the steps that an engine measured on the machine at hand to a profile.

`step_grid` says which steps to measure: decode batches, prompt chunks and both together, each at
several contexts. `engine.profiling` runs them. `fit_profile` fits the cost model and keeps the
error on shapes that the fit had not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import scipy.optimize

from baton.core.cost import ChunkShape, Coefficients, ModelShape, Profile, Rest, StepCost, StepShape
from baton.errors import ConfigError
from baton.planner.calibrate import Observation, cross_validate, fit_steps

DECODE_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
CHUNKS = (8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 2048)
CONTEXT_SHARES = (0.0, 0.2, 0.45, 0.7, 0.95)
FREE: dict[str, float | None] = {
    "flops_per_s": None,
    "weight_bytes_per_s": None,
    "attention_flops_per_s": None,
    "kv_bytes_per_s": None,
    "sharpness": 0.7,
    # One model does not tell these two apart: most of it is the layers'.
    "step_s": 1.0,
    "layer_s": None,
    "sequence_s": None,
    "sample_s": None,
}
MIN_STEPS = 12

Step = tuple[str, tuple[ChunkShape, ...]]
"""A kind (`decode`, `prefill`, `mixed`) and the chunks of a step."""


class StepTime(msgspec.Struct, frozen=True):
    """A step of the grid and its median time, in seconds."""

    kind: str
    chunks: tuple[ChunkShape, ...]
    seconds: float


class Policy(msgspec.Struct, frozen=True):
    """What a worker does beside the step itself, for so many decoding sequences."""

    num_seqs: int
    seconds: float


class Measured(msgspec.Struct, frozen=True):
    """All that was measured on one machine with one model. block_*: of the KV pool."""

    engine: str
    device: str
    model: ModelShape
    steps: tuple[StepTime, ...]
    policy: tuple[Policy, ...]
    export_s: float
    import_s: float
    block_size: int
    block_bytes: int
    date: str
    rests: tuple[Rest, ...] = ()
    notes: str = ""


def step_grid(
    max_context: int, max_num_seqs: int, max_num_batched_tokens: int, pool_tokens: int,
    block_size: int,
) -> list[Step]:  # fmt: skip
    """Steps that the engine may be given, spread over what it can take.

    max_context: longest sequence in tokens. pool_tokens: KV that fits.

    Raises:
        ConfigError: the limits leave too few.
    """
    limit = min(max_num_seqs, max_num_batched_tokens)
    batches = [batch for batch in DECODE_BATCHES if batch <= limit]
    chunks = [chunk for chunk in CHUNKS if chunk <= max_num_batched_tokens]
    contexts = [int(share * max_context) for share in CONTEXT_SHARES]
    steps: list[Step] = [
        ("decode", (ChunkShape(1, max(context, 8), True),) * batch)
        for batch in batches
        for context in contexts
    ]
    for i, chunk in enumerate(chunks):
        for context in contexts:
            # Not the last chunk of a prompt every third time: it draws nothing.
            steps.append(("prefill", (ChunkShape(chunk, context, (i + len(steps)) % 3 > 0),)))
    for batch in (1, 4, 16):
        for chunk in (32, 128, 512):
            for context in contexts[1::2]:
                decodes = (ChunkShape(1, max(context, 8), True),) * batch
                steps.append(("mixed", (ChunkShape(chunk, context // 2, True), *decodes)))

    def fits(chunks: tuple[ChunkShape, ...]) -> bool:
        ends = [chunk.context + chunk.num_tokens for chunk in chunks]
        blocks = sum(-(-end // block_size) for end in ends)
        tokens = sum(chunk.num_tokens for chunk in chunks)
        seqs = len(chunks) <= max_num_seqs and tokens <= max_num_batched_tokens
        return seqs and max(ends) <= max_context and blocks * block_size <= pool_tokens

    found = list(dict.fromkeys(step for step in steps if fits(step[1])))
    if len(found) < MIN_STEPS:
        raise ConfigError(
            f"only {len(found)} kinds of steps fit into {pool_tokens} tokens of KV and contexts of "
            f"{max_context}: raise engine.kv_cache_bytes or model.max_model_len"
        )
    return found


def fit_profile(measured: Measured) -> Profile:
    """Fit, and cross-validate over shapes.

    Raises:
        ConfigError: too little was measured.
    """
    observations = [
        Observation(StepShape.of(step.chunks), step.seconds, step.kind, (step.kind, step.chunks))
        for step in measured.steps
    ]
    if len(observations) < MIN_STEPS:
        raise ConfigError(
            f"{len(observations)} steps are too few to fit: give --seconds more, or a smaller model"
        )
    start = _start(measured, observations)

    def predictor(seen: Sequence[Observation]) -> Callable[[Observation], float]:
        cost = Profile("", "", measured.model, fit(seen), (), "", "", True).cost()
        return lambda step: cost.step_s(step.shape)

    def fit(seen: Sequence[Observation]) -> Coefficients:
        return fit_steps(seen, start, FREE, measured.model)

    errors = cross_validate(observations, predictor)
    rates = fit(observations)
    fixed_s, each_s = _line(measured.policy)
    rates = msgspec.structs.replace(
        rates, step_s=rates.step_s + fixed_s, sequence_s=rates.sequence_s + each_s
    )
    return Profile(
        engine=measured.engine,
        device=measured.device,
        model=measured.model,
        coefficients=rates,
        held_out=tuple(errors),
        source="baton profile",
        date=measured.date,
        measured=True,
        fits=tuple(FREE),
        notes=measured.notes,
        block_size=measured.block_size,
        block_bytes=measured.block_bytes,
        export_s=measured.export_s,
        import_s=measured.import_s,
        rests=measured.rests,
    )


def check_profile(profile: Profile, steps: Sequence[StepTime]) -> list[tuple[StepTime, float]]:
    """Each step with what the profile predicts for it, in seconds."""
    cost: StepCost = profile.cost()
    return [(step, cost.step_s(StepShape.of(step.chunks))) for step in steps]


def _start(measured: Measured, observations: Sequence[Observation]) -> Coefficients:
    """A first guess from the shortest and the longest step."""
    model = measured.model
    weights = model.dense_weights + model.vocab_size * model.hidden_size
    least = min(observations, key=lambda step: step.seconds)
    most = max(observations, key=lambda step: step.shape.num_tokens / step.seconds)
    flops_per_s = 2 * model.dense_weights * most.shape.num_tokens / most.seconds
    bytes_per_s = 2 * weights * model.weight_bytes / least.seconds
    return Coefficients(
        flops_per_s=1.5 * flops_per_s,
        weight_bytes_per_s=bytes_per_s,
        attention_flops_per_s=0.5 * flops_per_s,
        kv_bytes_per_s=bytes_per_s,
        step_s=0.1 * least.seconds,
        layer_s=0.2 * least.seconds / model.num_layers,
        sequence_s=0.01 * least.seconds,
        sample_s=0.01 * least.seconds,
    )


def _line(policy: Sequence[Policy]) -> tuple[float, float]:
    """(seconds a step, seconds a sequence), neither below zero."""
    if not policy:
        return 0.0, 0.0
    sides = np.array([[1.0, each.num_seqs] for each in policy])
    times = np.array([each.seconds for each in policy])
    weights = 1 / np.maximum(times, 1e-9)
    (fixed_s, each_s), _ = scipy.optimize.nnls(sides * weights[:, None], times * weights)
    return float(fixed_s), float(each_s)
