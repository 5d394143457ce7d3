"""Small deployments for tests of the twin."""

from __future__ import annotations

from typing import Any

from baton.core.cost import StepShape
from baton.core.life import HandoffPolicy
from baton.core.limits import SchedulerConfig
from baton.twin.deployment import Deployment, WorkerSetup
from baton.twin.links import Port
from baton.twin.prompts import VOCAB_SIZE
from baton.types import KvFormat, Role

BLOCK_BYTES = 1 << 20


class Linear:
    """10 ms a step and 0.1 ms a token."""

    def step_s(self, shape: StepShape) -> float:
        return 0.01 + 1e-4 * shape.num_tokens


def limits(**changes: Any) -> SchedulerConfig:
    fields: dict[str, Any] = {
        "kv_format": KvFormat(16, "bfloat16", 2, 2, 64, BLOCK_BYTES),
        "num_blocks": 400,
        "num_frames": 200,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 256,
        "max_model_len": 4096,
        "vocab_size": VOCAB_SIZE,
        "fingerprint": b"test",
        "numerics": "twin",
    }
    return SchedulerConfig(**fields | changes)


def deployment(
    prefill: int = 0,
    decode: int = 0,
    unified: int = 0,
    *,
    depth: int = 1,
    port: Port | None = None,
    policy: HandoffPolicy | None = None,
    fields: dict[str, Any] | None = None,
    **changes: Any,
) -> Deployment:
    """Workers of each role, every one on a host of its own; `changes` are of their limits."""
    counts = {Role.PREFILL: prefill, Role.DECODE: decode, Role.UNIFIED: unified}
    names = [(f"{role.value}-{i}", role) for role, count in counts.items() for i in range(count)]
    workers = tuple(
        WorkerSetup(name, role, limits(**changes), Linear(), depth=depth, port=name)
        for name, role in names
    )
    ports = {name: port or Port(1e9) for name, _ in names}
    return Deployment(workers, ports, policy or HandoffPolicy(10.0), **fields or {})
