"""What a user gets from splitting: goodput of Baton's layouts and of other engines, same cores.

    python bench/goodput.py [--model 0.5B] [--engines baton-1P1D,...] [--minutes 60] [--rounds 2]
                            [--results results/goodput.jsonl] [--plot results/goodput.png]
    python bench/goodput.py --report         tables and plot of what has been measured so far

`goodput.yaml` says what is sent (chat and summarisation mixed, Poisson and bursty), the three
objectives, the rates and the token budgets to choose from. Each engine is first measured at each
of its budgets; for each objective the best one is kept, and its rates are swept. Engines follow
each other in an order that turns from round to round, all behind the client of `baton bench`, one
server at a time; arrivals and lengths are the same for all, prompts are never repeated, not even
between runs. Before each window the memory's bandwidth is measured and printed.

Every window is appended to the results file as it ends: a run that is stopped, or whose time is
up, goes on where it was when it is started again. `make peers` builds the other engines; one that
is missing is named with its reason.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import os
import secrets
import signal
import sys
import time
from pathlib import Path

import msgspec
from parts.goodput import report
from parts.goodput.judge import Key, Measured, attainment, outcome
from parts.goodput.plan import next_window
from parts.goodput.workload import Planned, Workload, load_workload, mixed, tail
from parts.peers.engines import Broken, Child, Missing, Setting, started
from parts.peers.http_engine import run
from parts.peers.models import prepare
from parts.peers.servers import SERVERS, running

from baton.cli.endpoint import Endpoint
from baton.cli.load.client import Target
from baton.errors import ConfigError
from baton.observe.results import RequestResult

KV_TOKENS = 40_960
TAIL_TIMEOUT_S = 300.0
SETTLE_S = 3.0
"""An engine's threads may spin for a while after its last step, beside the probe's."""


class Header(msgspec.Struct, frozen=True):
    """The first line of a results file: what must not change between its windows."""

    model: str
    threads: int
    workload: str


def main() -> int:
    args = _parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the engines, too
    workload = load_workload(args.workload)
    directory, gguf, spec = prepare(args.model, args.peers)
    setting = Setting(directory, gguf, spec, args.threads, KV_TOKENS, args.peers)
    digest = hashlib.sha256(args.workload.read_bytes()).hexdigest()[:16]
    measured = _open(args.results, Header(args.model, args.threads, digest))
    missing: list[Missing] = []
    engines = list(args.engines)
    if not args.report:
        _measure(args, setting, workload, engines, measured, missing)
    print(report.render(workload, measured, engines, missing))
    title = f"Goodput, {args.model} on {args.threads} cores"
    report.plot(workload, measured, engines, title, args.plot)
    return 0


def _measure(
    args: argparse.Namespace,
    setting: Setting,
    workload: Workload,
    engines: list[str],
    measured: list[Measured],
    missing: list[Missing],
) -> None:
    """Fill `measured` until all is done or time is up; engines that fail move to `missing`."""
    logs = args.peers / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * args.minutes
    with contextlib.ExitStack() as whole, contextlib.ExitStack() as visit:
        probe = whole.enter_context(started(["probe"], setting, logs))[0]["probe"]
        at: tuple[str, int] | None = None
        while (key := next_window(workload, engines, args.rounds, measured)) is not None:
            if time.monotonic() > deadline:
                print("Time is up; the same command goes on from here.\n")
                break
            try:
                if at != (key.engine, key.budget):
                    visit.close()
                    at = None
                    server = SERVERS[key.engine](setting, key.budget)
                    if isinstance(server, Missing):
                        raise Broken(server.reason)
                    log = logs / f"goodput-{key.engine}.log"
                    endpoint = visit.enter_context(running(server, log)).endpoint
                    _warm_up(endpoint, workload, setting.spec.vocab_size)
                    at = (key.engine, key.budget)
                done = _window(key, workload, setting, endpoint, probe, server.flags)
            except Broken as error:
                missing.append(Missing(key.engine, str(error)))
                engines.remove(key.engine)
                continue
            measured.append(done)
            with args.results.open("ab") as file:
                file.write(msgspec.json.encode(done) + b"\n")
            print(_line(workload, done), flush=True)


def _warm_up(endpoint: Endpoint, workload: Workload, vocab_size: int) -> None:
    """One request of each class, so that nothing is made for the first time in a window."""
    first = {p.name: p for p in mixed(workload, 1.0, "warm-up")}
    planned = [
        Planned(name, msgspec.structs.replace(p.arrival, at_s=0.0)) for name, p in first.items()
    ]
    for result in _send(endpoint, planned, 120.0, vocab_size):
        if result.failure is not None:
            raise Broken(f"the first requests failed: {result.failure}: {result.detail}")


def _send(
    endpoint: Endpoint, planned: list[Planned], timeout_s: float, vocab_size: int
) -> list[RequestResult]:
    """Results in the order of `planned`."""
    target = Target(endpoint, timeout_s=timeout_s, extra={"temperature": 0})
    return run(target, [p.arrival for p in planned], secrets.token_hex(8), vocab_size)


def _window(
    key: Key,
    workload: Workload,
    setting: Setting,
    endpoint: Endpoint,
    probe: Child,
    flags: str,
) -> Measured:
    # The seed knows neither engine nor budget: all get the same lengths at the same times.
    seed = f"{key.kind}/{key.rate}/{key.round}"
    is_tail = key.kind == "tail"
    planned = tail(workload) if is_tail else mixed(workload, key.rate, seed, key.kind == "bursty")
    time.sleep(SETTLE_S)
    bandwidth = probe.ask({"kind": "bandwidth"})
    timeout_s = TAIL_TIMEOUT_S if is_tail else workload.timeout_s
    results = _send(endpoint, planned, timeout_s, setting.spec.vocab_size)
    outcomes = [outcome(p.name, r) for p, r in zip(planned, results, strict=True)]
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    gaps = _stream_gaps(planned, results) if is_tail else []
    return Measured(key, outcomes, bandwidth, when, flags, gaps)


def _stream_gaps(planned: list[Planned], results: list[RequestResult]) -> list[float]:
    """The streams' gaps that end between the first long prompt's sending and the last's answer."""
    pairs = list(zip(planned, results, strict=True))
    prompts = [r for p, r in pairs if p.name == "prompt"]
    start = min(r.sent_s for r in prompts)
    end = max(r.event_s[0] if r.event_s else r.end_s for r in prompts)
    streams = [r for p, r in pairs if p.name == "stream"]
    return [
        after - before
        for r in streams
        for before, after in zip(r.event_s, r.event_s[1:], strict=False)
        if start < after <= end
    ]


