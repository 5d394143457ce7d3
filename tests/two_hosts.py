"""Two hosts on one machine: network namespaces with a wire between them, and a deployment on both.

    with Network.open() as network, TwoHosts.start(network, model, WHERE) as served:
        served.ask(prompt, 8)
        with network.cut():
            ...

`Network` owns the namespaces, `TwoHosts` the processes: a gateway here, workers here or there, each
host with a runtime directory of its own, all with TLS. HTTP comes to the gateway through a relay,
since the test itself stands in neither namespace.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from faults.served import COMPLETIONS, SMALL, wait_for
from integration.deployment import _MUST_BE_ZERO, _MUST_NOT_BE_SAID, LEASE_TTL_S
from parts.certificates import make_certificate
from prometheus_client.parser import text_string_to_metric_families

from baton.config import TlsFiles
from baton.rpc.tls import GATEWAY, WORKER

HERE, THERE = "here", "there"
ADDRESSES = {HERE: "10.77.0.1", THERE: "10.77.0.2"}
RPC_PORT = 7000
EXCUSE = "BATON_NO_NAMESPACES"
"""Of the environment: the reason why these tests cannot run on this machine."""
START_S = 90.0
STOP_S = 20.0
DRAIN_S = LEASE_TTL_S + 5.0
TOLD_S = 27.0
"""When at the latest both ends know of a cut: keepalive (10 s, and 10 s more), tries to resume."""

_KINDS = (("--user", "--map-root-user"), ())
_SYSFS = "mount -t sysfs none /sys"  # where UCX looks for network devices


class Network:
    """Two namespaces and a wire, whose ends are called `here` and `there`; use `Network.open`."""

    def __init__(self, kind: tuple[str, ...], closing: contextlib.ExitStack) -> None:
        self._kind = kind
        self._holders: dict[str, int] = {}
        self._closing = closing

    @classmethod
    @contextlib.contextmanager
    def open(cls) -> Iterator[Network]:
        """Fails where the machine gives out no namespaces, unless `EXCUSE` says why that is so."""
        problems = []
        for kind in _KINDS:
            with contextlib.ExitStack() as closing:
                network = cls(kind, closing)
                try:
                    network._build()
                except (OSError, subprocess.CalledProcessError, RuntimeError) as error:
                    problems.append(str(error))
                    continue
                yield network
                return
        reason = os.environ.get(EXCUSE)
        if reason:
            pytest.skip(f"{EXCUSE}: {reason}")
        pytest.fail(
            f"this machine gives out no network namespaces ({'; '.join(problems)}): allow it, or "
            f"say in {EXCUSE} why it cannot be"
        )

    def enter(self, host: str) -> tuple[str, ...]:
        """What to put before a command that is to run on `host`."""
        user = ("--user", "--preserve-credentials") if self._kind else ()
        return ("nsenter", f"--target={self._holders[host]}", *user, "--net", "--mount")

    @contextlib.contextmanager
    def cut(self) -> Iterator[None]:
        """No packet passes until the block ends."""
        self._run(THERE, "ip link set there down")
        try:
            yield
        finally:
            self._run(THERE, "ip link set there up")

    def _build(self) -> None:
        self._hold(HERE, ("unshare", *self._kind, "--net", "--mount"))
        self._hold(THERE, (*self.enter(HERE), "unshare", "--net", "--mount"))
        self._run(HERE, f"ip link add here type veth peer name there netns {self._holders[THERE]}")
        for host, address in ADDRESSES.items():
            self._run(host, "ip link set lo up")
            self._run(host, f"ip addr add {address}/24 dev {host}")
            self._run(host, f"ip link set {host} up")
        # The kernel says so up to a second later, and UCX finds no device until then.
        wait_for(lambda: all(map(self._is_running, ADDRESSES)), 10.0, "wire")

    def _is_running(self, host: str) -> bool:
        return self._run(host, f"cat /sys/class/net/{host}/operstate") == b"up\n"

    def _hold(self, host: str, prefix: tuple[str, ...]) -> None:
        """A process that does nothing but be there, and ends with us."""
        command = [*prefix, "sh", "-c", f"{_SYSFS} && echo ready && exec cat"]
        pipe = subprocess.PIPE
        holder = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
        self._closing.callback(_end, holder)
        self._holders[host] = holder.pid
        assert holder.stdout is not None and holder.stderr is not None
        if holder.stdout.readline() != b"ready\n":
            raise RuntimeError(holder.stderr.read().decode().strip())

    def _run(self, host: str, command: str) -> bytes:
        command_line = [*self.enter(host), *command.split()]
        return subprocess.run(command_line, check=True, capture_output=True).stdout


def _end(holder: subprocess.Popen[bytes]) -> None:
    for pipe in (holder.stdin, holder.stdout, holder.stderr):
        assert pipe is not None
        pipe.close()
    holder.wait()


class TwoHosts:
    """A deployment over both hosts; use `TwoHosts.start`. where: the host of each worker."""

    def __init__(
        self,
        network: Network,
        model: Path,
        folder: Path,
        where: Mapping[str, str],
        flags: tuple[str, ...],
        environment: Mapping[str, str],
    ) -> None:
        self.where = dict(where)
        self.model = model.resolve().name
        self.network = network
        self._folder = folder
        self._environment = environment
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._secret = self.secret_file("secret")
        make_certificate(folder, "ours", (GATEWAY,))
        self.certificates = {
            "gateway": make_certificate(folder, "gateway", (GATEWAY,), authority="ours"),
            "worker": make_certificate(folder, "worker", (WORKER,), authority="ours"),
            "stranger": make_certificate(folder, "stranger", (GATEWAY, WORKER)),
        }
        self._common = ("--model", str(model), "--store.lease-ttl-s", f"{LEASE_TTL_S:g}")
        self._common += ("--fabric.max-kl", "0", *SMALL, *flags)

    @classmethod
    @contextlib.contextmanager
    def start(
        cls,
        network: Network,
        model: Path,
        where: Mapping[str, str],
        *flags: str,
        environment: Mapping[str, str] | None = None,
    ) -> Iterator[TwoHosts]:
        """Serve `model`. At the end everything stops in good order and is well."""
        folder = Path(tempfile.mkdtemp(prefix="bt"))  # short: socket paths are bounded
        served = cls(network, model, folder, where, flags, environment or {})
        try:
            for name in ("gateway", *where):
                served.run(name)
            served._relay()
            served.until_whole()
            yield served
            served._stop()
        except BaseException:
            print(served.output()[-20000:])
            raise
        finally:
            for process in served._processes.values():
                process.kill()
                process.wait()
            shutil.rmtree(folder)

    def secret_file(self, name: str) -> str:
        """A new secret, in a file."""
        path = self._folder / name
        path.touch(mode=0o600)
        path.write_bytes(secrets.token_bytes(32))
        return str(path)

    # Talking to it ------------------------------------------------------------------------------

    def http(self, listener: str = "public") -> httpx.Client:
        """The gateway's `public` or `admin` listener; the caller closes it."""
        path = str(self._folder / f"{listener}.sock")
        relay = httpx.HTTPTransport(uds=path, verify=False)  # to read certificates takes time
        return httpx.Client(base_url="http://gateway", transport=relay, timeout=60)

    def body(self, prompt: list[int], max_tokens: int) -> dict[str, Any]:
        """Of a greedy completion that runs to its full length."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        return {**body, "ignore_eos": True, "return_token_ids": True}

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
        """What workers wanted to read and could not, by worker and reason."""
        return {
            f"{worker}: {name}": total
            for worker, of in self.counters().items()
            for name, total in of.items()
            if total and name.startswith(("fallback_", "early_lost_"))
        }

    # Hurting it ---------------------------------------------------------------------------------

    def run(self, name: str, *flags: str, certificate: str | TlsFiles | None = "") -> None:
        """Start a process, which must not run; certificate: another one, or None for plain text."""
        host = HERE if name == "gateway" else self.where[name]
        default = "gateway" if name == "gateway" else "worker"
        files = self.certificates[certificate or default] if certificate is not None else None
        arguments = [*self._arguments(name, host), "--rpc.host", ADDRESSES[host]]
        arguments += ["--runtime-dir", str(self._folder / host), "--rpc.secret-file", self._secret]
        if files is not None:
            for field in ("ca", "cert", "key"):
                arguments += [f"--rpc.tls-{field}-file", getattr(files, f"{field}_file")]
        environment = {"PYTHONPATH": os.pathsep.join(sys.path), "UCX_NET_DEVICES": host}
        with (self._folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [*self.network.enter(host), sys.executable, "-m", "baton", *arguments,
                 *self._common, *flags],
                env={**os.environ, **environment, **self._environment},
                stdout=log,
                stderr=log,
            )  # fmt: skip

    def end_of(self, name: str, timeout_s: float = 60.0) -> int:
        """Wait for a process that ends by itself; returns its exit code."""
        return self._processes.pop(name).wait(timeout_s)

    def terminate(self, name: str) -> int:
        """End a process in good order; returns its exit code."""
        self._processes[name].terminate()
        return self.end_of(name, STOP_S)

    def kill(self, name: str) -> None:
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
            return self.is_ready() and all(self.counter(name, "up") for name in self.where)

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
            f"{worker}: {gauge}": counters[worker].get(gauge, -1)
            for worker in self.where
            for gauge in _MUST_BE_ZERO
            if counters[worker].get(gauge, -1) != 0  # a gauge that is not there proves nothing
        }

    # Its processes ------------------------------------------------------------------------------

    def _arguments(self, name: str, host: str) -> list[str]:
        if name == "gateway":
            return ["gateway", "--rpc.port", str(RPC_PORT)]
        near, far = f"unix:{self._folder / HERE / 'gateway.sock'}", f"{ADDRESSES[HERE]}:{RPC_PORT}"
        role = name.partition("-")[0]
        gateway = near if host == HERE else far
        return ["worker", "--role", role, "--id", name, "--gateway", gateway]

    def _relay(self) -> None:
        program = (
            sys.executable,
            str(Path(__file__).with_name("http_relay.py")),
            str(self._folder),
        )
        self._processes["relay"] = subprocess.Popen(
            [*self.network.enter(HERE), *program], env={**os.environ, "PYTHONPATH": ""}
        )
        wait_for((self._folder / "admin.sock").exists, START_S, "the relay")

    def _stop(self) -> None:
        for name in ("gateway", *self.where):
            code = self.terminate(name)
            assert code == 0, f"{name} ended with {code}:\n{self.output()[-3000:]}"
        said = _MUST_NOT_BE_SAID.search(self.output())
        assert said is None, f"{said and said.group()!r}:\n{self.output()[-5000:]}"
