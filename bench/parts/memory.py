"""Drives a served model until pools and stores are full, and reads the workers' peaks."""

from __future__ import annotations

import json
import random
import socket
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from baton.model_spec import ModelSpec
from parts.processes import running, wait_until

PROMPT_TOKENS = 1000
NUM_SHORT = 32


class Peaks(msgspec.Struct, frozen=True):
    """One worker, in bytes.

    What shows that pool and store were filled: `shared_bytes` is what it has touched of block
    stores at the end, `grown_bytes` by how much its own memory has grown since it was ready.
    """

    worker: str
    peak_bytes: int
    weight_bytes: int
    kv_bytes: int
    store_bytes: int
    shared_bytes: int
    grown_bytes: int

    @property
    def over_bytes(self) -> int:
        """What is not weights, pool or store."""
        return self.peak_bytes - self.weight_bytes - self.kv_bytes - self.store_bytes


def measure(model: Path, spec: ModelSpec, kv_bytes: int, store_bytes: int) -> list[Peaks]:
    """Serve `model` as 1P1D, fill pools and stores, and stop it."""
    port, admin_port = _free_port(), _free_port()
    num_prompts = kv_bytes // spec.kv_bytes_per_token() // PROMPT_TOKENS + 2
    serve = (
        "-m", "baton", "serve", "--model", str(model), "--layout", "1P1D", "--port", str(port),
        "--gateway.admin-port", str(admin_port), "--engine.kv-cache-bytes", str(kv_bytes),
        "--store.max-bytes", str(store_bytes), "--log.level", "warning",
    )  # fmt: skip
    with running(*serve) as process:
        wait_until(lambda: _is_ready(port), process)
        workers = _workers(process.pid)
        start = {name: _status(pid) for name, pid in workers.items()}
        rng = random.Random(0)
        longs = [[rng.randrange(256) for _ in range(PROMPT_TOKENS)] for _ in range(num_prompts)]
        shorts = [[rng.randrange(256) for _ in range(20)] for _ in range(NUM_SHORT)]
        with ThreadPoolExecutor(NUM_SHORT) as clients:
            list(clients.map(lambda prompt: _ask(port, model.name, prompt), longs + shorts))
        end = {name: _status(pid) for name, pid in workers.items()}
        stores = {name: _store_bytes(pid) for name, pid in workers.items()}
    if process.returncode != 0:
        raise RuntimeError(f"baton serve ended with code {process.returncode}")
    weight_bytes = 2 * spec.num_parameters()
    return [
        Peaks(
            worker=name,
            peak_bytes=end[name]["VmHWM"],
            weight_bytes=weight_bytes,
            kv_bytes=kv_bytes,
            store_bytes=store_bytes,
            shared_bytes=stores[name],
            grown_bytes=end[name]["RssAnon"] - start[name]["RssAnon"],
        )
        for name in sorted(workers)
    ]


def _ask(port: int, model: str, prompt: list[int]) -> None:
    body = {"model": model, "prompt": prompt, "max_tokens": 3, "temperature": 1.0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        usage = json.load(answer)["usage"]
    if usage["prompt_tokens"] != len(prompt):
        raise RuntimeError(f"asked {len(prompt)} tokens, {usage} came back")


def _workers(supervisor: int) -> dict[str, int]:
    """Worker id → process id, of the supervisor's children."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
            words = (directory / "cmdline").read_bytes().decode().split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        if parent == supervisor and "--id" in words:
            found[words[words.index("--id") + 1]] = int(directory.name)
    if len(found) != 2:
        raise RuntimeError(f"the workers of process {supervisor} are {found}")
    return found


def _status(pid: int) -> dict[str, int]:
    """The sizes in /proc/PID/status, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    words = [line.split() for line in lines if line.endswith(" kB")]
    return {name.rstrip(":"): int(size) * 1024 for name, size, _ in words}


def _store_bytes(pid: int) -> int:
    """Resident bytes of block stores: its own and those that it reads."""
    total, inside = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            inside = "/memfd:baton-store" in line
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def _is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
