"""Kinds of worker that a plan may be made of: a device, how many of them, and a token budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from baton.core.cost import ModelShape, Parallel, Power, Profile, StepCost
from baton.errors import ConfigError
from baton.planner.hardware import Device, find_device, find_price
from baton.planner.profiles import find_profile
from baton.types import Role

USABLE = 0.9
"""Of a device's memory; the rest is activations and the runtime. An assumption."""
MIN_KV_SHARE = 0.1
MAX_WIDER = 4
"""Tensor parallelism is tried up to so many times of what the model needs to fit."""


class Offer(msgspec.Struct, frozen=True):
    """A device that may be used: its cost model and its price per device and hour.

    own: cost models of workers of a role, where they were measured apart (other cores, other
    software); `profile` is that of all others.
    """

    device: Device
    profile: Profile
    usd_per_hour: float
    own: Mapping[Role, Profile] = {}

    @property
    def name(self) -> str:
        """As short as it is known: `H100` rather than `H100 SXM`."""
        return min((self.device.name, *self.device.aliases), key=len)

    def profile_of(self, role: Role) -> Profile:
        """What workers of this role cost."""
        return self.own.get(role, self.profile)

    def profile_name(self, role: Role) -> str:
        """Tells the cost models of all offers apart."""
        return f"{self.device.name}/{role.value}" if role in self.own else self.device.name

    def profiles(self) -> dict[str, Profile]:
        """All its cost models by `profile_name`, that without a role first."""
        own = {self.profile_name(role): profile for role, profile in self.own.items()}
        return {self.device.name: self.profile, **own}


class Kind(msgspec.Struct, frozen=True):
    """One kind of worker.

    kv_tokens: tokens of KV that its memory holds. budget: most tokens of a step.
    """

    offer: Offer
    model: ModelShape
    parallel: Parallel
    budget: int
    kv_tokens: int

    @property
    def name(self) -> str:
        tensor, pipeline = self.parallel.tensor, self.parallel.pipeline
        return (
            self.offer.name
            + (f" TP{tensor}" if tensor > 1 else "")
            + (f" PP{pipeline}" if pipeline > 1 else "")
        )

    @property
    def num_devices(self) -> int:
        return self.parallel.num_devices

    @property
    def usd_per_hour(self) -> float:
        return self.offer.usd_per_hour * self.num_devices

    @property
    def power(self) -> Power | None:
        """Of one of its devices."""
        return self.offer.profile.power or self.offer.device.power()

    def key(self, role: Role) -> tuple[str, Parallel, int]:
        """Equal where `cost` is: of kinds for one model."""
        return self.offer.profile_name(role), self.parallel, self.budget

    def cost(self, role: Role) -> StepCost:
        """What steps of its workers of this role take."""
        return self.offer.profile_of(role).cost(self.model, self.parallel)


def offers(
    names: Sequence[str],
    model: ModelShape,
    profiles: Sequence[Profile] = (),
    prices: Mapping[str, float] | None = None,
    by_role: Mapping[Role, Profile] | None = None,
) -> list[Offer]:
    """The devices of these names, and those that the profiles are of.

    prices: dollars per device and hour by name, in place of the price list's. by_role: profiles of
    workers of one role, in place of their device's.

    Raises:
        ConfigError: a device is not known, or has no price.
    """
    given = {find_device(profile.device).name: profile for profile in profiles}
    own = {find_device(name).name: usd for name, usd in (prices or {}).items()}
    wanted = dict.fromkeys([*(find_device(name).name for name in names), *given])
    found = []
    for name in wanted:
        device = find_device(name)
        usd = own.get(name)
        if usd is None:
            listed = find_price(device)
            if listed is None:
                raise ConfigError(
                    f"{name} has no price here: give --price "
                    f"{min((name, *device.aliases), key=len)}=USD, for one device and hour"
                )
            usd = listed.usd_per_device_hour
        profile = given.get(name) or find_profile(device, model)
        roles = {
            role: each
            for role, each in (by_role or {}).items()
            if find_device(each.device) == device and each != profile
        }
        found.append(Offer(device, profile, usd, roles))
    if not found:
        raise ConfigError("no hardware to plan with: give --hardware such as H100,L40S")
    return found


def kinds(
    model: ModelShape,
    offered: Sequence[Offer],
    *,
    longest: int,
    budgets: Sequence[int] = (2048, 8192),
    max_pipeline: int = 1,
) -> list[Kind]:
    """All kinds of worker on which the model fits, with room for a request of `longest` tokens.

    Raises:
        ConfigError: it fits on none of them; it says what each would need.
    """
    found: list[Kind] = []
    lacking: list[str] = []
    for offer in offered:
        mine = [
            Kind(offer, model, parallel, budget, tokens)
            for parallel, tokens in _degrees(model, offer.device, longest, max_pipeline)
            for budget in budgets
        ]
        found += mine
        if not mine:
            whole = offer.device.memory_bytes * offer.device.devices_per_node
            lacking.append(f"{offer.name} has {whole / 1e9:,.0f} GB in a node")
    if not found:
        weights = model.num_weights * model.weight_bytes
        cache = longest * model.kv_bytes_per_token
        raise ConfigError(
            f"{model.name} fits nowhere: its weights take {weights / 1e9:,.1f} GB and the longest "
            f"request {cache / 1e9:,.2g} GB of KV, and {'; '.join(lacking)}: add larger hardware, "
            "allow --pipeline 2, or plan for a smaller or quantised model"
        )
    return found


def _degrees(
    model: ModelShape, device: Device, longest: int, max_pipeline: int
) -> list[tuple[Parallel, int]]:
    weights = model.num_weights * model.weight_bytes
    found: list[tuple[Parallel, int]] = []
    for pipeline in range(1, max_pipeline + 1):
        tensor, least = 1, 0
        while tensor <= device.devices_per_node and model.num_heads % tensor == 0:
            parallel = Parallel(tensor, pipeline)
            memory = USABLE * device.memory_bytes * parallel.num_devices
            tokens = int((memory - weights) / model.kv_bytes_per_token)
            if tokens >= longest + 64 and memory * (1 - MIN_KV_SHARE) >= weights:
                least = least or tensor
                if tensor <= MAX_WIDER * least:
                    found.append((parallel, tokens))
            tensor *= 2
    return found
