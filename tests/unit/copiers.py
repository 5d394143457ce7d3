"""Every body of the fabric's copies that there is here."""

from __future__ import annotations

from baton.fabric.digest import ISAS, Copier, PythonCopier, find_copier

COPIERS: list[Copier] = [
    PythonCopier("asked for"),
    *(found for isa in ISAS if (found := find_copier(isa)) is not None),
]
