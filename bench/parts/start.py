"""Starts `baton serve` once, and tells when each of its processes came how far."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import msgspec

TIMEOUT_S = 120.0
POLL_S = 0.01
_LINE = re.compile(r"\[([\w-]+)\] [\d:]+ [A-Z]+ \S+ \S+ (.*)")
"""A line of a process's log, as the supervisor passes it on: name of the process, message."""
_SERVING = re.compile(r"listening |worker id=.* ready$")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Reached(msgspec.Struct):
    """When one process came how far, in seconds since the command was started; 0 if unknown."""

    started: float = 0.0
    imported: float = 0.0
    loaded: float = 0.0
    serving: float = 0.0


class Started(msgspec.Struct):
    """One start: `ready_s` until the deployment could serve, and what its processes did."""

    layout: str
    ready_s: float
    processes: dict[str, Reached]


def start(model: Path, layout: str, port: int, admin_port: int) -> Started:
    """Start a deployment, wait until it is ready, and end it.

    Raises:
        RuntimeError: it did not become ready.
    """
    words = (
        *(sys.executable, "-m", "baton", "serve", "--model", str(model), "--layout", layout),
        *("--port", str(port), "--gateway.admin-port", str(admin_port), "--log.level", "info"),
    )
    # Without it every start would compile Baton's modules again.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    began = time.clock_gettime(time.CLOCK_BOOTTIME)
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )
    lines: list[tuple[float, str]] = []
    threading.Thread(target=_read, args=(process, lines), daemon=True).start()
    try:
        while not _is_ready(f"http://127.0.0.1:{admin_port}/ready"):
            if process.poll() is not None or _now() - began > TIMEOUT_S:
                raise RuntimeError(f"{layout} did not start: {[line for _, line in lines[-3:]]}")
            time.sleep(POLL_S)
        ready_s = _now() - began
        born = _born(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    times = {name: born_s - began for name, born_s in born.items()}
    return Started(layout, ready_s, _reached(times, [(at - began, text) for at, text in lines]))


def _reached(started: dict[str, float], lines: list[tuple[float, str]]) -> dict[str, Reached]:
    """What the lines say of the processes that `started` names."""
    found = {name: Reached(at) for name, at in started.items()}
    for at, line in lines:
        match = _LINE.match(line)
        if match is None or (reached := found.get(match[1])) is None:
            continue
        message = match[2]
        reached.imported = reached.imported or at
        if message.startswith("engine device="):
            reached.loaded = at
        elif _SERVING.match(message):
            reached.serving = at
    return found


def _read(process: subprocess.Popen[str], lines: list[tuple[float, str]]) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        at = _now()  # of its coming
        lines.append((at, line.rstrip()))


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _born(supervisor: int) -> dict[str, float]:
    """When the gateway and the workers were started, since the machine was."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            stat = (directory / "stat").read_text().rpartition(")")[2].split()
            words = (directory / "cmdline").read_bytes().decode().split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        if int(stat[1]) == supervisor:
            name = words[words.index("--id") + 1] if "--id" in words else "gateway"
            found[name] = int(stat[19]) / _TICKS_PER_S
    return found


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
