"""Today's deployment, as it is written on the command line: `4U`, `2P2D:H100+L40S`."""

from __future__ import annotations

from collections.abc import Sequence

from baton.config import Layout
from baton.core.cost import Link
from baton.errors import ConfigError
from baton.planner.hardware import find_device
from baton.planner.plan.candidates import Candidate, ways
from baton.planner.plan.kinds import Kind, Offer
from baton.types import Role


def parse_today(
    text: str, offered: Sequence[Offer], kinds: Sequence[Kind], links: Sequence[Link]
) -> Candidate:
    """Workers of the first offered device, or of those that are named, as narrow as the model
    allows and with the smallest budget.

    Raises:
        ConfigError: no layout, or a device that is not among the hardware.
    """
    written, _, named = text.partition(":")
    counts = Layout.parse(written).counts()
    devices = [find_device(name).name for name in named.split("+")] if named else []
    names = devices or [offered[0].device.name]
    if len(names) > len(counts):
        raise ConfigError(
            f"--today {text!r} names {len(names)} devices for {len(counts)} roles: write one for "
            "all, or one a role in the layout's order, such as 2P2D:H100+L40S"
        )
    names += names[-1:] * (len(counts) - len(names))
    workers = {
        role: (_narrowest(name, kinds, text), count)
        for (role, count), name in zip(counts.items(), names, strict=True)
    }
    if Role.PREFILL not in workers:
        return Candidate(workers)
    prefill, decode = workers[Role.PREFILL][0], workers[Role.DECODE][0]
    return Candidate(workers, ways(prefill, decode, links, [("raw", 1.0)])[0])


def _narrowest(device: str, kinds: Sequence[Kind], text: str) -> Kind:
    mine = [kind for kind in kinds if kind.offer.device.name == device]
    if not mine:
        known = ", ".join(dict.fromkeys(kind.offer.name for kind in kinds))
        raise ConfigError(
            f"--today {text!r} has workers on {device}, which the model does not fit on or which "
            f"is not in --hardware; there are {known}"
        )
    return min(mine, key=lambda kind: (kind.num_devices, kind.budget))
