"""Lists of CPU cores, as `taskset` and the kernel write them: `0-3,8`."""

from __future__ import annotations

import re
from collections.abc import Iterable

from baton.errors import ConfigError

SHARED = "shared"
"""In place of a list: every worker on all cores."""
MAX_CPU = 8191
"""The kernel's own limit is 8192 cores."""


def parse_cpus(text: str, field: str) -> tuple[int, ...]:
    """The cores of `0-3,8`, in ascending order.

    Raises:
        ConfigError: not such a list, empty, or a core stands in it twice; it names `field`.
    """
    found: list[int] = []
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", part)
        first, last = (int(n or match[1]) for n in match.groups()) if match else (1, 0)
        if not first <= last <= MAX_CPU:
            raise ConfigError(f"{field} {text!r} is not a list of cores: write it as 0-3,8")
        found += range(first, last + 1)
    if len(set(found)) < len(found):
        raise ConfigError(f"{field} {text!r} names a core twice: name each once")
    return tuple(sorted(found))


def format_cpus(cpus: Iterable[int]) -> str:
    """The shortest list: `0-3,8`; "" for no cores."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
