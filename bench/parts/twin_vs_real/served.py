"""The real side: `baton profile`, `baton serve`, and load from the client of `baton bench`."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from baton.cli.endpoint import Endpoint
from baton.cli.load.client import INTERRUPTED, Target
from baton.cli.load.workload import Arrival
from baton.core.cost import Profile
from baton.launch.cores import Share, waiting
from baton.observe.results import RequestResult
from baton.twin.workload import TraceRequest
from parts.peers import http_engine, servers
from parts.peers.engines import Broken
from parts.twin_vs_real.settings import Setup

TIMEOUT_S = 900.0
PROBES, PROBE_GAP_S = 32, 0.2


def measure_profile(setup: Setup, file: Path, seconds: float) -> Profile:
    """`baton profile` of one worker of the server; what is there already is read.

    Raises:
        Broken: it failed.
    """
    if not file.exists():
        part = file.with_suffix(".part")
        words = [sys.executable, "-m", "baton", "profile", *setup.profile_flags]
        words += ["--seconds", f"{seconds:g}", "--out", str(part)]
        print(f"profile of {setup.server.model}, {len(setup.cpus)} threads:", flush=True)
        env = os.environ | waiting(Share(setup.cpus, len(setup.cpus), False))
        done = subprocess.run(words, env=env)
        if done.returncode:
            raise Broken(f"baton profile ended with code {done.returncode}")
        part.rename(file)
    return Profile.from_json(file.read_bytes())


@contextlib.contextmanager
def serving(setup: Setup, log: Path, decisions: Path | None) -> Iterator[Endpoint]:
    """`baton serve` until the block ends, with decision logs in `decisions`.

    Raises:
        Broken: it does not start.
    """
    port, admin_port = servers.free_ports(2)
    listen = ("--port", str(port), "--gateway.admin-port", str(admin_port))
    words = (sys.executable, "-m", "baton", "serve", *setup.flags, *listen)
    words += ("--log.level", "warning")
    if decisions is not None:
        words += ("--log.decision-log", str(decisions))
    url = f"http://127.0.0.1:{port}"
    process = servers.Process(words, f"{url}/ready", pauses=False)
    server = servers.Server(f"baton {setup.server}", url, (process,), " ".join(setup.flags))
    with servers.running(server, log) as started:
        yield started.endpoint


def send(
    endpoint: Endpoint, trace: Sequence[TraceRequest], seed: str, vocab_size: int
) -> list[RequestResult]:
    """Each request at its time, with a prompt of its own of exactly its length.

    Tokens are drawn at temperature 1, as `baton profile` draws them.

    Raises:
        KeyboardInterrupt: the user stopped it.
    """
    arrivals = [
        Arrival(each.arrival_s, each.num_prompt_tokens, each.num_output_tokens) for each in trace
    ]
    target = Target(endpoint, timeout_s=TIMEOUT_S, extra={"temperature": 1})
    results = http_engine.run(target, arrivals, seed, vocab_size)
    if len(results) < len(arrivals) or any(each.failure == INTERRUPTED for each in results):
        raise KeyboardInterrupt
    return results


def probe_trace() -> list[TraceRequest]:
    """Requests for one token, each on an idle server."""
    return [TraceRequest(i * PROBE_GAP_S, 16, 1) for i in range(PROBES)]


def median_ttft_s(results: Sequence[RequestResult]) -> float:
    """Of the second half: by then nothing is done for the first time.

    Raises:
        Broken: a request failed.
    """
    for each in results:
        if each.failure is not None:
            raise Broken(f"a request to an idle server failed: {each.failure}: {each.detail}")
    times = [each.ttft_s for each in results[len(results) // 2 :]]
    return statistics.median(time for time in times if time is not None)
