"""Kinds of worker to split a trace on: a device by name, with price, power and cost model.

A worker has as many devices, a power of two, as the model needs to leave room for KV.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton.core.cost import Coefficients, ModelShape, Parallel, Profile, StepCost
from baton.errors import ConfigError
from baton.planner.analyze.serving import Modelled
from baton.planner.hardware import Device, devices, find_device, find_price

DEFAULT_HARDWARE = "H100,A100,L40S"
DEFAULT_MODEL = "Llama-3.1-8B"
USABLE = 0.9  # of the memory; the rest is activations and the runtime
MIN_KV_SHARE = 0.1
MAX_DEVICES = 16
COMPUTE_REACHED, BANDWIDTH_REACHED = 0.7, 0.75
"""Of the datasheet's peaks, for devices without measurements: what the measured ones reach."""
LAYER_S, STEP_S, ALLREDUCE_S = 30e-6, 500e-6, 10e-6


def workers(
    model: ModelShape, names: Sequence[str], profiles: Sequence[Profile] = ()
) -> list[Modelled]:
    """One worker for each profile, then one for each device that no profile is of.

    Raises:
        ConfigError: a device is not known, or the model fits on none of its workers.
    """
    found = [_worker(model, find_device(profile.device), profile) for profile in profiles]
    measured = {find_device(profile.device).name for profile in profiles}
    for name in names:
        device = find_device(name)
        if device.name not in measured:
            found.append(_worker(model, device, None))
    return found


def device_prices() -> dict[str, float]:
    """Dollars an hour for one device, by device, as far as there is a price."""
    found = {device.name: find_price(device) for device in devices()}
    return {name: price.usd_per_device_hour for name, price in found.items() if price is not None}


def _worker(model: ModelShape, device: Device, profile: Profile | None) -> Modelled:
    num_devices = _num_devices(model, device)
    rates = profile.coefficients if profile is not None else datasheet(device, model)
    price = find_price(device)
    weights = model.num_weights * model.weight_bytes
    free = USABLE * device.memory_bytes * num_devices - weights
    return Modelled(
        device.name if num_devices == 1 else f"{num_devices}x {device.name}",
        StepCost(model, rates, Parallel(tensor=num_devices)),
        basis=_basis(profile),
        usd_per_hour=price.usd_per_device_hour * num_devices if price else None,
        power=profile.power if profile and profile.power else device.power(),
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


def _basis(profile: Profile | None) -> str:
    if profile is None:
        return "an estimate from its datasheet, nothing measured"
    if not profile.measured:
        return f"an estimate from a datasheet ({profile.source})"
    error = profile.error("step")
    off = f", off by {error.median:.0%} on held-out steps" if error else ""
    return f"measured with {profile.engine} on {profile.model.name}, {profile.date}{off}"


def datasheet(device: Device, model: ModelShape) -> Coefficients:
    """Coefficients from peaks alone."""
    flops = COMPUTE_REACHED * device.peak(model.weight_bytes)
    bandwidth = BANDWIDTH_REACHED * device.memory_bytes_per_s
    return Coefficients(
        flops_per_s=flops,
        weight_bytes_per_s=bandwidth,
        attention_flops_per_s=COMPUTE_REACHED * device.bf16_flops_per_s,
        kv_bytes_per_s=bandwidth,
        activation_bytes_per_s=bandwidth,
        step_s=STEP_S,
        layer_s=LAYER_S,
        allreduce_s=ALLREDUCE_S,
        allreduce_bytes_per_s=0.7 * device.link_bytes_per_s,
    )
