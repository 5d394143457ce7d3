"""Sharing out the CPU cores of this machine among the workers that compute on them.

Each worker gets cores that no other worker has, and one thread a core. Where there are fewer cores
than workers, some workers have one together and compute with one thread each. A container with a
quota of CPU time owns no core in particular: there, and with `shared`, workers run anywhere.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from baton.config import SHARED, Config, EngineConfig, format_cpus, parse_cpus
from baton.errors import ConfigError
from baton.types import Role

_CPU_MAX: Final = Path("/sys/fs/cgroup/cpu.max")


class Share(msgspec.Struct, frozen=True):
    """What one worker gets: its cores (none: it may run anywhere) and threads (None: any number).

    It is `contended` when its threads may have to wait for a core.
    """

    cpus: tuple[int, ...]
    threads: int | None
    contended: bool

    def flags(self) -> list[str]:
        """What to say to `baton worker`."""
        flags = ["--engine.cpus", format_cpus(self.cpus)] if self.cpus else []
        return flags if self.threads is None else [*flags, "--engine.threads", str(self.threads)]


def waiting(share: Share) -> dict[str, str]:
    """Environment that says how a worker's OpenMP threads wait for each other.

    By default a thread spins for milliseconds. Where another one is kept from its core meanwhile,
    that is time taken from the very thread it waits for: two workers with two threads each on two
    cores decode at a third of the speed of threads that sleep at once. On cores of their own a
    short spin is as fast as a long one, for the waits within a step are short, and it bears with
    whoever else comes by. What the user has set is kept.
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return {}
    return {"OMP_WAIT_POLICY": "passive"} if share.contended else {"GOMP_SPINCOUNT": "1000"}


def usable_cores(cpu_max: Path = _CPU_MAX) -> int:
    """Cores that this process may run on: its affinity, and its container's quota if lower."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = cpu_max.read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError, ZeroDivisionError):
        pass  # no control group, or one that says nothing about CPU
    return cores


def share_out(
    config: Config, workers: Mapping[str, Role], allowed: Sequence[int], usable: int
) -> dict[str, Share]:
    """The share of each of `workers` (name → role).

    Args:
        allowed: cores that this process may run on; `usable`: how many of them it can keep busy.

    Raises:
        ConfigError: a core is named that is not `allowed`, or none is left for some worker.
    """
    lists = {Role.PREFILL: "launch.prefill_cpus", Role.DECODE: "launch.decode_cpus"}
    shares: dict[str, Share] = {}
    for role, field in lists.items():
        names = [name for name, its in workers.items() if its is role]
        text = getattr(config.launch, field.partition(".")[2])
        if names and text is not None:
            shares |= _divided(_named(text, field, allowed), names)
    rest = [name for name in workers if name not in shares]
    if rest:
        taken = {cpu for share in shares.values() for cpu in share.cpus}
        shares |= _rest(config.engine, rest, taken, allowed, usable)
    threads = config.engine.threads
    if threads is not None:
        shares = {
            name: Share(
                share.cpus, threads, share.contended or threads > (len(share.cpus) or usable)
            )
            for name, share in shares.items()
        }
    return shares


def _rest(
    engine: EngineConfig,
    names: list[str],
    taken: Collection[int],
    allowed: Sequence[int],
    usable: int,
) -> dict[str, Share]:
    """The workers without a list of their own."""
    if engine.cpus == SHARED:
        return dict.fromkeys(names, Share((), usable, len(names) > 1 or bool(taken)))
    if engine.cpus is None:
        if engine.device == "cuda":
            return dict.fromkeys(names, Share((), None, False))
        if usable < len(allowed):
            threads = max(1, (usable - len(taken)) // len(names))
            return dict.fromkeys(names, Share((), threads, True))
    pool = allowed if engine.cpus is None else _named(engine.cpus, "engine.cpus", allowed)
    free = [cpu for cpu in pool if cpu not in taken]
    if not free:
        raise ConfigError(
            f"launch.prefill_cpus and launch.decode_cpus leave no core for {names[0]}: "
            "name fewer, or give each role its own"
        )
    return _divided(free, names)


def _divided(cpus: Sequence[int], names: Sequence[str]) -> dict[str, Share]:
    """Runs of neighbouring cores, the first ones longer by one where it does not come out even."""
    num, count = len(cpus), len(names)
    if num < count:
        ones = [(cpus[i * num // count],) for i in range(count)]
        return {
            name: Share(one, 1, ones.count(one) > 1) for name, one in zip(names, ones, strict=True)
        }
    ends = [num // count * i + min(i, num % count) for i in range(count + 1)]
    return {
        name: Share(tuple(cpus[first:end]), end - first, False)
        for name, first, end in zip(names, ends, ends[1:], strict=False)
    }


def pinned(config: Config) -> Config:
    """Keep this process on its `engine.cpus`, and have it compute with one thread on each.

    Without a list it changes nothing. Call it before torch is imported: OpenMP looks at the cores
    when it is loaded, and threads that run already stay where they are.

    Raises:
        ConfigError: a core is named that this process may not use.
    """
    engine = config.engine
    if engine.cpus is None or engine.cpus == SHARED:
        return config
    cpus = _named(engine.cpus, "engine.cpus", sorted(os.sched_getaffinity(0)))
    os.sched_setaffinity(0, cpus)
    engine = msgspec.structs.replace(engine, threads=engine.threads or len(cpus))
    return msgspec.structs.replace(config, engine=engine)


def _named(text: str, field: str, allowed: Sequence[int]) -> tuple[int, ...]:
    cpus = parse_cpus(text, field)
    if strangers := set(cpus) - set(allowed):
        raise ConfigError(
            f"{field} {text!r} names {format_cpus(strangers)}, "
            f"and the cores that may be used here are {format_cpus(allowed)}"
        )
    return cpus
