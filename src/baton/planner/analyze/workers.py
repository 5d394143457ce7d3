"""Kinds of worker to split a trace on: a device by name, with price, power and cost model.

A worker has as many devices, a power of two, as the model needs to leave room for KV.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton.core.cost import ModelShape, Parallel, Profile
from baton.errors import ConfigError
from baton.planner.analyze.serving import Modelled
from baton.planner.hardware import Device, devices, find_device, find_price
from baton.planner.profiles import bundled_profiles, find_profile

DEFAULT_HARDWARE = "H100,A100,L40S"
DEFAULT_MODEL = "Llama-3.1-8B"
USABLE = 0.9  # of the memory; the rest is activations and the runtime
MIN_KV_SHARE = 0.1
MAX_DEVICES = 16


def workers(
    model: ModelShape, names: Sequence[str], profiles: Sequence[Profile] = ()
) -> list[Modelled]:
    """One worker for each profile, then one for each device that no profile is of.

    Devices without a profile take one that comes with Baton, of an engine that was measured on all
    of them if there is one: unlike engines on unlike devices would tell nothing.

    Raises:
        ConfigError: a device is not known, or the model fits on none of its workers.
    """
    found = [_worker(model, find_device(profile.device), profile) for profile in profiles]
    measured = {find_device(profile.device).name for profile in profiles}
    others = [device for name in names if (device := find_device(name)).name not in measured]
    engine = _common_engine(others)
    return found + [_worker(model, each, find_profile(each, model, engine)) for each in others]


def device_prices() -> dict[str, float]:
    """Dollars an hour for one device, by device, as far as there is a price."""
    found = {device.name: find_price(device) for device in devices()}
    return {name: price.usd_per_device_hour for name, price in found.items() if price is not None}


def _common_engine(wanted: Sequence[Device]) -> str | None:
    """Whole engines before kernels alone."""
    engines = [
        {each.engine for each in bundled_profiles().values() if find_device(each.device) == device}
        for device in wanted
    ]
    common = set.intersection(*engines) if engines else set()
    return min(common, key=lambda name: (name.endswith("kernels"), name), default=None)


def _worker(model: ModelShape, device: Device, profile: Profile) -> Modelled:
    num_devices = _num_devices(model, device)
    price = find_price(device)
    weights = model.num_weights * model.weight_bytes
    free = USABLE * device.memory_bytes * num_devices - weights
    return Modelled(
        device.name if num_devices == 1 else f"{num_devices}x {device.name}",
        profile.cost(model, Parallel(tensor=num_devices)),
        basis=_basis(profile),
        usd_per_hour=price.usd_per_device_hour * num_devices if price else None,
        power=profile.power or device.power(),
        kv_tokens=int(free / model.kv_bytes_per_token),
    )


def _num_devices(model: ModelShape, device: Device) -> int:
    weights = model.num_weights * model.weight_bytes
    count = 1
    while USABLE * device.memory_bytes * count * (1 - MIN_KV_SHARE) < weights:
        count *= 2
        if count > MAX_DEVICES:
            raise ConfigError(
                f"{model.name} needs {weights / 1e9:,.0f} GB, more than {MAX_DEVICES} of "
                f"{device.name} hold: leave it out of --hardware, or choose a smaller model"
            )
    return count


def _basis(profile: Profile) -> str:
    error = profile.held_out[0] if profile.held_out else None
    off = f", off by {error.median:.0%} ({error.kind}, held out)" if error else ""
    if not profile.measured:
        return f"an estimate from its datasheet, not measured{off}"
    return f"{profile.engine} measured with {profile.model.name}, {profile.date}{off}"
