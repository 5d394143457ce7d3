"""A gateway and workers that a test starts one by one: what is the same wherever they run.

`OneByOne` owns the processes and their logs, and talks to the gateway. `ByHand` puts a bad network
between the workers, `two_hosts.TwoHosts` puts them on two hosts; each says how a process is started
and how HTTP comes to the gateway.
"""

from __future__ import annotations

import abc
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from faults.served import COMPLETIONS, SMALL, greedy, wait_for
from integration.deployment import LEASE_TTL_S, MUST_BE_ZERO, MUST_NOT_BE_SAID
from prometheus_client.parser import text_string_to_metric_families

START_S = 90.0
STOP_S = 20.0
DRAIN_S = LEASE_TTL_S + 5.0


class OneByOne(abc.ABC):
    """`gateway` and workers; processes go by these names.

    workers: the names of those that should be there now, which may change. Sockets and logs are in
    `folder`, which is short, since paths of sockets are bounded, and ours alone.
    """

    def __init__(
        self, model: Path, folder: Path, workers: Collection[str], flags: Sequence[str]
    ) -> None:
        self.model = model.resolve().name
        self._workers = workers
        self._folder = folder
        self._common = ("--model", str(model), "--store.lease-ttl-s", f"{LEASE_TTL_S:g}")
        self._common += ("--fabric.max-kl", "0", *SMALL, *flags)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @abc.abstractmethod
    def http(self, listener: str = "public") -> httpx.Client:
        """The gateway's `public` or `admin` listener; the caller closes it."""

    @abc.abstractmethod
    def run(self, name: str) -> None:
        """Start a process, which must not run; see `until_whole`."""

    def _start(
        self,
        name: str,
        arguments: Sequence[str],
        *flags: str,
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Run `baton` with its arguments, those of all, and `flags`, which win."""
        command = [*prefix, sys.executable, "-m", "baton", *arguments, *self._common, *flags]
        path = {"PYTHONPATH": os.pathsep.join(sys.path)}
        with (self._folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                command, env={**os.environ, **path, **(environment or {})}, stdout=log, stderr=log
            )

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """All are started; at the end they stop in good order, and have told of no traceback."""
        try:
            for name in ("gateway", *self._workers):
                self.run(name)
            yield
            # As the supervisor does it: a worker that ends first has to cut off its stream.
            for name in ("gateway", *self._workers):
                code = self.terminate(name)
                assert code == 0, f"{name} ended with {code}:\n{self.output()[-3000:]}"
            said = MUST_NOT_BE_SAID.search(self.output())
            assert said is None, f"{said and said.group()!r}:\n{self.output()[-5000:]}"
        except BaseException:
            print(self.output()[-20000:])
            raise
        finally:
            for process in self._processes.values():
                process.kill()
                process.wait()

    # Talking to it ------------------------------------------------------------------------------

    def body(self, prompt: list[int], max_tokens: int) -> dict[str, Any]:
        """Of a greedy completion that runs to its full length."""
        return greedy(self.model, prompt, max_tokens)

    def ask(self, prompt: list[int], max_tokens: int) -> list[int]:
        """The token ids of a greedy completion."""
        with self.http() as client:
            response = client.post(COMPLETIONS, json=self.body(prompt, max_tokens))
        assert response.status_code == 200, response.text
        ids: list[int] = response.json()["choices"][0]["token_ids"]
        return ids

    def counters(self) -> dict[str, dict[str, float]]:
        """Totals of each worker's events, and its gauges, by worker id."""
        with self.http("admin") as client:
            text = client.get("/metrics").raise_for_status().text
        found: dict[str, dict[str, float]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if "worker" in sample.labels and not sample.name.endswith("_created"):
                    short = sample.name.removeprefix("baton_").removeprefix("worker_")
                    event = sample.labels.get("event", short)
                    found.setdefault(sample.labels["worker"], {})[event] = sample.value
        return found

    def counter(self, worker: str, name: str) -> float:
        """0 before it is there."""
        return self.counters().get(worker, {}).get(name, 0.0)

    def lost(self) -> dict[str, float]:
        """What workers wanted to read and could not, by `worker: reason`."""
        return {
            f"{worker}: {name}": total
            for worker, of in self.counters().items()
            for name, total in of.items()
            if total and name.startswith(("fallback_", "early_lost_"))
        }

    # Hurting it ---------------------------------------------------------------------------------

    def end_of(self, name: str, timeout_s: float = 60.0) -> int:
        """Wait for a process that ends by itself; returns its exit code."""
        return self._processes.pop(name).wait(timeout_s)

    def terminate(self, name: str) -> int:
        """End a process in good order; returns its exit code."""
        self._processes[name].terminate()
        return self.end_of(name, STOP_S)

    def kill(self, name: str) -> None:
        """SIGKILL, and wait for the end."""
        self._processes[name].kill()
        self.end_of(name)

    @contextlib.contextmanager
    def stopped(self, *names: str) -> Iterator[None]:
        """SIGSTOP until the block ends, then SIGCONT."""
        for name in names:
            self._processes[name].send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for name in names:
                self._processes[name].send_signal(signal.SIGCONT)

    # Watching it --------------------------------------------------------------------------------

    def is_running(self, name: str) -> bool:
        """Whether it was started and has not been seen to end."""
        return name in self._processes

    def output(self, name: str = "*") -> str:
        """What a process has written, or all of them."""
        return "".join(log.read_text() for log in sorted(self._folder.glob(f"{name}.log")))

    def until(self, condition: Callable[[], object], what: str, timeout_s: float = 15.0) -> float:
        """Poll, gently; returns the seconds that it took. No answer is a no."""

        def holds() -> object:
            time.sleep(0.05)
            try:
                return condition()
            except httpx.TransportError:
                return False

        return wait_for(holds, timeout_s, what)

    def is_ready(self) -> bool:
        with self.http("admin") as client:
            return client.get("/ready").status_code == 200

    def until_whole(self, timeout_s: float = START_S) -> float:
        """All are there, and the gateway says so."""

        def is_whole() -> bool:
            dead = [name for name, each in self._processes.items() if each.poll() is not None]
            assert not dead, f"{dead} ended:\n{self.output()[-3000:]}"
            return self.is_ready() and all(self.counter(name, "up") for name in self._workers)

        return self.until(is_whole, "readiness", timeout_s)

    def until_handed_off(self) -> None:
        """The prefill worker is done with the only request: it keeps nothing but a lease."""

        def is_handed_off() -> bool:
            of = self.counters()["prefill-0"]
            busy = of["num_requests_running"] or of["num_requests_waiting"]
            return of["num_leases"] == 1 and not busy and not of["num_block_transfers"]

        self.until(is_handed_off, "the handoff")

    def check_drained(self) -> None:
        """No worker holds anything, soon."""
        deadline = time.monotonic() + DRAIN_S
        while held := self._held():
            assert time.monotonic() < deadline, f"not drained: {held}\n{self.output()[-3000:]}"
            time.sleep(0.05)

    def _held(self) -> dict[str, float]:
        counters = self.counters()
        return {
            f"{worker}: {gauge}": value
            for worker in self._workers
            for gauge in MUST_BE_ZERO  # one that is not there proves nothing
            if (value := counters.get(worker, {}).get(gauge, -1)) != 0
        }
