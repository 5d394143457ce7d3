"""What the twin is to be: workers, links, and how the gateway goes about it."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from baton.core.cost import CostModel, Link, Rest
from baton.core.life import HandoffPolicy
from baton.core.limits import SchedulerConfig
from baton.errors import ConfigError
from baton.twin.links import Port
from baton.twin.workload import TraceRequest
from baton.types import Role


class WorkerSetup(msgspec.Struct, frozen=True):
    """One worker. Workers of one `port` share a host.

    depth: steps in flight (see `core.in_flight`). copy: into and out of its own block store.
    rests: what a step takes longer that finds it idle.
    """

    worker_id: str
    role: Role
    limits: SchedulerConfig
    cost: CostModel
    depth: int = 1
    copy: Link = Link(10e9)
    port: str = ""
    rests: tuple[Rest, ...] = ()


class Deployment(msgspec.Struct, frozen=True):
    """A gateway with its workers. Durations in seconds.

    link: what a transfer between hosts costs beside its share of the ports' rates; bytes_per_s is
    not read. message_s: from gateway to worker and back, each way. detect_s: from a worker's
    death to the gateway's knowing of it; freeze_s: the same of one that stands still.
    """

    workers: tuple[WorkerSetup, ...]
    ports: Mapping[str, Port]
    policy: HandoffPolicy
    link: Link = Link(0.0)
    message_s: float = 0.0005
    request_timeout_s: float = 600.0
    max_queued_requests: int = 1024
    detect_s: float = 0.05
    freeze_s: float = 3.0
    restart_s: float = 10.0

    def check(self) -> None:
        """Refuse what no gateway could serve with.

        Raises:
            ConfigError: it names what is missing.
        """
        if not self.workers:
            raise ConfigError("the deployment has no workers: give a layout such as 1U or 1P1D")
        names = [worker.worker_id for worker in self.workers]
        if len(set(names)) < len(names):
            raise ConfigError("two workers have one name: give each its own")
        roles = {worker.role for worker in self.workers}
        if Role.UNIFIED not in roles and roles != {Role.PREFILL, Role.DECODE}:
            raise ConfigError(
                "prefill workers need decode workers, and the other way round: give both, or "
                "unified ones"
            )
        for worker in self.workers:
            if worker.port not in self.ports:
                raise ConfigError(
                    f"{worker.worker_id} is on port {worker.port!r}, which has no rate"
                )

    def refuses(self, request: TraceRequest) -> str | None:
        """Why no worker could ever take this request; None if it can be served."""
        able: set[Role] = set()
        reasons = []
        for worker in self.workers:
            reason = _refusal(worker, request)
            if reason is None:
                able.add(worker.role)
            else:
                reasons.append(f"{worker.worker_id}: {reason}")
        served = Role.UNIFIED in able or {Role.PREFILL, Role.DECODE} <= able
        return None if served else reasons[0]


def _refusal(worker: WorkerSetup, request: TraceRequest) -> str | None:
    limits = worker.limits
    if request.num_prompt_tokens >= limits.max_model_len:
        return (
            f"its prompt has {request.num_prompt_tokens} tokens and model.max_model_len is "
            f"{limits.max_model_len}: raise that, or leave such requests out"
        )
    longest = min(request.num_prompt_tokens + request.num_output_tokens, limits.max_model_len)
    needed = limits.num_blocks_for(longest)
    if needed > limits.num_blocks:
        return (
            f"its {longest} tokens need {needed} KV blocks and a worker has {limits.num_blocks}: "
            "raise engine.kv_cache_bytes, or leave such requests out"
        )
    frames = limits.num_blocks_for(request.num_prompt_tokens)
    if worker.role is Role.PREFILL and frames > limits.num_frames:
        return (
            f"its prompt needs {frames} frames of the block store and a worker has "
            f"{limits.num_frames}: raise store.max_bytes, or leave such requests out"
        )
    return None
