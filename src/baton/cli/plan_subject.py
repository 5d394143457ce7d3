"""What a plan is made for: a model, its traffic, and where it may run."""

from __future__ import annotations

import msgspec

from baton.core.cost import ModelShape, Profile
from baton.twin.workload import TraceRequest
from baton.types import Role


class Subject(msgspec.Struct, frozen=True):
    """profiles: cost models of devices, in place of those that come with Baton. by_role: those of
    workers of one role, in place of their device's. hardware: names of further devices. budget:
    tokens of a step of what runs today. slo, attainment: what is promised today. notes: what there
    is to say of them, as sentences without their stops."""

    model: ModelShape
    model_path: str
    trace: list[TraceRequest]
    profiles: list[Profile]
    hardware: list[str]
    today: str | None = None
    slo: str | None = None
    attainment: float | None = None
    budget: int | None = None
    notes: list[str] = []
    by_role: dict[Role, Profile] = {}
