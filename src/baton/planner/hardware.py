"""Devices, what they can do, and what they cost; from `data/hardware`, with dates and sources.

Whatever is here is a datasheet's word, a price list's, or says that it is an assumption. What
devices reach in practice is in the profiles (`planner.profiles`).
"""

from __future__ import annotations

import csv
import difflib
from functools import cache
from pathlib import Path

import msgspec

from baton.core.cost import Power
from baton.errors import ConfigError

PACKAGED_DATA = Path(__file__).parents[1] / "data"
CHECKOUT_DATA = Path(__file__).parents[3] / "data"

IDLE_SHARE, COMPUTE_SHARE, MEMORY_SHARE = 0.12, 0.80, 0.38
"""Of the power limit: idle, arithmetic at full use, memory at full use. An assumption after what is
published of serving on A100 and H100: prompts draw about the limit, decoding about half of it."""


class Device(msgspec.Struct, frozen=True):
    """One accelerator (or CPU socket). Peaks are dense, in operations a second; 0: it has none.

    link_bytes_per_s: one direction among the devices of a node, over PCIe where there is no other
    link. network_bytes_per_s: this device's share of what leaves the node.
    """

    name: str
    kind: str
    bf16_flops_per_s: float
    fp8_flops_per_s: float
    int8_ops_per_s: float
    fp4_flops_per_s: float
    memory_bytes: float
    memory_bytes_per_s: float
    tdp_w: float
    link_bytes_per_s: float
    pcie_bytes_per_s: float
    network_bytes_per_s: float
    devices_per_node: int
    confidence: str
    source: str
    aliases: tuple[str, ...] = ()

    def peak(self, weight_bytes: float) -> float:
        """Operations a second for weights of so many bytes; where it lacks their type, the next."""
        if weight_bytes < 1 and self.fp4_flops_per_s:
            return self.fp4_flops_per_s
        if weight_bytes <= 1 and self.fp8_flops_per_s:
            return self.fp8_flops_per_s
        return self.bf16_flops_per_s

    def power(self) -> Power | None:
        """What it draws, by the shares above; None where no limit is published."""
        if not self.tdp_w:
            return None
        shares = (IDLE_SHARE, COMPUTE_SHARE, MEMORY_SHARE, 1.0)
        return Power(*(share * self.tdp_w for share in shares))


class Price(msgspec.Struct, frozen=True):
    """A price of an instance, as it was on `date` (ISO 8601, or as exact as it is known)."""

    provider: str
    instance: str
    device: str
    num_devices: int
    usd_per_hour: float
    region: str
    date: str
    basis: str
    source: str

    @property
    def usd_per_device_hour(self) -> float:
        return self.usd_per_hour / self.num_devices


def data_dir(name: str) -> Path:
    """Where a folder of data lies: in the package, or in the checkout that it is imported from.

    Raises:
        ConfigError: in neither.
    """
    for root in (PACKAGED_DATA, CHECKOUT_DATA):
        if (root / name).is_dir():
            return root / name
    raise ConfigError(f"the data folder {name!r} is missing from this installation: reinstall Baton")


def find_device(name: str) -> Device:
    """The device of that name or alias, in any case.

    Raises:
        ConfigError: there is none; it names the nearest and all that are known.
    """
    known = _by_name()
    found = known.get(name.strip().lower())
    if found is None:
        near = difflib.get_close_matches(name.strip().lower(), known, 1, cutoff=0.5)
        hint = f"; did you mean {known[near[0]].name}?" if near else ""
        names = ", ".join(device.name for device in devices())
        raise ConfigError(f"hardware {name!r} is not known{hint} Known are {names}.")
    return found


def prices(device: Device) -> list[Price]:
    """All prices of a device, the preferred one first."""
    return [price for price in _prices() if price.device == device.name]


def find_price(device: Device, provider: str | None = None) -> Price | None:
    """Today's price: on demand if there is one, of `provider` if it is given; None if none is."""
    wanted = [
        price
        for price in prices(device)
        if price.basis != "former" and provider in (None, price.provider)
    ]
    return next((p for p in wanted if p.basis == "on demand"), wanted[0] if wanted else None)


@cache
def devices() -> tuple[Device, ...]:
    """All devices, in the file's order.

    Raises:
        ConfigError: a row of the file cannot be read.
    """
    return tuple(_device(row) for row in _rows("devices.csv"))


@cache
def _prices() -> tuple[Price, ...]:
    return tuple(msgspec.convert(row, Price, strict=False) for row in _rows("prices.csv"))


@cache
def _by_name() -> dict[str, Device]:
    found: dict[str, Device] = {}
    for device in devices():
        for name in (device.name, *device.aliases):
            found[name.lower()] = device
    return found


def _rows(file: str) -> list[dict[str, str]]:
    with (data_dir("hardware") / file).open(newline="") as lines:
        return list(csv.DictReader(lines))


def _device(row: dict[str, str]) -> Device:
    def number(column: str, unit: float) -> float:
        try:
            return float(row[column] or 0) * unit
        except ValueError:
            raise ConfigError(f"devices.csv: {column} of {row['name']} is no number") from None

    pcie = number("pcie_gb_per_s", 1e9)
    return Device(
        name=row["name"],
        kind=row["kind"],
        bf16_flops_per_s=number("bf16_tflops", 1e12),
        fp8_flops_per_s=number("fp8_tflops", 1e12),
        int8_ops_per_s=number("int8_tops", 1e12),
        fp4_flops_per_s=number("fp4_tflops", 1e12),
        memory_bytes=number("memory_gb", 1e9),
        memory_bytes_per_s=number("memory_gb_per_s", 1e9),
        tdp_w=number("tdp_w", 1),
        link_bytes_per_s=number("link_gb_per_s", 1e9) or pcie,
        pcie_bytes_per_s=pcie,
        network_bytes_per_s=number("network_gb_per_s", 1e9),
        devices_per_node=int(row["devices_per_node"]),
        confidence=row["confidence"],
        source=row["source"],
        aliases=tuple(filter(None, row["aliases"].split("|"))),
    )
