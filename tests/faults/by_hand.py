"""A prefill and a decode worker started one by one, with a bad network between them.

    with ByHand.start(model, folder) as served:
        served.proxy.down = [Flip(at=100_000)]      # for connections made from now on
        served.ask(prompt, 8)
        assert served.proxy.hits["Flip"]

`ByHand` owns the processes and the proxy: the decode worker reads the prefill worker's blocks over
tcp through `proxy`, the gateway talks to both directly. Leases live for `LEASE_TTL_S`, so that a
read ends, one way or the other, within `READ_S`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from faults.served import COMPLETIONS, SMALL, wait_for
from integration.deployment import _MUST_BE_ZERO, _MUST_NOT_BE_SAID, LEASE_TTL_S
from parts.fault_proxy import FaultProxy
from prometheus_client.parser import text_string_to_metric_families

from baton.core.imports import READ_WINDOW
from baton.rpc.auth import create_secret

READ_S = LEASE_TTL_S * READ_WINDOW
DRAIN_S = LEASE_TTL_S + 5.0
START_S = 60.0
STOP_S = 20.0
WORKERS = ("prefill-0", "decode-0")


class ByHand:
    """One gateway, `prefill-0` and `decode-0`; use `ByHand.start`. Processes go by these names."""

    def __init__(self, model: Path, folder: Path, flags: tuple[str, ...]) -> None:
        self._folder = folder
        create_secret(folder)
        port, admin_port, self._tcp_port = _free_ports(3)
        self.url, self._admin_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin_port}"
        self.model = model.resolve().name
        self._listen = ("--port", str(port), "--admin-port", str(admin_port))
        self._common = ("--runtime-dir", str(folder), "--model", str(model))
        self._common += ("--store.lease-ttl-s", f"{LEASE_TTL_S:g}", "--fabric.transport", "tcp")
        self._common += ("--fabric.max-kl", "0", *SMALL, *flags)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.proxy = FaultProxy(("127.0.0.1", self._tcp_port), records=True)

    @classmethod
    @contextlib.contextmanager
    def start(cls, model: Path, folder: Path, *flags: str) -> Iterator[ByHand]:
        """Serve `model`, with sockets and logs in `folder`, which is short and ours alone.

        At the end everything stops in good order, and nobody has said anything of a traceback.
        """
        served = cls(model, folder, flags)
        try:
            for name in ("gateway", *WORKERS):
                served.run(name)
            served.until_whole()
            yield served
            served._stop()
        finally:
            for process in served._processes.values():
                process.kill()
                process.wait()
            served.proxy.close()

    # Talking to it ------------------------------------------------------------------------------

    def body(self, prompt: list[int], max_tokens: int) -> dict[str, Any]:
        """Of a greedy completion that runs to its full length."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        return {**body, "ignore_eos": True, "return_token_ids": True}

    def ask(self, prompt: list[int], max_tokens: int) -> list[int]:
        """The token ids of a greedy completion."""
        url, body = f"{self.url}{COMPLETIONS}", self.body(prompt, max_tokens)
        response = httpx.post(url, json=body, timeout=60, trust_env=False)
        assert response.status_code == 200, response.text
        ids: list[int] = response.json()["choices"][0]["token_ids"]
        return ids

    def counters(self) -> dict[str, dict[str, float]]:
        """Totals of each worker's events, and its gauges, by worker id."""
        reply = httpx.get(f"{self._admin_url}/metrics", timeout=20, trust_env=False)
        found: dict[str, dict[str, float]] = {name: {} for name in WORKERS}
        for family in text_string_to_metric_families(reply.raise_for_status().text):
            for sample in family.samples:
                if sample.labels.get("worker") in found and not sample.name.endswith("_created"):
                    short = sample.name.removeprefix("baton_").removeprefix("worker_")
                    event = sample.labels.get("event", short)
                    found[sample.labels["worker"]][event] = sample.value
        return found

    def counter(self, worker: str, name: str) -> float:
        """0 before it is there."""
        return self.counters()[worker].get(name, 0.0)

    def lost(self) -> dict[str, float]:
        """What the decode worker wanted to read and could not, by reason."""
        return {
            name: total
            for name, total in self.counters()["decode-0"].items()
            if name.startswith(("fallback_import_", "early_lost_"))
        }

    # Hurting it ---------------------------------------------------------------------------------

    def run(self, name: str) -> None:
        """Start a process, which must not run; see `until_whole`."""
        arguments = self._arguments(name)
        path = os.pathsep.join(sys.path)
        with (self._folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", "baton", *arguments, *self._common],
                env={**os.environ, "PYTHONPATH": path},
                stdout=log,
                stderr=log,
            )

    def kill(self, name: str) -> None:
        """SIGKILL, and wait for the end."""
        self._processes[name].kill()
        self._processes[name].wait()

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

    def until(self, condition: Callable[[], object], what: str, timeout_s: float = 15.0) -> None:
        """Poll, gently, until `condition()` holds; a gateway that is not there yet is no answer."""

        def holds() -> object:
            time.sleep(0.02)
            try:
                return condition()
            except httpx.TransportError:
                return False

        wait_for(holds, timeout_s, what)

    def until_handed_off(self) -> None:
        """The prefill worker is done with the only request: it keeps nothing but a lease."""

        def is_handed_off() -> bool:
            of = self.counters()["prefill-0"]
            busy = of["num_requests_running"] or of["num_requests_waiting"]
            return of["num_leases"] == 1 and not busy and not of["num_block_transfers"]

        self.until(is_handed_off, "the handoff")

    def until_whole(self) -> None:
        """All are there, and the gateway says so."""

        def is_whole() -> bool:
            dead = [name for name, each in self._processes.items() if each.poll() is not None]
            assert not dead, f"{dead} ended:\n{self.output()[-3000:]}"
            ready = httpx.get(f"{self.url}/ready", timeout=5, trust_env=False)
            return ready.status_code == 200 and all(of.get("up") for of in self.counters().values())

        self.until(is_whole, "readiness", START_S)

    def check_drained(self) -> None:
        """Neither worker holds anything, soon."""
        deadline = time.monotonic() + DRAIN_S
        while held := self._held():
            assert time.monotonic() < deadline, f"not drained: {held}\n{self.output()[-3000:]}"
            time.sleep(0.05)

    def output(self) -> str:
        """All that the processes have written."""
        return "".join(log.read_text() for log in sorted(self._folder.glob("*.log")))

    def _held(self) -> dict[str, float]:
        return {
            f"{worker}: {gauge}": of.get(gauge, -1)
            for worker, of in self.counters().items()
            for gauge in _MUST_BE_ZERO
            if of.get(gauge, -1) != 0  # a gauge that is not there proves nothing
        }

    def _arguments(self, name: str) -> list[str]:
        if name == "gateway":
            # Workers are stopped here for what others do meanwhile, and shall keep their requests.
            return ["gateway", *self._listen, "--gateway.frozen-after-s", "600"]
        role = name.partition("-")[0]
        arguments = ["worker", "--role", role, "--id", name]
        arguments += ["--gateway", f"unix:{self._folder / 'gateway.sock'}"]
        if role == "decode":
            return [*arguments, "--fabric.tcp-port", "0"]
        arguments += ["--fabric.tcp-port", str(self._tcp_port)]
        return [*arguments, "--fabric.tcp-advertise", f"127.0.0.1:{self.proxy.address[1]}"]

    def _stop(self) -> None:
        # As the supervisor does it: a worker that ends first has to cut off the gateway's stream.
        for name in ("gateway", *WORKERS):
            self._processes[name].terminate()
            code = self._processes[name].wait(STOP_S)
            assert code == 0, f"{name} ended with {code}:\n{self.output()[-3000:]}"
        said = _MUST_NOT_BE_SAID.search(self.output())
        assert said is None, f"{said and said.group()!r}:\n{self.output()[-5000:]}"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [int(sock.getsockname()[1]) for sock in sockets]
