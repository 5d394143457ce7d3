"""What the gateway keeps of its predictions and of the plan that it serves.

The dispatcher tells `Auditor` what happens; `observe.audit` and `observe.plan_watch` judge, here
it is logged when a judgement changes, and put together for whoever asks.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from baton.config import Config
from baton.core.cost import ModelShape, Profile, model_shape
from baton.core.life import Life
from baton.core.step_cost import MeasuredStep
from baton.errors import ConfigError, ModelError
from baton.model_spec import load_model_spec
from baton.observe.audit import STEPS, Audit, StageError
from baton.observe.audit_view import AuditView
from baton.observe.events import Waterfall
from baton.observe.plan_watch import Ended, Finding, PlanWatch, Reason
from baton.types import Role, StageTimes

logger = logging.getLogger(__name__)

JUDGE_EVERY_S = 1.0


class Auditor:
    """Runs on the event loop's thread. `now` is the dispatcher's clock."""

    def __init__(
        self,
        config: Config | None = None,
        shape: ModelShape | None = None,
        profiles: Mapping[Role, Profile] | None = None,
    ) -> None:
        """profiles: what steps of each role's workers cost.

        Raises:
            ConfigError: the plan cannot be read.
        """
        self._config = config or Config()
        self._shape, self._profiles = shape, dict(profiles or {})
        self._audit = Audit({role: each.cost(shape) for role, each in self._profiles.items()})
        self._watch = PlanWatch(self._config.plan)
        self._findings: dict[Reason, Finding] = {}
        self._judged_at: float | None = None

    @classmethod
    def open(cls, config: Config, model_dir: Path) -> Auditor:
        """With the cost models that the plan names, for the model that is served.

        Raises:
            ConfigError: a profile cannot be read, or is none.
        """
        plan = config.plan
        read = {field: _read(field, name) for field, name in plan.profile_files().items()}
        mine = {role: read.get(plan.profile_field(role)) for role in Role}
        known = {role: profile for role, profile in mine.items() if profile is not None}
        return cls(config, _shape(config, model_dir), known)

    # What happens -------------------------------------------------------------------------------

    def joined(self, worker_id: str, role: Role) -> None:
        self._audit.join(worker_id, role)

    def lost(self, worker_id: str) -> None:
        self._audit.leave(worker_id)

    def arrived(self, now: float) -> None:
        """A request was placed."""
        self._watch.arrived(now)

    def leg(self, worker_id: str, life: Life, times: StageTimes, took_over: bool) -> None:
        """A leg of the present attempt has ended."""
        if life.placement is not None:
            self._audit.leg(worker_id, life.placement.predicted, times, took_over=took_over)

    def stepped(self, worker_id: str, step: MeasuredStep) -> None:
        self._audit.step(worker_id, step)

    def finished(self, waterfall: Waterfall) -> None:
        """A request has ended. One that the client left before its first token says nothing."""
        failed = waterfall.error is not None
        if waterfall.num_generated_tokens or failed:
            self._watch.ended(
                Ended(
                    waterfall.num_prompt_tokens,
                    waterfall.num_generated_tokens,
                    waterfall.ttft_s,
                    waterfall.e2e_s,
                    failed,
                )
            )

    def tick(self, now: float) -> None:
        """Judge the plan, if it is time to, and log what has changed. Cheap if it is not."""
        if self._judged_at is not None and now - self._judged_at < JUDGE_EVERY_S:
            return
        self._judged_at = now
        before, found = self._findings, self._watch.judge(now, self._audit.errors(STEPS))
        self._findings = {each.reason: each for each in found}
        for each in found:
            was_stale = each.reason in before and before[each.reason].is_stale
            if each.is_stale and not was_stale:
                gateway = self._config.gateway
                logger.warning(
                    "plan is stale reason=%s: %s; plan anew with: "
                    "baton plan --from-live http://%s:%d",
                    each.reason,
                    each.says,
                    gateway.admin_host,
                    gateway.admin_port,
                )
            elif was_stale and not each.is_stale:
                logger.info("plan holds again reason=%s: %s", each.reason, each.says)

    # What is known ------------------------------------------------------------------------------

    def errors(self) -> list[StageError]:
        return self._audit.errors()

    def findings(self) -> list[Finding]:
        return list(self._findings.values())

    def view(self) -> AuditView:
        """Everything, for machines."""
        return AuditView(
            self._config,
            self._shape,
            self._profiles,
            self.findings(),
            self.errors(),
            list(self._audit.steps()),
        )


def _read(field: str, name: str) -> Profile:
    try:
        return Profile.from_json(Path(name).expanduser().read_bytes())
    except OSError as error:
        raise ConfigError(
            f"plan.{field}: cannot read {name}: {error.strerror}; correct it, or leave it out"
        ) from None


def _shape(config: Config, model_dir: Path) -> ModelShape | None:
    """What is served; None where this host has no more of it than a gateway needs."""
    dtype = None if config.model.dtype == "auto" else config.model.dtype
    try:
        return model_shape(load_model_spec(model_dir), config.model.name, dtype)
    except ModelError:
        return None
