"""Two hosts on one machine: network namespaces with a wire between them, and a deployment on both.

    with Network.open() as network, TwoHosts.start(network, model, WHERE) as served:
        served.ask(prompt, 8)
        with network.cut():
            ...

`Network` owns the namespaces. `TwoHosts` starts a gateway here and workers here or there, each host
with a runtime directory of its own, all with TLS. HTTP comes to the gateway through a relay, since
the test itself stands in neither namespace.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import pytest
from faults.one_by_one import START_S, OneByOne
from faults.served import wait_for
from parts.certificates import make_certificate

from baton.rpc.tls import GATEWAY, WORKER

HERE, THERE = "here", "there"
ADDRESSES = {HERE: "10.77.0.1", THERE: "10.77.0.2"}
RPC_PORT = 7000
EXCUSE = "BATON_NO_NAMESPACES"
"""Of the environment: the reason why these tests cannot run on this machine."""
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


class TwoHosts(OneByOne):
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
        super().__init__(model, folder, self.where.keys(), flags)
        self.network = network
        self._environment = environment
        self._secret = self.secret_file("secret")
        make_certificate(folder, "ours", (GATEWAY,))
        self.certificates = {
            "gateway": make_certificate(folder, "gateway", (GATEWAY,), authority="ours"),
            "worker": make_certificate(folder, "worker", (WORKER,), authority="ours"),
            "stranger": make_certificate(folder, "stranger", (GATEWAY, WORKER)),
        }

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
        folder = Path(tempfile.mkdtemp(prefix="bt"))
        try:
            served = cls(network, model, folder, where, flags, environment or {})
            with served._running():
                served._relay()
                served.until_whole()
                yield served
        finally:
            shutil.rmtree(folder)

    def secret_file(self, name: str) -> str:
        """A new secret, in a file."""
        path = self._folder / name
        path.touch(mode=0o600)
        path.write_bytes(secrets.token_bytes(32))
        return str(path)

    def http(self, listener: str = "public") -> httpx.Client:
        path = str(self._folder / f"{listener}.sock")
        relay = httpx.HTTPTransport(uds=path, verify=False)  # to read certificates takes time
        return httpx.Client(base_url="http://gateway", transport=relay, timeout=60)

    def run(self, name: str, *flags: str, certificate: str | None = "") -> None:
        """Start a process, which must not run; certificate: another one, or None for plain text."""
        host = HERE if name == "gateway" else self.where[name]
        default = "gateway" if name == "gateway" else "worker"
        files = self.certificates[certificate or default] if certificate is not None else None
        arguments = [*self._arguments(name, host), "--rpc.host", ADDRESSES[host]]
        arguments += ["--runtime-dir", str(self._folder / host), "--rpc.secret-file", self._secret]
        if files is not None:
            for field in ("ca", "cert", "key"):
                arguments += [f"--rpc.tls-{field}-file", getattr(files, f"{field}_file")]
        environment = {"UCX_NET_DEVICES": host, **self._environment}
        prefix = self.network.enter(host)
        self._start(name, arguments, *flags, prefix=prefix, environment=environment)

    def _arguments(self, name: str, host: str) -> list[str]:
        if name == "gateway":
            return ["gateway", "--rpc.port", str(RPC_PORT)]
        near, far = f"unix:{self._folder / HERE / 'gateway.sock'}", f"{ADDRESSES[HERE]}:{RPC_PORT}"
        role = name.partition("-")[0]
        gateway = near if host == HERE else far
        return ["worker", "--role", role, "--id", name, "--gateway", gateway]

    def _relay(self) -> None:
        program = str(Path(__file__).with_name("http_relay.py"))
        self._processes["relay"] = subprocess.Popen(
            [*self.network.enter(HERE), sys.executable, program, str(self._folder)],
            env={**os.environ, "PYTHONPATH": ""},
        )
        wait_for((self._folder / "admin.sock").exists, START_S, "the relay")
