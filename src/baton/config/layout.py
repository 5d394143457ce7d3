"""A layout says how many workers of each role there are: `2P3D`, `4U`."""

from __future__ import annotations

import re

import msgspec

from baton.errors import ConfigError
from baton.types import Role

MAX_WORKERS = 99


class Layout(msgspec.Struct, frozen=True):
    """How many workers of each role a deployment has."""

    prefill: int = 0
    decode: int = 0
    unified: int = 0

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Read `1P1D`, `2P3D`, `4U`, `1P1D1U`.

        Raises:
            ConfigError: it states the grammar.
        """
        match = re.fullmatch(r"(?:(\d{1,2})P)?(?:(\d{1,2})D)?(?:(\d{1,2})U)?", text.strip().upper())
        layout = cls(*(int(n or 0) for n in match.groups())) if match else cls()
        if not 0 < layout.num_workers <= MAX_WORKERS:
            raise ConfigError(
                f"launch.layout {text!r} is not a layout: write the numbers of prefill (P), decode "
                "(D) and unified (U) workers in this order, such as 1P1D, 2P3D, 4U or 1P1D1U"
            )
        if (layout.prefill == 0) != (layout.decode == 0):
            have, lack = ("P", "D") if layout.prefill else ("D", "P")
            raise ConfigError(
                f"launch.layout {text!r} has {have} workers without {lack} workers: "
                "each needs the other; U workers do both"
            )
        return layout

    @property
    def num_workers(self) -> int:
        return self.prefill + self.decode + self.unified

    def counts(self) -> dict[Role, int]:
        """Workers by role, roles without workers left out."""
        pairs = (
            (Role.PREFILL, self.prefill),
            (Role.DECODE, self.decode),
            (Role.UNIFIED, self.unified),
        )
        return {role: count for role, count in pairs if count}

    def __str__(self) -> str:
        return "".join(f"{count}{role.value[0].upper()}" for role, count in self.counts().items())
