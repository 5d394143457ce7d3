"""What the gateway's admin listener gives under `/audit`, and `baton plan --from-live` reads."""

from __future__ import annotations

import msgspec

from baton.config import Config
from baton.core.cost import ModelShape, Profile
from baton.observe.audit import StageError, WorkerStep
from baton.observe.plan_watch import Finding


class AuditView(msgspec.Struct, frozen=True):
    """A deployment, what was predicted of it, and what then happened.

    shape: of the model that is served; None where the gateway has not read it. profile: what steps
    are predicted by. steps: the last ones that each worker told of, to calibrate with.
    """

    config: Config
    shape: ModelShape | None
    profile: Profile | None
    findings: list[Finding]
    errors: list[StageError]
    steps: list[WorkerStep]
