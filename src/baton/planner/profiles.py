"""The profiles that come with Baton, profiles from files, and what a datasheet alone can tell.

`data/profiles` holds one JSON file for each (device, engine, model family), written by
`bench/reproduce/make_profiles.py` from published measurements. `baton profile` writes the same form
for the machine at hand. Where nobody measured, `datasheet_profile` takes the datasheet times the
shares that measured devices reach, and says so.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import msgspec

from baton.core.cost import Coefficients, HeldOut, ModelShape, Profile
from baton.errors import ConfigError
from baton.planner.hardware import Device, data_dir, find_device

DATASHEET = "datasheet.json"


class Shares(msgspec.Struct, frozen=True):
    """What measured devices reach of their datasheets, and how far off that is for another one.

    The rates are shares; the times are seconds. held_out: each measured device, predicted from the
    shares of the others.
    """

    flops: float
    weight_bytes: float
    attention_flops: float
    kv_bytes: float
    allreduce_bytes: float
    sharpness: float
    step_s: float
    layer_s: float
    sequence_s: float
    allreduce_s: float
    held_out: tuple[HeldOut, ...]
    source: str
    date: str


def read_profile(file: Path) -> Profile:
    """A profile from a file.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    try:
        return Profile.from_json(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read the profile {file}: {error.strerror}") from None


@cache
def bundled_profiles() -> dict[str, Profile]:
    """All that come with Baton, by the names of their files."""
    files = sorted(data_dir("profiles").glob("*.json"))
    return {file.stem: read_profile(file) for file in files if file.name != DATASHEET}


def find_profile(device: Device, model: ModelShape, engine: str | None = None) -> Profile:
    """The measured profile nearest to what is asked for, or the datasheet's.

    Of the device's profiles: the same model before others, the same width of weights before other
    widths, whole engines before kernels alone, the nearest size.
    """
    candidates = [
        profile
        for profile in bundled_profiles().values()
        if find_device(profile.device) == device and engine in (None, profile.engine)
    ]
    if not candidates:
        return datasheet_profile(device, model)

    def distance(profile: Profile) -> tuple[bool, bool, bool, float]:
        size = max(profile.model.num_weights, 1) / max(model.num_weights, 1)
        other_width = profile.model.weight_bytes != model.weight_bytes
        kernels = profile.engine.endswith("kernels")
        return other_width, profile.model.name != model.name, kernels, max(size, 1 / size)

    return min(candidates, key=distance)


def datasheet_profile(device: Device, model: ModelShape) -> Profile:
    """An estimate from the datasheet; `measured` is false, and the error is that of such guesses."""
    shares = _shares()
    return Profile(
        engine="datasheet",
        device=device.name,
        model=model,
        coefficients=from_shares(shares, device, model.weight_bytes),
        held_out=shares.held_out,
        source=f"{device.source}; shares of the peaks: {shares.source}",
        date=shares.date,
        measured=False,
        power=device.power(),
        notes=f"Datasheet estimate, nothing measured on this device ({device.confidence}).",
    )


def from_shares(shares: Shares, device: Device, weight_bytes: float) -> Coefficients:
    """Rates of a device from its datasheet."""
    return Coefficients(
        flops_per_s=shares.flops * device.peak(weight_bytes),
        weight_bytes_per_s=shares.weight_bytes * device.memory_bytes_per_s,
        attention_flops_per_s=shares.attention_flops * device.bf16_flops_per_s,
        kv_bytes_per_s=shares.kv_bytes * device.memory_bytes_per_s,
        activation_bytes_per_s=shares.weight_bytes * device.memory_bytes_per_s,
        sharpness=shares.sharpness,
        step_s=shares.step_s,
        layer_s=shares.layer_s,
        sequence_s=shares.sequence_s,
        allreduce_s=shares.allreduce_s,
        allreduce_bytes_per_s=shares.allreduce_bytes * device.link_bytes_per_s,
        hop_s=shares.allreduce_s,
        hop_bytes_per_s=shares.allreduce_bytes * device.link_bytes_per_s,
    )


@cache
def _shares() -> Shares:
    file = data_dir("profiles") / DATASHEET
    try:
        return msgspec.json.decode(file.read_bytes(), type=Shares)
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from None
