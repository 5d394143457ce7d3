"""A prefill and a decode worker started one by one, with a bad network between them.

    with ByHand.start(model) as served:
        served.proxy.down = [Flip(at=100_000)]      # for connections made from now on
        served.ask(prompt, 8)
        assert served.proxy.hits["Flip"]

`ByHand` owns the proxy: the decode worker reads the prefill worker's blocks over tcp through
`proxy`, the gateway talks to both directly. Leases live for `LEASE_TTL_S`, so that a read ends, one
way or the other, within `READ_S`.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
from faults.one_by_one import OneByOne
from integration.deployment import LEASE_TTL_S, free_ports
from parts.fault_proxy import FaultProxy

from baton.core.imports import READ_WINDOW
from baton.rpc.auth import create_secret

READ_S = LEASE_TTL_S * READ_WINDOW
WORKERS = ("prefill-0", "decode-0")


class ByHand(OneByOne):
    """One gateway, `prefill-0` and `decode-0`; use `ByHand.start`."""

    def __init__(self, model: Path, folder: Path, flags: tuple[str, ...]) -> None:
        super().__init__(model, folder, WORKERS, ("--fabric.transport", "tcp", *flags))
        create_secret(folder)
        self._port, self._admin_port, self._tcp_port = free_ports(3)
        self.url = f"http://127.0.0.1:{self._port}"
        self.proxy = FaultProxy(("127.0.0.1", self._tcp_port), records=True)

    @classmethod
    @contextlib.contextmanager
    def start(cls, model: Path, *flags: str) -> Iterator[ByHand]:
        """Serve `model`. At the end everything stops in good order and is well."""
        folder = Path(tempfile.mkdtemp(prefix="bt"))
        try:
            served = cls(model, folder, flags)
            with contextlib.closing(served.proxy), served._running():
                served.until_whole()
                yield served
        finally:
            shutil.rmtree(folder)

    def http(self, listener: str = "public") -> httpx.Client:
        port = self._admin_port if listener == "admin" else self._port
        return httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False)

    def run(self, name: str) -> None:
        self._start(name, [*self._arguments(name), "--runtime-dir", str(self._folder)])

    def _arguments(self, name: str) -> list[str]:
        if name == "gateway":
            listen = ["--port", str(self._port), "--admin-port", str(self._admin_port)]
            # Workers are stopped here for what others do meanwhile, and shall keep their requests.
            return ["gateway", *listen, "--gateway.frozen-after-s", "600"]
        role = name.partition("-")[0]
        arguments = ["worker", "--role", role, "--id", name]
        arguments += ["--gateway", f"unix:{self._folder / 'gateway.sock'}"]
        if role == "decode":
            return [*arguments, "--fabric.tcp-port", "0"]
        arguments += ["--fabric.tcp-port", str(self._tcp_port)]
        return [*arguments, "--fabric.tcp-advertise", f"127.0.0.1:{self.proxy.address[1]}"]
