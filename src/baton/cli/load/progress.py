"""A progress bar on a terminal's standard error; nothing in a pipe."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from baton.observe.results import RequestResult


class ProgressBar:
    """Counts what is in flight, done and failed; the bar vanishes at the end."""

    def __init__(self, label: str, total: int, *, enabled: bool = True) -> None:
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
            refresh_per_second=4,
            disable=not (enabled and console.is_terminal),
        )
        self._task = self._bar.add_task(label, total=total, note="")
        self._start = time.monotonic()
        self._in_flight = self._failed = self._num_events = 0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def sent(self) -> None:
        self._in_flight += 1
        self._show(0)

    def tokens(self, count: int) -> None:
        self._num_events += count

    def ended(self, result: RequestResult) -> None:
        self._in_flight -= 1
        self._failed += result.failure is not None
        self._show(1)

    def _show(self, advance: int) -> None:
        rate = self._num_events / max(time.monotonic() - self._start, 1e-3)
        failed = f", {self._failed} failed" if self._failed else ""
        note = f"{self._in_flight} in flight{failed}, {rate:,.0f} tok/s"
        self._bar.update(self._task, advance=advance, note=note)
