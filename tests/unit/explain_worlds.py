"""A run whose every cost is known, with the decision logs that a server would have written.

The twin itself serves, its schedulers and router with a pen in hand: so what another placement
would have done can be looked up, by serving the same with that placement.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from baton.core import decision_log as log
from baton.core.keys import extend_chain
from baton.core.router import Pair, Router
from baton.observe.results import RequestResult
from baton.twin import gateway as gateway_module
from baton.twin import node as node_module
from baton.twin.deployment import Deployment
from baton.twin.simulator import Simulator
from baton.twin.workload import TraceRequest, Uniform, poisson, synthetic


def chat(num_requests: int = 40, rate: float = 6.0, seed: int = 4) -> list[TraceRequest]:
    """Prompts of some blocks, a few of which are shared."""
    rng = random.Random(seed)
    lengths = Uniform(100, 400), Uniform(8, 40)
    plain = synthetic(poisson(rate, rng), *lengths, rng, num_requests=num_requests)
    return [
        TraceRequest(
            each.arrival_s,
            each.num_prompt_tokens,
            each.num_output_tokens,
            blocks=(rng.randrange(3), *(1000 * i + j for j in range(3))),
            block_size=16,
        )
        for i, each in enumerate(plain)
    ]


def serve_logged(
    monkeypatch: pytest.MonkeyPatch,
    directory: Path,
    deployment: Deployment,
    trace: Sequence[TraceRequest],
    **options: Any,
) -> list[RequestResult]:
    """Serve, and write `gateway.log` and a log for each start of a worker."""
    written: dict[str, list[bytes]] = {"gateway": []}

    def scheduler(
        config: Any, leases: Any, index: Any, extend: Any, **_: Any
    ) -> log.LoggedScheduler:
        parts = written.setdefault(f"{leases.source}-{leases.epoch}", [])
        return log.LoggedScheduler(config, leases, index, parts.append)

    with monkeypatch.context() as patched:
        patched.setattr(node_module, "Scheduler", scheduler)
        patched.setattr(gateway_module, "extend_names", extend_chain)
        router = log.LoggedRouter("gateway", written["gateway"].append)
        results = Simulator(deployment, trace, router=router, **options).run().requests
    directory.mkdir(exist_ok=True)
    for name, parts in written.items():
        (directory / f"{name}.log").write_bytes(b"".join(parts))
    return results


def serve_pinned(
    deployment: Deployment, trace: Sequence[TraceRequest], pinned: Mapping[tuple[str, int], Pair]
) -> list[RequestResult]:
    """What really happens if these requests go there."""
    return Simulator(deployment, trace, router=Router(pinned)).run().requests


def rewrite(file: Path, change: Any) -> None:
    """Write a log anew, each record as `change` makes it; None leaves it out."""
    header, records = log.read(file.read_bytes())
    changed = [header, *(made for each in records if (made := change(each)) is not None)]
    file.write_bytes(b"".join(map(log.frame, changed)))
