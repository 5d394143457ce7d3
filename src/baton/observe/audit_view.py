"""What the gateway's admin listener gives under `/audit`, and `baton plan --from-live` reads."""

from __future__ import annotations

import msgspec

from baton.config import Config
from baton.core.cost import ModelShape, Profile
from baton.observe.audit import StageError, WorkerStep
from baton.observe.plan_watch import Finding
from baton.types import Role


class AuditView(msgspec.Struct, frozen=True):
    """A deployment, what was predicted of it, and what then happened.

    shape: of the model that is served; None where the gateway has not read it. profiles: what
    steps are predicted by, for each role that has one. steps: the last ones that each worker told
    of, to calibrate with.
    """

    config: Config
    shape: ModelShape | None
    profiles: dict[Role, Profile]
    findings: list[Finding]
    errors: list[StageError]
    steps: list[WorkerStep]
