"""Baton and its peers as HTTP servers on this machine: how each is started, and its end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from baton.cli.endpoint import Endpoint, connect
from parts.peers.engines import Broken, Missing, Setting, find_missing, llama_tools
from parts.peers.vllm_env import vllm_env
from parts.processes import BENCH_DIR

MAX_NUM_SEQS = 64
START_TIMEOUT_S = 300


class Process(msgspec.Struct, frozen=True):
    """One process of a server; `ready` is the URL that answers 200 once it serves.

    `pauses`: it may be stopped with all that it has started. vLLM's worker spins for a second
    after its last step, on a core that whoever is measured next would like to have.
    """

    words: tuple[str, ...]
    ready: str
    env: dict[str, str] = {}
    pauses: bool = True


class Server(msgspec.Struct, frozen=True):
    """How to start one; clients talk to `url`. `budget` is its token budget a step, if it has one.

    `flags` are the ones that tune it, for the report.
    """

    name: str
    url: str
    processes: tuple[Process, ...]
    flags: str


def baton(setting: Setting, layout: str, budget: int) -> Server:
    """`baton serve` with cores shared out among its workers; the block stores hold half a pool."""
    port, admin_port = free_ports(2)
    kv_bytes = setting.kv_tokens * setting.spec.kv_bytes_per_token()
    tuned = ("--layout", layout, "--engine.kernels", "native")
    tuned += ("--engine.max-num-batched-tokens", str(budget))
    sizes = ("--engine.kv-cache-bytes", str(kv_bytes), "--store.max-bytes", str(kv_bytes // 2))
    sizes += ("--engine.max-num-seqs", str(MAX_NUM_SEQS))
    listen = ("--port", str(port), "--gateway.admin-port", str(admin_port))
    command = (sys.executable, "-m", "baton", "serve", "--model", str(setting.model))
    words = (*command, *tuned, *sizes, *listen, "--log.level", "warning")
    url = f"http://127.0.0.1:{port}"
    # Its own parts are in sessions of their own, watch each other's time, and sleep when idle.
    process = Process(words, f"{url}/ready", pauses=False)
    return Server(f"baton {layout}", url, (process,), " ".join(tuned))


def llama_server(setting: Setting, budget: int) -> Server | Missing:
    if (missing := find_missing("llama.cpp", setting.peers)) is not None:
        return missing
    (port,) = free_ports(1)
    tuned = ("-b", str(budget), "-ub", str(min(budget, 512)), "-fa", "on", "--kv-unified")
    tuned += ("-np", "32", "-t", str(setting.threads), "--cache-ram", "0")
    words = (str(llama_tools(setting.peers) / "llama-server"), "-m", str(setting.gguf), *tuned)
    words += ("-c", str(setting.kv_tokens), "--port", str(port), "--offline")
    url = f"http://127.0.0.1:{port}"
    return Server("llama-server", url, (Process(words, f"{url}/health"),), " ".join(tuned))


def vllm(setting: Setting, budget: int) -> Server | Missing:
    if (missing := find_missing("vllm", setting.peers)) is not None:
        return missing
    (port,) = free_ports(1)
    process, flags = _vllm_process(setting, port, budget, range(setting.threads), {})
    return Server("vllm", f"http://127.0.0.1:{port}", (process,), flags)


def vllm_pd(setting: Setting, budget: int) -> Server | Missing:
    """One prefill and one decode instance, half of the cores each, and a proxy of our own.

    KV goes through vLLM's NIXL connector; the proxy asks the first for one token and passes the
    second's stream on (`nixl_proxy`).
    """
    if (missing := find_missing("vllm", setting.peers)) is not None:
        return missing
    ports = free_ports(3)
    side_channels = free_ports(2)
    half = max(1, setting.threads // 2)
    transfer = json.dumps(
        {
            "kv_connector": "NixlConnector",
            "kv_role": "kv_both",
            "kv_buffer_device": "cpu",
            "kv_connector_extra_config": {"num_threads": 0},
        }
    )
    processes = []
    for index in range(2):
        cores = range(index * half, (index + 1) * half)
        env = {
            "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_channels[index]),
        }
        extra = ("--kv-transfer-config", transfer)
        process, flags = _vllm_process(setting, ports[index], budget, cores, env, extra)
        processes.append(process)
    instances = [f"http://127.0.0.1:{port}" for port in ports[:2]]
    url = f"http://127.0.0.1:{ports[2]}"
    proxy = (sys.executable, "-m", "parts.peers.nixl_proxy", str(ports[2]), *instances)
    processes.append(Process(proxy, f"{url}/v1/models"))
    return Server("vllm 1P1D", url, tuple(processes), f"2 x ({flags} NixlConnector)")


def _vllm_process(
    setting: Setting, port: int, budget: int, cores: range, env: dict[str, str],
    extra: tuple[str, ...] = (),
) -> tuple[Process, str]:  # fmt: skip
    tuned = ("--dtype", "bfloat16", "--max-num-batched-tokens", str(budget))
    num_seqs = min(MAX_NUM_SEQS, budget)  # it refuses more sequences than tokens a step
    sizes = ("--max-num-seqs", str(num_seqs), "--max-model-len", "4096")
    words = (str(setting.peers / "vllm" / "bin" / "vllm"), "serve", str(setting.model), *tuned)
    words += (*sizes, "--port", str(port), "--host", "127.0.0.1", "--disable-uvicorn-access-log")
    kv_bytes = setting.kv_tokens * setting.spec.kv_bytes_per_token()
    variables = vllm_env(kv_bytes, cores) | env
    flags = " ".join((*tuned, f"cores {','.join(map(str, cores))}"))
    return Process((*words, *extra), f"http://127.0.0.1:{port}/health", variables), flags


class Running:
    """A server that answers at `endpoint`. It can be stopped while another one is measured."""

    def __init__(self, endpoint: Endpoint, groups: list[int]) -> None:
        self.endpoint = endpoint
        self._groups = groups

    def pause(self) -> None:
        for group in self._groups:
            os.killpg(group, signal.SIGSTOP)

    def go_on(self) -> None:
        for group in self._groups:
            os.killpg(group, signal.SIGCONT)


@contextlib.contextmanager
def running(server: Server, log: Path) -> Iterator[Running]:
    """The server until the block ends; then SIGTERM, and SIGKILL for the stubborn.

    Raises:
        Broken: it ended, or is not ready in time.
    """
    paths = [str(BENCH_DIR), *filter(None, [os.environ.get("PYTHONPATH")])]
    started: list[subprocess.Popen[bytes]] = []
    try:
        with log.open("wb") as output:
            for process in server.processes:
                words = process.words
                # vLLM must not see the packages of this environment.
                own = {"PYTHONPATH": os.pathsep.join(paths)} if words[0] == sys.executable else {}
                env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
                started.append(
                    subprocess.Popen(
                        words,
                        stdout=output,
                        stderr=output,
                        env=env | own | process.env,
                        start_new_session=True,
                    )
                )
        deadline = time.monotonic() + START_TIMEOUT_S
        for child, process in zip(started, server.processes, strict=True):
            while not _answers(process.ready):
                if child.poll() is not None or time.monotonic() > deadline:
                    last = log.read_text(errors="replace").strip().splitlines()[-3:]
                    raise Broken(f"{server.name} did not start: {last}")
                time.sleep(0.1)
        pairs = zip(started, server.processes, strict=True)
        groups = [child.pid for child, process in pairs if process.pauses]
        yield Running(connect(server.url, None, None), groups)
    finally:
        for child in reversed(started):
            _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    child.send_signal(signal.SIGTERM)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGCONT)  # it may be stopped
    try:
        child.wait(30)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # whatever it left behind


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def free_ports(count: int) -> list[int]:
    """Different ports, free now."""
    with contextlib.ExitStack() as stack:
        listeners = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [int(listener.getsockname()[1]) for listener in listeners]


SERVERS: dict[str, Callable[[Setting, int], Server | Missing]] = {
    "baton-1P1D": lambda setting, budget: baton(setting, "1P1D", budget),
    "baton-2U": lambda setting, budget: baton(setting, "2U", budget),
    "baton-1U": lambda setting, budget: baton(setting, "1U", budget),
    "vllm": vllm,
    "llama-server": llama_server,
    "vllm-1P1D": vllm_pd,
}
