"""The twin beside the real server on this machine, and its runs replayed decision by decision.

    python bench/twin_vs_real.py [--minutes 60] [--only 'demo-1U-*'] [--seconds 180]
    python bench/twin_vs_real.py --report        tables of what has been measured so far
    python bench/twin_vs_real.py --seconds 20 --only demo-1U-chat-70      a quick trial

Each cell is a trace of 3 minutes (chat, summarisation or bursty code, made up from a seed) at 40,
70 or 90 % load, served by `baton serve` as 1U or 1P1D: the demo model, and a random 0.5 B model
with chat at 70 %. It is sent twice, by the client of `baton bench`, with exact lengths and prompts
that are never repeated. The twin gets the same arrivals and what `baton profile` measured here
just before, for a worker with as many cores as the served one has.

100 % load is measured, not assumed: the requests a second that the real server ends while it is
offered more than that, so that its queue grows; its client runs on the same machine. One more
thing is measured for the twin: how long a message takes, from requests for one token to the idle
server. Mean and p90 of TTFT, TPOT and E2E are compared: see `parts/twin_vs_real/judge.py`.

The server writes decision logs. When it has ended they are replayed with their measured step
times, and decisions that differ are counted; logs without a difference are deleted.

Every run is appended to the results as it ends: a script that is stopped, or whose time is up,
goes on where it was when it is started again. Cells whose repeats differ too much are run again.
Keep the machine free of other work.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import functools
import os
import platform
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from parts.peers.engines import Broken
from parts.twin_vs_real import capacity, report, served
from parts.twin_vs_real.book import Book, Capacity, Header, Hop, Replayed
from parts.twin_vs_real.cells import CELLS, Cell, Server, next_cell, requests
from parts.twin_vs_real.judge import Run, compare, failures, figures, last_pair
from parts.twin_vs_real.settings import Setup, setup
from parts.twin_vs_real.simulated import simulate

from baton.cli.endpoint import Endpoint
from baton.core.cost import Profile
from baton.core.decision_log import BadLog
from baton.core.replay import ReplayReport, replay
from baton.errors import BatonError
from baton.observe.results import RequestResult, percentile
from baton.twin.workload import TraceRequest

WARM_UP_S = 5.0


class Comparison:
    """One start of the script: its arguments, what is known, and what has failed."""

    def __init__(self, args: argparse.Namespace, cells: Sequence[Cell]) -> None:
        self._args = args
        self._deadline = time.monotonic() + 60 * args.minutes
        self.cells = list(cells)
        self.cores = sorted(os.sched_getaffinity(0))
        header = Header(args.seconds, tuple(self.cores), _machine())
        self.book = Book(args.results, header)
        self.broken: dict[Server, str] = {}
        self._setups: dict[Server, Setup] = {}

    def setup(self, server: Server) -> Setup:
        if server not in self._setups:
            self._setups[server] = setup(server, self._args.models, self.cores)
        return self._setups[server]

    def profile(self, server: Server) -> Profile:
        file = self.book.folder / self.setup(server).profile_name
        return served.measure_profile(self.setup(server), file, self._args.profile_seconds)

    def twin(self, server: Server, trace: Sequence[TraceRequest]) -> list[RequestResult]:
        message_s = self.book.message_s(server) or 0.0
        return simulate(self.setup(server).settings, self.profile(server), trace, message_s)

    def trace(self, cell: Cell) -> list[TraceRequest]:
        rate = self.book.capacities[cell.server, cell.workload] * cell.load / 100
        seed = f"{cell.workload}/{cell.load}"
        return requests(cell.workload, rate, self._args.seconds, seed)

    # Measuring -------------------------------------------------------------------------------

    def measure(self) -> None:
        """Until all is done or time is up; servers that fail are left out."""
        while (cell := self._next()) is not None:
            if self._is_late():
                print("Time is up; the same command goes on from here.\n")
                return
            try:
                self.profile(cell.server)
                self._visit(cell.server)
            except Broken as error:
                print(f"{cell.server}: {error}", flush=True)
                self.broken[cell.server] = str(error)

    def _next(self) -> Cell | None:
        cells = [cell for cell in self.cells if cell.server not in self.broken]
        return next_cell(cells, self.book.num_runs(), self.book.noisy())

    def _is_late(self) -> bool:
        return time.monotonic() > self._deadline

    def _visit(self, server: Server) -> None:
        """One start of a server, all that is to be run on it now, and its logs replayed."""
        folder, done = self.book.folder, list[Cell]()
        decisions = None if self._args.no_log else folder / "decisions" / _stamp()
        try:
            with served.serving(self.setup(server), folder / f"{server}.log", decisions) as at:
                self._warm_up(server, at)
                while (cell := self._next()) is not None and cell.server == server:
                    if self._is_late():
                        break
                    if (server, cell.workload) not in self.book.capacities:
                        self._find_capacity(server, cell.workload, at)
                    self._run(cell, at)
                    done.append(cell)
        finally:
            if decisions is not None and decisions.exists():
                self._replay(server, done, decisions)

    def _send(
        self, server: Server, at: Endpoint, trace: Sequence[TraceRequest]
    ) -> list[RequestResult]:
        spec = self.setup(server).spec
        return served.send(at, trace, secrets.token_hex(8), spec.vocab_size)

    def _warm_up(self, server: Server, at: Endpoint) -> None:
        for workload in {cell.workload for cell in self.cells if cell.server == server}:
            self._send(server, at, requests(workload, 1.0, WARM_UP_S, "warm-up"))
        trace = served.probe_trace()
        took_s = served.median_ttft_s(self._send(server, at, trace))
        settings, profile = self.setup(server).settings, self.profile(server)
        step_s = served.median_ttft_s(simulate(settings, profile, trace, 0.0))
        self.book.add(Hop(server, max(0.0, (took_s - step_s) / 2)))
        print(
            f"{server}: one token {1000 * took_s:.3g} ms, its step {1000 * step_s:.3g}", flush=True
        )

    def _find_capacity(self, server: Server, workload: str, at: Endpoint) -> None:
        guess = capacity.of_twin(lambda trace: self.twin(server, trace), workload)
        if guess is None:
            raise Broken("the twin's profile sets no limit to the rate")

        def serve(trace: Sequence[TraceRequest]) -> list[RequestResult]:
            return self._send(server, at, trace)

        found = capacity.find(serve, workload, capacity.OVERLOAD * guess, capacity.OVERLOAD)
        if found is None:
            raise Broken(f"no rate of {workload} makes its queue grow")
        self.book.add(Capacity(server, workload, found))
        print(f"{server}: {workload}: {found:.3g}/s are 100 % (twin {guess:.3g})", flush=True)

    def _run(self, cell: Cell, at: Endpoint) -> None:
        trace, busy = self.trace(cell), os.getloadavg()[0]
        results = self._send(cell.server, at, trace)
        run = Run(
            cell=cell,
            rate=self.book.capacities[cell.server, cell.workload] * cell.load / 100,
            figures=figures(results),
            requests=[(each.ttft_s, each.tpot_s, each.e2e_s) for each in results],
            failures=failures(trace, results),
            lag_s=percentile(sorted(each.sent_s - each.planned_s for each in results), 99),
            load_average=busy,
            when=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        self.book.add(run)
        shown = ", ".join(f"{name} {1000 * value:.4g}" for name, value in run.figures.items())
        failed = f", failed: {run.failures}" if run.failures else ""
        late = f"sent late by {1000 * run.lag_s:.2g} (p99)"
        print(f"{cell}: {len(trace)} at {run.rate:.3g}/s: {shown} ms, {late}{failed}", flush=True)

    def _replay(self, server: Server, done: Sequence[Cell], decisions: Path) -> None:
        reports = tuple(_replayed(file) for file in sorted(decisions.iterdir()))
        replayed = Replayed(server, tuple(done), reports)
        self.book.add(replayed)
        differing = report.num_differing([replayed])
        if not differing:
            shutil.rmtree(decisions)
        total = sum(each.num_decisions for each in reports)
        print(f"{server}: replayed, {differing:,} of {total:,} decisions differ", flush=True)

    # Report ----------------------------------------------------------------------------------

    def rows(self) -> list[report.Row]:
        """Cells that have been run twice, with what the twin says of them now."""
        rows = []
        for cell in self.cells:
            pair = last_pair(self.book.runs, cell)
            if pair is not None:
                twin = figures(self.twin(cell.server, self.trace(cell)))
                rows.append(report.Row(cell, pair, compare(pair, twin)))
        return rows

    def show(self) -> bool:
        """All tables; whether nothing is off."""
        book, rows = self.book, self.rows()
        twins = {
            (server, workload): capacity.of_twin(functools.partial(self.twin, server), workload)
            for server, workload in book.capacities
        }
        print(report.errors_table(rows, book.num_runs()))
        print(report.times_table(rows))
        print(report.capacity_table(book.capacities, twins))
        print(report.replay_table(book.replayed))
        for server, reason in self.broken.items():
            print(f"- {server}: not measured: {reason}")
        print(report.total(rows, len(self.cells)))
        return not (report.num_differing(book.replayed) or any(r.verdict == "off" for r in rows))


def main() -> int:
    args = _parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the server, too
    patterns = args.only.split(",")
    cells = [c for c in CELLS if any(fnmatch.fnmatchcase(str(c), p) for p in patterns)]
    if not cells:
        print(f"--only {args.only!r} names no cell; there are {', '.join(map(str, CELLS))}")
        return 2
    args.models.mkdir(parents=True, exist_ok=True)
    try:
        comparison = Comparison(args, cells)
        if not args.report:
            comparison.measure()
        return 0 if comparison.show() else 1
    except BatonError as error:
        print(error)
        return 2


def _replayed(file: Path) -> ReplayReport:
    try:
        return replay(file.read_bytes())
    except BadLog as error:  # no log is no proof
        return ReplayReport(file.stem, 0, 0, 1, parted=str(error))


def _stamp() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S")


def _machine() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=55, help="start no run after so many [55]")
    add("--only", default="*", metavar="CELL", help="such as demo-1U-chat-70 or 'demo-*-40,0.5B-*'")
    add("--seconds", type=float, default=180, help="of each trace [180]")
    add("--profile-seconds", type=float, default=120, help="of baton profile [120]")
    add("--results", type=Path, help="folder, resumed if there [results/twin_vs_real_SECONDS]")
    add("--models", type=Path, default=Path(".peers/models"), help="random models are kept here")
    add("--no-log", action="store_true", help="write no decision logs, so replay nothing")
    add("--report", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if args.results is None:
        args.results = Path(f"results/twin_vs_real_{args.seconds:g}")
    return args


if __name__ == "__main__":
    sys.exit(main())
