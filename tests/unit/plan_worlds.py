"""Made-up hardware and traffic for tests of the planner: rates are round, so answers are known."""

from __future__ import annotations

from typing import Any

import msgspec

from baton.core.cost import Coefficients, HeldOut, Link, ModelShape, Power, Profile
from baton.observe.slo import Slo
from baton.planner.hardware import Device
from baton.planner.plan.candidates import Candidate, Way
from baton.planner.plan.kinds import Kind, Offer, kinds
from baton.planner.plan.rows import Wish
from baton.planner.plan.search import Space
from baton.twin.workload import TraceRequest
from baton.types import Role

# 15 heads: no tensor parallelism, which would blur what the tests look at.
MODEL = ModelShape("toy", 4, 1024, 15, 5, 64, 4096, 32000)
LINK = Link(1e9)
RATIOS = (0.9, 1.0, 1.1)


def device(name: str, **changes: Any) -> Device:
    fields: dict[str, Any] = {
        "name": name,
        "kind": "gpu",
        "bf16_flops_per_s": 1e13,
        "fp8_flops_per_s": 0.0,
        "int8_ops_per_s": 0.0,
        "fp4_flops_per_s": 0.0,
        "memory_bytes": 4e9,
        "memory_bytes_per_s": 1e11,
        "tdp_w": 100.0,
        "link_bytes_per_s": 1e10,
        "pcie_bytes_per_s": 1e10,
        "network_bytes_per_s": 1e9,
        "devices_per_node": 4,
        "confidence": "made up",
        "source": "made up",
    }
    return Device(**fields | changes)


def offer(
    name: str = "Box", *, usd: float = 1.0, flops: float = 1e12, memory: float = 1e11,
    ratios: tuple[float, ...] = RATIOS, **changes: Any,
) -> Offer:  # fmt: skip
    rates = Coefficients(flops, memory, flops, memory, step_s=1e-3)
    held_out = (HeldOut("step", 10, 0.05, 0.1, ratios),)
    profile = Profile(
        "made up", name, MODEL, rates, held_out, "made up", "2026-01-01", True,
        power=Power(20.0, 60.0, 20.0, 100.0),
    )  # fmt: skip
    return Offer(device(name, **changes), profile, usd)


def kind(offered: Offer | None = None, **changes: Any) -> Kind:
    made = kinds(MODEL, [offered or offer()], longest=600, budgets=(512,))[0]
    return msgspec.structs.replace(made, **changes)


def space(*offered: Offer, **changes: Any) -> Space:
    found = kinds(MODEL, offered or (offer(),), longest=600, budgets=(512,))
    return Space(tuple(found), **changes)


def trace(
    num: int = 60, rate: float = 4.0, prompt: int = 400, output: int = 30
) -> list[TraceRequest]:
    return [TraceRequest(i / rate, prompt, output) for i in range(num)]


def wish(slo: str = "ttft=1s,tpot=50ms", **changes: Any) -> Wish:
    fields: dict[str, Any] = {"num_draws": 4, "num_requests": 60}
    return Wish(Slo.parse(slo), **fields | changes)


def unified(count: int, each: Kind | None = None) -> Candidate:
    return Candidate({Role.UNIFIED: (each or kind(), count)})


def split(
    prefill: int, decode: int, first: Kind | None = None, second: Kind | None = None,
    link: Link = LINK,
) -> Candidate:  # fmt: skip
    workers = {Role.PREFILL: (first or kind(), prefill), Role.DECODE: (second or kind(), decode)}
    return Candidate(workers, Way(link))
