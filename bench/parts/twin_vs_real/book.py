"""What has been measured, a JSON line each, in a folder with the profiles: a run resumes from it.

runs.jsonl     Header, then Hop, Capacity, Run and Replayed in the order in which they came
profile-*.json what `baton profile` wrote
decisions/     logs of the server that runs, and those which did not replay
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec

from baton.core.replay import ReplayReport
from baton.errors import ConfigError
from parts.twin_vs_real.cells import Cell, Server
from parts.twin_vs_real.judge import Run, is_noisy, last_pair


class Header(msgspec.Struct, frozen=True, tag="header"):
    """What must not change between the runs of a folder."""

    seconds: float
    cores: tuple[int, ...]
    machine: str


class Hop(msgspec.Struct, frozen=True, tag="hop"):
    """Half of what an idle server takes for one token beside its step: one way of a message."""

    server: Server
    message_s: float


class Capacity(msgspec.Struct, frozen=True, tag="capacity"):
    """Requests a second that are 100 % load."""

    server: Server
    workload: str
    per_s: float


class Replayed(msgspec.Struct, frozen=True, tag="replayed"):
    """Decision logs of one start of a server; cells: what it had served."""

    server: Server
    cells: tuple[Cell, ...]
    reports: tuple[ReplayReport, ...]


Line = Header | Hop | Capacity | Run | Replayed


class Book:
    """The lines of a folder. `add` writes at once."""

    def __init__(self, folder: Path, header: Header) -> None:
        """Raises: ConfigError: the folder holds other runs."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._file = folder / "runs.jsonl"
        self.hops: list[Hop] = []
        self.capacities: dict[tuple[Server, str], float] = {}
        self.runs: list[Run] = []
        self.replayed: list[Replayed] = []
        if not self._file.exists():
            self._append(header)
        first, *lines = self._file.read_bytes().splitlines()
        found = msgspec.json.decode(first, type=Header)
        if found != header:
            raise ConfigError(f"{folder} holds {found}, and this run is {header}: name another one")
        for line in lines:
            self._take(msgspec.json.decode(line, type=Line))

    def add(self, line: Line) -> None:
        self._append(line)
        self._take(line)

    def num_runs(self) -> Counter[Cell]:
        return Counter(run.cell for run in self.runs)

    def noisy(self) -> set[Cell]:
        """Cells whose last two repeats tell too little."""
        pairs = {run.cell: last_pair(self.runs, run.cell) for run in self.runs}
        return {cell for cell, pair in pairs.items() if pair is not None and is_noisy(pair)}

    def message_s(self, server: Server) -> float | None:
        """The median of what was measured; None without any."""
        found = sorted(hop.message_s for hop in self.hops if hop.server == server)
        return found[len(found) // 2] if found else None

    def _append(self, line: Line) -> None:
        with self._file.open("ab") as file:
            file.write(msgspec.json.encode(line) + b"\n")

    def _take(self, line: Line) -> None:
        match line:
            case Hop():
                self.hops.append(line)
            case Capacity(server, workload, per_s):
                self.capacities[server, workload] = per_s
            case Run():
                self.runs.append(line)
            case Replayed():
                self.replayed.append(line)
            case Header():
                raise ConfigError(f"{self._file} has two headers: name another folder")
