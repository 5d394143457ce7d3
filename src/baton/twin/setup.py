"""From a configuration and measured costs to a deployment, as `baton serve` would start it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from baton.config import Config, Layout
from baton.core.codec_choice import RAW
from baton.core.cost import Link, ModelShape, Profile, model_shape
from baton.core.life import HandoffPolicy
from baton.core.limits import SchedulerConfig
from baton.errors import ConfigError
from baton.model_spec import load_model_spec
from baton.twin.deployment import Deployment, WorkerSetup
from baton.twin.links import Port
from baton.twin.prompts import VOCAB_SIZE
from baton.types import KvFormat, Role

COPY_BYTES_PER_S = 10e9
"""Of a worker's copies into its store, where the profile does not say."""
MESSAGE_S = 0.0005
HOST = "host"


def deployment(
    config: Config,
    profiles: Mapping[Role, Profile],
    *,
    longest: int,
    link: Link | None = None,
    message_s: float = MESSAGE_S,
) -> Deployment:
    """Workers of `launch.layout`, each with the cost model of its role's profile.

    longest: prompt and output of the longest request, which is the model's length where nothing
    else says. link: between workers, each on a host of its own; None: all are on one host, and
    blocks go through its memory.

    Raises:
        ConfigError: something that the twin must know is not said; it names the field.
    """
    counts = Layout.parse(config.launch.layout).counts()
    workers = []
    for role, count in counts.items():
        if role not in profiles:
            raise ConfigError(
                f"{role.value} workers have no profile: give --profile FILE for all, or "
                f"--profile {role.value}=FILE"
            )
        profile = profiles[role]
        limits = _limits(config, profile, longest)
        copy_s = profile.export_s
        copy = Link(1e15, per_block_s=copy_s) if copy_s else Link(COPY_BYTES_PER_S)
        for number in range(count):
            worker_id = f"{role.value}-{number}"
            workers.append(
                WorkerSetup(
                    worker_id,
                    role,
                    limits,
                    profile.cost(_shape(config, profile)),
                    depth=2 if config.engine.device == "cuda" else 1,
                    copy=copy,
                    port=HOST if link is None else worker_id,
                    rests=profile.rests,
                )
            )
    import_s = max((profiles[role].import_s for role in counts), default=0.0)
    if link is None:
        ports = {HOST: Port(COPY_BYTES_PER_S, COPY_BYTES_PER_S if not import_s else 1e15)}
        between = Link(0.0, per_block_s=import_s)
    else:
        if not link.bytes_per_s > 0:
            raise ConfigError(f"the link has {link.bytes_per_s:g} bytes/s: give it a rate above 0")
        ports = {worker.worker_id: Port(link.bytes_per_s) for worker in workers}
        between = link
    policy = HandoffPolicy(config.store.lease_ttl_s, fetch_early=config.fabric.fetch_early)
    return Deployment(
        tuple(workers),
        ports,
        policy,
        between,
        message_s=message_s,
        request_timeout_s=config.gateway.request_timeout_s,
        max_queued_requests=config.gateway.max_queued_requests,
    )


def _shape(config: Config, profile: Profile) -> ModelShape:
    """The model that is configured, if its directory is here; else the one that was measured."""
    if config.model.path and Path(config.model.path).is_dir():
        dtype = None if config.model.dtype == "auto" else config.model.dtype
        return model_shape(load_model_spec(Path(config.model.path)), config.model.name, dtype)
    return profile.model


def _limits(config: Config, profile: Profile, longest: int) -> SchedulerConfig:
    """As `engine.build` works them out, but for the memory that is free: nobody is there to ask."""
    engine, model = config.engine, _shape(config, profile)
    block_bytes = max(1, round(model.kv_bytes_per_token * engine.block_size))
    max_model_len = config.model.max_model_len or longest + 1
    num_blocks = engine.num_kv_blocks
    if num_blocks is None:
        if engine.kv_cache_bytes is None:
            raise ConfigError(
                "the twin cannot look how much memory a worker has: set engine.kv_cache_bytes or "
                "engine.num_kv_blocks"
            )
        useful = engine.max_num_seqs * -(-max_model_len // engine.block_size)
        num_blocks = min(useful, engine.kv_cache_bytes // block_bytes)
    if num_blocks < 2:
        raise ConfigError(
            f"the KV pool would have {num_blocks} blocks of {block_bytes} bytes: "
            "raise engine.kv_cache_bytes"
        )
    return SchedulerConfig(
        kv_format=KvFormat(
            engine.block_size,
            config.model.dtype,
            model.num_layers,
            model.num_kv_heads,
            model.head_dim,
            block_bytes,
            RAW,
        ),
        num_blocks=num_blocks,
        num_frames=config.store.max_bytes // block_bytes,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        max_model_len=max_model_len,
        vocab_size=VOCAB_SIZE,
        fingerprint=model.name.encode(),
        numerics="twin",
        prefix_cache=engine.prefix_cache,
        lease_ttl_s=config.store.lease_ttl_s,
        keep_blocks=config.store.keep_blocks and engine.prefix_cache,
    )
