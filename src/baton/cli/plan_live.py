"""What `baton plan --from-live` asks of a running gateway: its traffic, its steps, its layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import httpx
import msgspec

from baton.cli.plan_subject import Subject
from baton.config import Layout
from baton.core.cost import ModelShape, Profile
from baton.errors import BatonError, ConfigError
from baton.observe.audit_view import AuditView
from baton.planner.analyze.sharing import sharing
from baton.planner.hardware import find_device
from baton.planner.profiles import find_profile
from baton.planner.recalibrate import recalibrate_roles
from baton.planner.traces import lifecycle, spread
from baton.planner.traces.trace import Trace
from baton.types import Role

T = TypeVar("T")
TIMEOUT_S = 30.0


def live_subject(
    url: str, *, model: ModelShape | None, profiles: Sequence[Profile], hardware: Sequence[str],
    today: str | None, seed: int,
) -> Subject:  # fmt: skip
    """The traffic and deployment behind a gateway's admin listener; what is given is not asked for.

    Raises:
        ConfigError: it has no requests yet, or it is not known what its steps cost.
        BatonError: no gateway answers there.
    """
    root = url.rstrip("/")
    view = _get(f"{root}/audit", AuditView)
    entries = enumerate(_get(f"{root}/requests", list[object]), 1)
    trace = spread(lifecycle.read(f"{root}/requests", entries, "entry"), seed)
    shape = model or view.shape
    if shape is None:
        raise ConfigError(f"{root} does not say what it serves: give --model")
    config = view.config
    roles = list(Layout.parse(config.launch.layout).counts())
    bases = {role: _base_profile(view, role, shape, profiles, hardware) for role in roles}
    steps = {role: [each.step for each in view.steps if each.role is role] for role in roles}
    found = recalibrate_roles(bases, steps, shape)
    notes = [*trace.notes, *_sharing(trace), *found.notes]
    if strays := sum(each.role not in roles for each in view.steps):
        layout = config.launch.layout
        notes.append(f"{strays} measured steps are of workers that {layout} has none of: left out")
    notes += [f"The plan that is served is stale: {f.says}" for f in view.findings if f.is_stale]
    devices = [find_device(bases[role].device) for role in roles]
    return Subject(
        model=shape,
        model_path=config.model.path,
        trace=trace.requests,
        profiles=[*found.together.values(), *profiles[1:]],
        by_role=found.by_role,
        hardware=[name for name in hardware if find_device(name) not in devices],
        today=today or f"{config.launch.layout}:{'+'.join(each.name for each in devices)}",
        slo=config.plan.slo,
        attainment=config.plan.attainment,
        budget=config.engine.max_num_batched_tokens,
        notes=notes,
    )


def _base_profile(
    view: AuditView, role: Role, shape: ModelShape, given: Sequence[Profile],
    hardware: Sequence[str],
) -> Profile:  # fmt: skip
    """What steps were thought to cost where the deployment's workers of this role run."""
    profile = given[0] if given else view.profiles.get(role)
    if profile is None:
        if not hardware:
            raise ConfigError(
                f"the deployment's {role.value} workers have no cost model (plan.profile_file): "
                "give --profile FILE, which baton profile writes, or what they run on as the first "
                "of --hardware"
            )
        return find_profile(find_device(hardware[0]), shape)
    try:
        find_device(profile.device)
    except ConfigError:
        if not hardware:
            raise ConfigError(
                f"the deployment runs on {profile.device!r}, whose memory and price are not known "
                "here: give hardware that is like it as the first of --hardware, such as "
                '"Server CPU"'
            ) from None
        return msgspec.structs.replace(profile, device=find_device(hardware[0]).name)
    return profile


def _sharing(trace: Trace) -> Iterator[str]:
    """What is known of prompts that begin alike, and how the plan takes it."""
    found = sharing(trace.requests, (), trace.num_cached_tokens)
    cached = "" if found.measured_ratio is None else f"{found.measured_ratio:.0%}"
    if (infinite := found.infinite) is not None:
        yield (
            f"{infinite.token_ratio:.0%} of the prompt tokens begin as those of an earlier request "
            f"do, and the plan counts with it; today's caches spared {cached}"
        )
    elif found.measured_ratio:
        yield (
            f"today's caches spared {cached} of the prompt tokens, but which prompts begin alike "
            "is not recorded: the plan takes every prompt for new, and so asks for more prefill "
            "than is needed"
        )


def _get(url: str, kind: type[T]) -> T:
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--from-live {url!r} must begin with http:// or https://")
    try:
        response = httpx.get(url, timeout=TIMEOUT_S, trust_env=False)
        response.raise_for_status()
        return msgspec.json.decode(response.content, type=kind)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise BatonError(
            f"no gateway answers at {url} ({error}): give the address of its admin listener, such "
            "as http://127.0.0.1:8001"
        ) from None
    except msgspec.MsgspecError as error:
        raise BatonError(
            f"{url} is no audit of this version of Baton ({error}): is it the admin listener?"
        ) from None