def _line(workload: Workload, done: Measured) -> str:
    key = done.key
    where = f"{key.engine} ({key.budget}) {key.kind} {key.rate:g}/s round {key.round}"
    memory = f"{done.bytes_per_s / 1e9:.0f} GB/s"
    if key.kind == "tail":
        ordered = sorted(done.gaps_s)
        worst = f"{1000 * ordered[-1]:.0f} ms" if ordered else "?"
        return f"{where}: {len(ordered)} gaps, longest {worst}, {memory}"
    shares = (f"{o} {attainment(workload, o, done.outcomes):.0%}" for o in workload.objectives)
    failed = sum(o.failure is not None for o in done.outcomes)
    return f"{where}: {', '.join(shares)}, {failed} failed, {memory}"


def _open(file: Path, header: Header) -> list[Measured]:
    """The windows that are there already.

    Raises:
        ConfigError: they are of another model, workload or number of threads.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        file.write_bytes(msgspec.json.encode(header) + b"\n")
    first, *lines = file.read_bytes().splitlines()
    found = msgspec.json.decode(first, type=Header)
    if found != header:
        raise ConfigError(f"{file} holds {found}, and this run is {header}: name another file")
    return [msgspec.json.decode(line, type=Measured) for line in lines]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="0.5B", help="0.1B, 0.5B, 1B or a directory [0.5B]")
    add("--engines", default=",".join(SERVERS), help=f"[{','.join(SERVERS)}]")
    add("--workload", type=Path, default=Path(__file__).with_name("goodput.yaml"))
    add("--rounds", type=int, default=2, help="how often each rate is measured [2]")
    add("--minutes", type=float, default=55, help="start no window after so many [55]")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="[all cores]")
    add("--peers", type=Path, default=Path(".peers"), help="what `make peers` filled [.peers]")
    add("--results", type=Path, default=Path("results/goodput.jsonl"), help="resumed if there")
    add("--plot", type=Path, default=Path("results/goodput.png"))
    add("--report", action="store_true", help="measure nothing")
    args = parser.parse_args()
    args.peers = args.peers.resolve()
    args.engines = args.engines.split(",")
    if unknown := set(args.engines) - set(SERVERS):
        parser.error(f"no such engine: {', '.join(sorted(unknown))}")
    return args


if __name__ == "__main__":
    sys.exit(main())
