"""From a configuration to an engine that is ready to step."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from baton.config import Config, format_cpus
from baton.core.codec_choice import CodecFigures
from baton.core.decision_log import LoggedScheduler, Sink
from baton.core.lease import LeaseTable
from baton.core.limits import SchedulerConfig
from baton.core.scheduler import Scheduler
from baton.core.store_index import StoreIndex
from baton.engine.engine import Emitted, Engine
from baton.engine.runner import TorchRunner
from baton.errors import ConfigError
from baton.fabric.calibration import codec_figures, load_calibration
from baton.model.attention import NUMERICS
from baton.model.bodies import Body, TritonKernels, choose_body
from baton.model.checkpoint import Progress
from baton.model.kv_cache import KvCache, kv_block_bytes
from baton.model.loader import load_weights
from baton.model.native import Kernels
from baton.model.packed import load_packed
from baton.model.region import release
from baton.model.transformer import Transformer
from baton.model_spec import ModelSpec, load_model_spec
from baton.types import KvFormat

logger = logging.getLogger(__name__)

HOST_KV_SHARE = 1 / 8
"""Of the host memory that is free at start: several workers and their stores share a host."""
DEVICE_KV_SHARE = 0.85
"""Of the device memory that is free once the weights are there."""


class EngineLimits(msgspec.Struct, frozen=True):
    """What the configuration came to on this machine, with this model."""

    device: str
    dtype: str
    cpus: str
    threads: int
    max_model_len: int
    num_blocks: int
    num_frames: int
    block_bytes: int


class LoadedModel(msgspec.Struct, frozen=True):
    """A model that is ready to run. `numerics` names what its results may be mixed with."""

    spec: ModelSpec
    model: Transformer
    kernels: Body
    device: str
    dtype: str
    fingerprint: bytes
    numerics: str


class Built(msgspec.Struct, frozen=True):
    """An engine and what others must know of it."""

    engine: Engine
    limits: EngineLimits
    scheduler_config: SchedulerConfig
    spec: ModelSpec


def build_engine(
    config: Config,
    model_dir: Path,
    emit: Callable[[Emitted], None],
    *,
    worker_id: str,
    epoch: int,
    lease_secret: bytes,
    with_store: bool = True,
    weights_fd: int | None = None,
    progress: Progress | None = None,
    decision_sink: Sink | None = None,
) -> Built:
    """Load the model and lay out the KV pool. The fabric is the caller's to attach.

    Args:
        weights_fd: memfd in which the workers of this host share packed weights.

    Raises:
        ModelError: the checkpoint cannot be served.
        ConfigError: the limits do not fit the model or the machine.
    """
    loaded = load_model(config, model_dir, weights_fd, progress)
    spec, device, dtype = loaded.spec, loaded.device, loaded.dtype
    limits = resolve_limits(config, spec, device, dtype, with_store)
    kv_format = KvFormat(
        block_size=config.engine.block_size,
        dtype=dtype,
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        block_bytes=limits.block_bytes,
    )
    scheduler_config = SchedulerConfig(
        kv_format=kv_format,
        num_blocks=limits.num_blocks,
        num_frames=limits.num_frames,
        max_num_seqs=config.engine.max_num_seqs,
        max_num_batched_tokens=config.engine.max_num_batched_tokens,
        max_model_len=limits.max_model_len,
        vocab_size=spec.vocab_size,
        fingerprint=loaded.fingerprint,
        numerics=loaded.numerics,
        prefix_cache=config.engine.prefix_cache,
        lease_ttl_s=config.store.lease_ttl_s,
        keep_blocks=config.store.keep_blocks and with_store and config.engine.prefix_cache,
        codecs=_codecs(loaded.fingerprint, kv_format) if config.serves_blocks_over_tcp else (),
        max_kl=config.fabric.max_kl,
    )
    index = StoreIndex(limits.num_frames)
    leases = LeaseTable(worker_id, epoch, lease_secret, index)
    scheduler = (
        Scheduler(scheduler_config, leases, index)
        if decision_sink is None
        else LoggedScheduler(scheduler_config, leases, index, decision_sink)
    )
    kv = KvCache(spec, limits.num_blocks, config.engine.block_size, dtype, device)
    draws = loaded.kernels if isinstance(loaded.kernels, Kernels) else None
    runner = TorchRunner(loaded.model, kv, device, kernels=draws)
    for name, value in msgspec.structs.asdict(limits).items():
        logger.info("engine %s=%s", name, value)
    loaded.model.prepare(kv, config.engine.max_num_seqs)
    logger.info("engine kernels=%s", _describe(loaded.kernels))
    return Built(Engine(scheduler, runner, kv, emit), limits, scheduler_config, spec)


def load_model(
    config: Config,
    model_dir: Path,
    weights_fd: int | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """The model alone, on the device and in the type that `config` asks for.

    Raises:
        ModelError: the checkpoint cannot be served.
        ConfigError: what was asked for cannot be had here.
    """
    spec = load_model_spec(model_dir)
    device = _device(config)
    dtype = spec.dtype if config.model.dtype == "auto" else config.model.dtype
    if config.engine.threads is not None:
        torch.set_num_threads(config.engine.threads)
    kernels = choose_body(config.engine.kernels, spec, dtype, device)
    if isinstance(kernels, Kernels):
        packed = load_packed(model_dir, spec, dtype, kernels, weights_fd, progress)
        fingerprint, model = packed.fingerprint, Transformer(spec, packed)
    else:
        if weights_fd is not None:
            release(weights_fd)
        weights = load_weights(model_dir, spec, dtype, device, progress)
        fingerprint, model = weights.fingerprint, Transformer(spec, weights, kernels)
    numerics = f"{device}-{NUMERICS if kernels is None else kernels.numerics}-{dtype}"
    return LoadedModel(spec, model, kernels, device, dtype, fingerprint, numerics)


def resolve_limits(
    config: Config, spec: ModelSpec, device: str, dtype: str, with_store: bool
) -> EngineLimits:
    """Work out the sizes. Call it when the weights are loaded, so that free memory is what is left.

    The pool takes `kv_cache_bytes`, or an eighth of the free host memory (85 % of the free memory
    of a GPU), but never more than `max_num_seqs` sequences of full length could use.

    Raises:
        ConfigError: naming the field to change.
    """
    engine = config.engine
    block_bytes = kv_block_bytes(spec, engine.block_size, dtype)
    max_model_len = config.model.max_model_len or spec.max_position
    if max_model_len > spec.max_position:
        raise ConfigError(
            f"model.max_model_len {max_model_len} exceeds the {spec.max_position} positions that "
            "the model was made for: lower it"
        )
    num_blocks = engine.num_kv_blocks
    if num_blocks is None:
        useful = engine.max_num_seqs * -(-max_model_len // engine.block_size)
        budget = engine.kv_cache_bytes or _default_kv_bytes(device)
        num_blocks = min(useful, budget // block_bytes)
    if num_blocks < 2:
        raise ConfigError(
            f"the KV pool would have {num_blocks} blocks of {block_bytes} bytes: "
            "raise engine.kv_cache_bytes"
        )
    return EngineLimits(
        device=device,
        dtype=dtype,
        cpus=format_cpus(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(),
        max_model_len=max_model_len,
        num_blocks=num_blocks,
        num_frames=config.store.max_bytes // block_bytes if with_store else 0,
        block_bytes=block_bytes,
    )


def _codecs(fingerprint: bytes, kv_format: KvFormat) -> tuple[CodecFigures, ...]:
    """What is known of the codecs in which blocks may come over a wire."""
    return tuple(codec_figures(kv_format, load_calibration(fingerprint, kv_format)))


def _describe(kernels: Body) -> str:
    if kernels is None:
        return "torch (inexact: results vary in the last bits with the batch)"
    if isinstance(kernels, TritonKernels):
        kind = "exact: the batch changes no bit" if kernels.exact else "inexact, as torch's are"
        return f"triton version={kernels.triton} device={kernels.device} ({kind})"
    return f"native isa={kernels.isa} (exact: the batch changes no bit)"


def _device(config: Config) -> str:
    if config.engine.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("engine.device is cuda, but torch finds no CUDA device here")
    if config.engine.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.engine.device


def _default_kv_bytes(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0] * DEVICE_KV_SHARE)
    with open("/proc/meminfo") as meminfo:
        for line in meminfo:
            if line.startswith("MemAvailable:"):
                return int(int(line.split()[1]) * 1024 * HOST_KV_SHARE)
    return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * HOST_KV_SHARE)
