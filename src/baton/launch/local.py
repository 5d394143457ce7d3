"""`baton serve`: gateway and workers of one deployment on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from baton.config import Config, Layout, to_yaml
from baton.errors import ConfigError
from baton.launch.console import Console
from baton.launch.cores import share_out, usable_cores, waiting
from baton.launch.process import Child
from baton.launch.ready import FrozenProbe, ReadyProbe, base_url
from baton.launch.runtime_dir import runtime_dir
from baton.launch.supervisor import Frozen, Probe, Supervisor
from baton.model.region import create_memfd, reserve
from baton.rpc.auth import create_secret, read_secret
from baton.types import Role

Command = Callable[[str, Role | None, Path, Sequence[str]], list[str]]
"""(name, role, runtime directory, flags of its own) → the command line of a child.

The gateway has no role.
"""


def baton_command(
    name: str, role: Role | None, directory: Path, flags: Sequence[str] = ()
) -> list[str]:
    """`python -m baton gateway …` or `python -m baton worker --role … --id … …`."""
    command = [sys.executable, "-m", "baton", "gateway" if role is None else "worker"]
    if role is not None:
        command += ["--role", role.value, "--id", name]
    command += ["--runtime-dir", str(directory), "--config", str(directory / "config.yaml")]
    if role is not None:
        command += ["--gateway", f"unix:{directory / 'gateway.sock'}"]
    return [*command, *flags]


def worker_names(layout: Layout) -> dict[str, Role]:
    """`prefill-0`, `decode-0`, `unified-0`, … and their roles."""
    return {
        f"{role.value}-{i}": role for role, count in layout.counts().items() for i in range(count)
    }


def resolve(config: Config) -> Config:
    """Fill in what only the supervisor knows: free ports for 0."""
    gateway = config.gateway
    if gateway.port == 0:
        gateway = msgspec.structs.replace(gateway, port=_free_port(gateway.host))
    while gateway.admin_port in (0, gateway.port):
        gateway = msgspec.structs.replace(gateway, admin_port=_free_port(gateway.admin_host))
    return msgspec.structs.replace(config, gateway=gateway)


def serve(
    config: Config,
    *,
    command: Command = baton_command,
    probe: Probe | None = None,
    frozen: Frozen | None = None,
) -> int:
    """Run the deployment until SIGINT or SIGTERM.

    Returns 0 after a clean drain; 1 if it could not start, kept failing or had to be killed.

    Raises:
        ConfigError: the configuration cannot be used here.
    """
    config = resolve(config)
    check_ports(config)
    workers = worker_names(Layout.parse(config.launch.layout))
    shares = share_out(config, workers, sorted(os.sched_getaffinity(0)), usable_cores())
    console = Console()
    with runtime_dir() as directory, _weights_memfds(config, workers.values()) as memfds:
        if config.rpc.secret_file is None:
            create_secret(directory)
        else:
            read_secret(directory, config.rpc.secret_file)
        (directory / "config.yaml").write_text(to_yaml(config), encoding="utf-8")

        def worker(name: str, role: Role) -> Child:
            share = shares[name]
            descriptors = memfds[role]
            flags = [*share.flags(), *(f"--weights-fd={fd}" for fd in descriptors)]
            return Child(
                name,
                command(name, role, directory, flags),
                console,
                environment=waiting(share),
                descriptors=descriptors,
            )

        async def run() -> int:
            supervisor = Supervisor(
                Child("gateway", command("gateway", None, directory, ()), console),
                [worker(name, role) for name, role in workers.items()],
                config.launch,
                probe or ReadyProbe(config.gateway),
                lambda seconds: _announce(config, seconds),
                console,
                frozen or FrozenProbe(config.gateway),
            )
            return await supervisor.run()

        return asyncio.run(run())


@contextlib.contextmanager
def _weights_memfds(config: Config, roles: Iterable[Role]) -> Iterator[dict[Role, tuple[int, ...]]]:
    """The memory in which the workers share packed weights, if they may come to pack any.

    One for each type: roles may differ in theirs. It outlives the workers, so that one which
    starts again has its weights at once. It is taken from the system while they are starting.
    """
    with contextlib.ExitStack() as closing:
        of_type: dict[str, int] = {}
        found: dict[Role, tuple[int, ...]] = {}
        for role in set(roles):
            own = config.for_role(role)
            found[role] = ()
            if own.engine.kernels != "torch" and own.engine.device != "cuda":
                if own.model.dtype not in of_type:
                    of_type[own.model.dtype] = _weights_memfd(own)
                    closing.callback(os.close, of_type[own.model.dtype])
                found[role] = (of_type[own.model.dtype],)
        yield found


def _weights_memfd(config: Config) -> int:
    fd = create_memfd("baton-weights")
    files = Path(config.model.path).expanduser().glob("*.safetensors")
    num_bytes = sum(file.stat().st_size for file in files)
    # With a descriptor of its own, since nobody waits for its end.
    threading.Thread(target=_reserve, args=(os.dup(fd), num_bytes), daemon=True).start()
    return fd


def _reserve(fd: int, num_bytes: int) -> None:
    # That there is no memory is said by the worker that cannot have it.
    with contextlib.suppress(OSError):
        reserve(fd, num_bytes)
    os.close(fd)


def _announce(config: Config, seconds: float) -> None:
    url = base_url(config.gateway)
    with contextlib.suppress(OSError):  # the reader of our output is gone; serving goes on
        sys.stdout.write(
            f"\nReady after {seconds:.1f} s: "
            f"{config.model.name} ({config.launch.layout}) on {url}\n\n  {curl_line(config)}\n\n"
        )
        sys.stdout.flush()


def curl_line(config: Config) -> str:
    """A request to paste into a shell."""
    body = {
        "model": config.model.name,
        "messages": [{"role": "user", "content": "Hello!"}],
        "stream": True,
    }
    words = ["curl", "-N", f"{base_url(config.gateway)}/v1/chat/completions"]
    if config.gateway.tls_cert_file:
        words += ["--cacert", config.gateway.tls_cert_file]
    words += ["-H", "Content-Type: application/json", "-d", json.dumps(body, ensure_ascii=False)]
    line = shlex.join(words)
    if config.gateway.api_keys_file:
        line += ' -H "Authorization: Bearer $API_KEY"'  # for the shell to fill in
    return line


def check_ports(config: Config) -> None:
    """See that the gateway will be able to listen.

    Without this, a stranger who has the port already might answer the question whether we are
    ready.

    Raises:
        ConfigError: a port is taken, or the address is not this machine's.
    """
    gateway = config.gateway
    for name, host, port in (
        ("port", gateway.host, gateway.port),
        ("admin_port", gateway.admin_host, gateway.admin_port),
    ):
        try:
            with _bound(host, port):
                pass
        except OSError as error:
            raise ConfigError(
                f"gateway.{name} {port} on {host} cannot be listened on: {error.strerror}"
            ) from None


def _free_port(host: str) -> int:
    try:
        with _bound(host, 0) as probe:
            return int(probe.getsockname()[1])
    except OSError as error:
        raise ConfigError(f"gateway.host {host} cannot be listened on: {error.strerror}") from None


def _bound(host: str, port: int) -> socket.socket:
    probe = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
    except OSError:
        probe.close()
        raise
    return probe
