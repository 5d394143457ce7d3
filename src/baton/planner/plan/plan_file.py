"""A candidate as the configuration that `baton serve` runs, and as the file that says so."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from baton.config import (
    Config,
    EngineConfig,
    LaunchConfig,
    ModelConfig,
    PlanConfig,
    StoreConfig,
)
from baton.config.sections import FabricConfig
from baton.planner.plan.bounds import MAX_SEQS
from baton.planner.plan.candidates import Candidate
from baton.types import Role

STORE_BYTES = 8 << 30
STORED_PROMPTS = 16
"""Of the longest kind, that a block store has room for."""
MAX_KL = 0.01


def needs(candidate: Candidate) -> str | None:
    """What Baton cannot run today of this candidate, as a sentence's end; None if it can."""
    reasons: list[str] = []
    kinds = [kind for kind, _ in candidate.workers.values()]
    model = kinds[0].model
    if any(kind.parallel.tensor > 1 for kind in kinds):
        reasons.append("tensor parallelism")
    if any(kind.parallel.pipeline > 1 for kind in kinds):
        reasons.append("pipeline parallelism")
    if model.is_moe or model.kv_elements:
        reasons.append("mixture of experts" if model.is_moe else "latent attention")
    if model.weight_bytes < 2:
        reasons.append("quantised weights")
    reasons += [
        f"workers on {kind.offer.name}"
        for kind in {each.offer.name: each for each in kinds}.values()
        if kind.offer.device.kind not in ("gpu", "cpu")
    ]
    devices = candidate.devices()
    if len(devices) > 1:
        reasons.append(f"unlike devices in one layout ({' and '.join(devices)})")
    elif candidate.num_devices > (node := kinds[0].offer.device.devices_per_node):
        reasons.append(f"{candidate.num_devices} devices where a machine has {node}")
    return "; ".join(reasons) or None


def config_of(candidate: Candidate, longest: int, model_path: str = "") -> Config:
    """What to serve with. longest: tokens of prompt and output that a request may have."""
    kinds = [kind for kind, _ in candidate.workers.values()]
    per_token = kinds[0].model.kv_bytes_per_token
    on_cpu = all(kind.offer.device.kind == "cpu" for kind in kinds)
    lossy = candidate.way is not None and candidate.way.codec != "raw"
    return Config(
        model=ModelConfig(path=model_path, max_model_len=longest + 1),
        engine=EngineConfig(
            device="cpu" if on_cpu else "cuda",
            kv_cache_bytes=int(min(kind.kv_tokens for kind in kinds) * per_token),
            max_num_seqs=MAX_SEQS,
            max_num_batched_tokens=candidate.budget,
        ),
        store=StoreConfig(max_bytes=max(STORE_BYTES, int(STORED_PROMPTS * longest * per_token))),
        fabric=FabricConfig(max_kl=MAX_KL if lossy else 0.0),
        launch=LaunchConfig(layout=str(candidate.layout), needs=needs(candidate)),
    )


def plan_yaml(
    candidate: Candidate, longest: int, model_path: str, remarks: Sequence[str] = (),
    assumed: PlanConfig | None = None,
) -> str:  # fmt: skip
    """The file: remarks as comments, then what differs from the defaults, what was assumed last."""
    import yaml

    config, default = config_of(candidate, longest, model_path), Config()
    config = msgspec.structs.replace(config, plan=assumed or PlanConfig())
    tree: dict[str, dict[str, object]] = {}
    for section in msgspec.structs.fields(Config):
        mine, theirs = getattr(config, section.name), getattr(default, section.name)
        changed = {
            field.name: value
            for field in msgspec.structs.fields(mine)
            if (value := getattr(mine, field.name)) != getattr(theirs, field.name)
        }
        if changed:
            tree[section.name] = changed
    lines = [f"# {line}" for line in ("Written by baton plan.", *remarks, *_hardware(candidate))]
    return "\n".join(lines) + "\n" + yaml.safe_dump(tree, sort_keys=False, width=1 << 30)


def _hardware(candidate: Candidate) -> list[str]:
    lines = []
    for role in (Role.PREFILL, Role.DECODE, Role.UNIFIED):
        if role in candidate.workers:
            kind, count = candidate.workers[role]
            lines.append(
                f"{role.value}: {count} x {kind.name}, {kind.kv_tokens:,} tokens of KV each"
            )
    if candidate.way is not None:
        lines.append(f"between workers: {candidate.way.name}")
    return lines
