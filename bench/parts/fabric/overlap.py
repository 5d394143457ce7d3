"""The gap between a client's first two tokens while a prompt's KV crosses a slow link.

Real processes: a gateway, a prefill and a decode worker over tcp, and between the two a proxy that
lets through 1 Gbit/s. A prompt of 4,096 tokens is computed in chunks of 512; blocks are fetched as
they are sealed, or (`fabric.fetch_early` off) after the prompt is done. The two deployments take
turns, one stopped while the other is measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np

from baton.rpc.auth import create_secret
from parts.big_model import write_model
from parts.fabric import Row
from parts.processes import BENCH_DIR, running, wait_until

PROMPT_TOKENS = 4096
CHUNK_TOKENS = 512
LINK_BYTES_PER_S = 125e6
NUM_TOKENS = 8
READY_S = 120.0


def measure(rounds: int) -> list[Row]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bt")))
        model = folder / "model"
        spec = write_model(model)
        served = {
            name: stack.enter_context(_Deployment.running(folder / name, model, early))
            for name, early in (("early", True), ("after", False))
        }
        for deployment in served.values():
            deployment.ask(random.Random(0))  # the first of everything
        gaps: dict[str, list[tuple[float, float]]] = {name: [] for name in served}
        for number in range(1, rounds + 1):
            names = list(served)[:: 1 if number % 2 else -1]
            for name in names:
                with _others_stopped(served, name):
                    gaps[name].append(served[name].ask(random.Random(number)))
        early_blocks = [r["num_early_blocks"] for r in served["early"].requests()[:rounds]]
        assert all(r["num_early_blocks"] == 0 for r in served["after"].requests())
    kv_bytes = PROMPT_TOKENS * spec.kv_bytes_per_token(spec.dtype)
    crossing_s = kv_bytes / LINK_BYTES_PER_S
    early, after = (np.array([gap for gap, _ in gaps[name]]) for name in ("early", "after"))
    step_s = float(np.median([step for each in gaps.values() for _, step in each]))
    bound_s = 0.35 * crossing_s + step_s
    note = f"KV {kv_bytes / 1e6:.0f} MB crosses in {crossing_s:.2f} s, a step is {step_s:.3f} s"
    span = f"{early.min():.3g} to {early.max():.3g} s"
    return [
        Row("gap, fetched early", float(np.median(early)), "s", f"≤ {bound_s:.3g}", span),
        Row("gap, fetched after", float(np.median(after)), "s", "", note),
        Row("early ÷ after", float(np.median(early / after)), "", "≤ 0.35", f"{rounds} rounds"),
        Row(
            "blocks there before the first token",
            float(np.median(early_blocks)),
            f"of {PROMPT_TOKENS // 16}",
        ),
    ]


class _Deployment:
    def __init__(self, port: int, admin_port: int, pids: list[int]) -> None:
        self._url = f"http://127.0.0.1:{port}"
        self._admin_url = f"http://127.0.0.1:{admin_port}"
        self.pids = pids

    @classmethod
    @contextlib.contextmanager
    def running(cls, folder: Path, model: Path, early: bool) -> Iterator[_Deployment]:
        folder.mkdir(mode=0o700)
        create_secret(folder)
        port, admin_port, tcp_port = _free_ports(3)
        common = ("--model", str(model), "--engine.max-num-batched-tokens", str(CHUNK_TOKENS))
        # One connection: the proxy's rate is that of a connection.
        common += ("--fabric.transport", "tcp", "--fabric.tcp-streams", "1")
        common += ("--store.max-bytes", "1GiB")
        common += ("--fabric.fetch-early", str(early).lower(), "--engine.kv-cache-bytes", "1GiB")
        with contextlib.ExitStack() as stack:

            def start(*arguments: str) -> subprocess.Popen[bytes]:
                name = arguments[arguments.index("--id") + 1] if "--id" in arguments else "gateway"
                log = stack.enter_context((folder / f"{name}.log").open("wb"))
                return stack.enter_context(running(*arguments, stdout=log.fileno()))

            faults = json.dumps([{"type": "Throttle", "bytes_per_s": LINK_BYTES_PER_S}])
            proxy = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "parts.fault_proxy",
                    f"127.0.0.1:{tcp_port}",
                    "--down",
                    faults,
                ],
                env={**os.environ, "PYTHONPATH": _python_path()},
                stdin=subprocess.PIPE,  # it ends when this does
                stdout=subprocess.PIPE,
            )
            stack.callback(proxy.wait)
            stack.callback(proxy.terminate)
            assert proxy.stdout is not None
            public = f"127.0.0.1:{int(proxy.stdout.readline())}"
            gateway = start(
                "-m", "baton", "gateway", "--runtime-dir", str(folder), *common,
                "--port", str(port), "--admin-port", str(admin_port),
            )  # fmt: skip
            workers = [
                start(
                    "-m", "baton", "worker", "--runtime-dir", str(folder), *common,
                    "--gateway", f"unix:{folder / 'gateway.sock'}",
                    "--role", role, "--id", f"{role}-0", *own,
                )
                for role, own in (
                    (
                        "prefill",
                        ("--fabric.tcp-port", str(tcp_port), "--fabric.tcp-advertise", public),
                    ),
                    ("decode", ("--fabric.tcp-port", "0")),
                )
            ]  # fmt: skip
            wait_until(lambda: _is_ready(port), gateway, READY_S)
            yield cls(port, admin_port, [p.pid for p in (gateway, *workers, proxy)])

    def ask(self, rng: random.Random) -> tuple[float, float]:
        """Seconds from token 1 to token 2, and the usual gap after that."""
        prompt = [rng.randrange(100, 30_000) for _ in range(PROMPT_TOKENS - 1)]
        body = {"prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "stream": True}
        body |= {"ignore_eos": True, "return_token_ids": True, "model": self._model()}
        times: list[float] = []
        url = f"{self._url}/v1/completions"
        with httpx.stream("POST", url, json=body, timeout=120, trust_env=False) as reply:
            reply.raise_for_status()
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    ids = json.loads(line[6:])["choices"][0].get("token_ids") or ()
                    times += [time.monotonic()] * len(ids)
        gaps = np.diff(times)
        return float(gaps[0]), float(np.median(gaps[1:]))

    def requests(self) -> list[dict[str, int]]:
        found: list[dict[str, int]] = httpx.get(
            f"{self._admin_url}/requests", timeout=20, trust_env=False
        ).json()
        return found

    def _model(self) -> str:
        models = httpx.get(f"{self._url}/v1/models", timeout=20, trust_env=False).json()
        return str(models["data"][0]["id"])


@contextlib.contextmanager
def _others_stopped(served: dict[str, _Deployment], name: str) -> Iterator[None]:
    pids = [pid for other, each in served.items() if other != name for pid in each.pids]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        time.sleep(1.0)  # what was late catches up


def _is_ready(port: int) -> bool:
    try:
        url = f"http://127.0.0.1:{port}/ready"
        return httpx.get(url, timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def _python_path() -> str:
    return os.pathsep.join([str(BENCH_DIR), *filter(None, [os.environ.get("PYTHONPATH")])])


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [int(sock.getsockname()[1]) for sock in sockets]
