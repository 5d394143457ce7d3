"""The CPU kernels as the tests get at them."""

from __future__ import annotations

import platform

import pytest

from baton.model.native import ISAS, Kernels, find_kernels

ON_THIS_KIND = (
    ("neon", "portable")
    if platform.machine() in ("aarch64", "arm64")
    else tuple(isa for isa in ISAS if isa != "neon")
)
"""Instruction sets of this kind of processor, which may not have them all."""


def available() -> list[str]:
    """The instruction sets that this machine and build can run, best first; may be empty."""
    return [isa for isa in ISAS if find_kernels(isa) is not None]


def kernels_named(name: str) -> Kernels | None:
    """None for "torch", the best kernels for "native", those of one instruction set by its name.

    Skips the test where there are none.
    """
    if name == "torch":
        return None
    found = available()
    if (name != "native" and name not in found) or not found:
        pytest.skip(f"no {name} kernels here")
    return find_kernels(found[0] if name == "native" else name)
