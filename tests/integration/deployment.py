"""A real `baton serve` with real workers, and the proof that it leaves nothing behind.

    with Deployment.start(model_dir, "1P1D", "--engine.num-kv-blocks", "64") as served:
        served.client().completions.create(...)

The end of the `with` block asserts *drained* (`Deployment.check_drained`), stops the deployment
with SIGTERM and asserts a clean end (`Deployment.stop`): exit code 0, no process, no runtime
directory, no traceback. When the block raised, the deployment is only killed.

What processes there are is read from /proc: everything below the supervisor, and everything that
inherited this deployment's own environment, wherever it went.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 40.0
LEASE_TTL_S = 2.0
"""Short, so that a lease which nobody releases is seen to end."""
DRAIN_TIMEOUT_S = 5.0 + LEASE_TTL_S
POLL_S = 0.05

MUST_BE_ZERO = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "num_leases",
    "num_store_frames_held",
    "num_store_frames_reserved",
    "num_block_transfers",
)
MUST_NOT_BE_SAID = re.compile(
    r"Traceback \(most recent call last\)|exception was never retrieved|was never awaited"
    r"|Task was destroyed|ResourceWarning|leaked (semaphore|shared_memory)",
)


class Deployment:
    """One running `baton serve`; use `Deployment.start`.

    `url` and `admin_url` are the roots of the two listeners. `lines` is all it has written so far,
    standard output and error together.
    """

    program = "baton"
    """The module that is run."""

    def __init__(
        self, model: Path, layout: str, flags: tuple[str, ...], *, faults_expected: bool
    ) -> None:
        self.layout = layout
        self.model = model.resolve().name
        self.faults_expected = faults_expected
        self.lines: list[str] = []
        self._said = threading.Condition()
        self._home = Path(tempfile.mkdtemp(prefix="bt"))  # short: socket paths are bounded
        (self._home / "run").mkdir()
        port, admin_port = free_ports(2)
        self.url, self.admin_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin_port}"
        command = [sys.executable, "-m", self.program, "serve", "--model", str(model)]
        command += ["--layout", layout, "--port", str(port), "--admin-port", str(admin_port)]
        command += ["--store.lease-ttl-s", f"{LEASE_TTL_S:g}", *flags]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        environment |= {"XDG_RUNTIME_DIR": str(self._home / "run"), "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._closing = contextlib.ExitStack()
        self._memfds: dict[int, int] = {}
        self._stopped = False

    @classmethod
    @contextlib.contextmanager
    def start(
        cls, model: Path, layout: str, *flags: str, faults_expected: bool = False
    ) -> Iterator[Deployment]:
        """Serve `model`; `flags` are further arguments of `baton serve`.

        With `faults_expected`, fallbacks, expired leases and restarted workers are no failure.
        """
        deployment = cls(model, layout, flags, faults_expected=faults_expected)
        try:
            deployment.wait_for_line("Ready after", START_TIMEOUT_S)
            deployment._memfds = deployment.memfds()
            yield deployment
            if not deployment._stopped:
                deployment.check_drained()
                deployment.stop()
        finally:
            deployment._kill()

    # Talking to it ------------------------------------------------------------------------------

    def client(self, timeout_s: float = 120.0) -> openai.OpenAI:
        """The official client; closed with the deployment."""
        client = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=timeout_s
        )
        self._closing.callback(client.close)
        return client

    def async_client(self, timeout_s: float = 120.0) -> openai.AsyncOpenAI:
        """The official asynchronous client; the caller closes it (`async with`)."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1",
            api_key="none",
            max_retries=0,
            timeout=timeout_s,
            http_client=httpx.AsyncClient(limits=limits, timeout=timeout_s, trust_env=False),
        )

    def metrics(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Every sample of /metrics by (name, sorted labels)."""
        families = text_string_to_metric_families(self._admin("/metrics").text)
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in families
            for sample in family.samples
            if not sample.name.endswith("_created")
        }

    def counters(self) -> dict[str, dict[str, float]]:
        """Totals of each worker's events, and its gauges, by worker id."""
        found: dict[str, dict[str, float]] = {}
        for (name, labels), value in self.metrics().items():
            label = dict(labels)
            if "worker" not in label:
                continue
            short = name.removeprefix("baton_").removeprefix("worker_")
            found.setdefault(label["worker"], {})[label.get("event", short)] = value
        return found

    def requests(self) -> list[dict[str, Any]]:
        """The waterfalls of the last requests that ended, newest first."""
        recent: list[dict[str, Any]] = self._admin("/requests").json()
        return recent

    def _admin(self, path: str) -> httpx.Response:
        response = httpx.get(f"{self.admin_url}{path}", timeout=20, trust_env=False)
        return response.raise_for_status()

    # Watching it --------------------------------------------------------------------------------

    @property
    def output(self) -> str:
        with self._said:
            return "".join(self.lines)

    @property
    def pid(self) -> int:
        """Of the supervisor."""
        return self._process.pid

    def processes(self) -> dict[str, int]:
        """Process ids by name: `gateway`, `prefill-0`, …; the supervisor is not among them."""
        found = {}
        for pid in _children(self.pid):
            words = _command_line(pid)
            if "gateway" in words[:5] and "--runtime-dir" in words:
                found["gateway"] = pid
            elif "--id" in words:
                found[words[words.index("--id") + 1]] = pid
        return found

    def memfds(self) -> dict[int, int]:
        """How many memfds each live process has open, by process id."""
        return {pid: _num_memfds(pid) for pid in (self.pid, *_descendants(self.pid))}

    def wait_for_line(self, text: str, timeout_s: float = 30.0, *, start: int = 0) -> str:
        """The first line, from line `start` on, that holds `text`."""

        def found() -> str | None:
            return next((line for line in self.lines[start:] if text in line), None)

        with self._said:
            self._said.wait_for(
                lambda: found() is not None or not self._reader.is_alive(), timeout_s
            )
            line = found()
            assert line is not None, f"{text!r} was not said; it said:\n{''.join(self.lines)}"
            return line

    def until(
        self, condition: Callable[[], object], timeout_s: float = 15.0, what: str = "it"
    ) -> None:
        """Poll `condition` until it is true; for what can be seen only by asking."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not happen; it said:\n{self.output}"
            time.sleep(POLL_S)

    # Ending it ----------------------------------------------------------------------------------

    def check_drained(self, timeout_s: float = DRAIN_TIMEOUT_S) -> None:
        """Assert that no worker holds anything and no request is open, at once or very soon."""
        deadline = time.monotonic() + timeout_s
        while problems := self._undrained() or self._grown_memfds():
            assert time.monotonic() < deadline, f"not drained: {problems}\n{self.output}"
            time.sleep(POLL_S)
        if not self.faults_expected:
            faults = self._faults()
            assert not faults, f"{faults}\n{self.output}"

    def stop(self) -> None:
        """SIGTERM, and assert that everything ends cleanly and nothing is left. Idempotent."""
        if self._stopped:
            return
        self._stopped = True
        runtime_dirs = [_option(pid, "--runtime-dir") for pid in self.processes().values()]
        self._closing.close()
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not stop; it said:\n{self.output}") from None
        # The output ends when the last process that could write to it has ended.
        self._reader.join(5.0)
        orphans = {pid: _command_line(pid) for pid in _inheritors(str(self._home))}
        assert not orphans, orphans
        assert code == 0, f"exit code {code}; it said:\n{self.output}"
        left = [path for path in runtime_dirs if path is not None and os.path.exists(path)]
        assert not left and not list((self._home / "run").iterdir()), left
        if not self.faults_expected:
            said = MUST_NOT_BE_SAID.search(self.output)
            assert said is None, f"it said {said.group()!r}:\n{self.output}"

    def _undrained(self) -> dict[str, float] | dict[str, int]:
        """What is still held, by `worker: gauge`."""
        metrics = self.metrics()
        held = {
            f"{worker}: {gauge}": values[gauge]
            for worker, values in self.counters().items()
            for gauge in MUST_BE_ZERO
            if values.get("up") and values[gauge] != 0
        }
        open_requests = metrics[("baton_num_requests_running", ())]
        return held | ({"gateway: open requests": open_requests} if open_requests else {})

    def _grown_memfds(self) -> dict[str, int]:
        """Processes with more memfds than at their start; one started later counts as its like."""
        most = max(self._memfds.values())
        return {
            f"process {pid}: memfds": count
            for pid, count in self.memfds().items()
            if count > self._memfds.get(pid, most)
        }

    def _faults(self) -> dict[str, float]:
        """Fallbacks, leases that ran out, requests placed again: none where nothing failed."""
        found = {
            f"{worker}: {event}": total
            for worker, events in self.counters().items()
            for event, total in events.items()
            if total and (event.startswith("fallback_") or event == "leases_expired")
        }
        for (name, labels), total in self.metrics().items():
            event = dict(labels).get("event")
            if name == "baton_gateway_events_total" and event in ("placed_again", "given_up"):
                found |= {f"gateway: {event}": total} if total else {}
        return found

    def _kill(self) -> None:
        self._closing.close()
        if self._process.poll() is None:
            self._process.kill()  # the kernel then kills its children
        self._process.wait()
        self._reader.join(5.0)
        for pid in _inheritors(str(self._home)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self._process.stdout is not None and not self._reader.is_alive():
            self._process.stdout.close()
        shutil.rmtree(self._home, ignore_errors=True)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._said:
                self.lines.append(line)
                self._said.notify_all()
        with self._said:
            self._said.notify_all()


def free_ports(count: int) -> list[int]:
    """Of the loopback interface, free a moment ago."""
    with contextlib.ExitStack() as stack:
        ports = []
        for _ in range(count):
            sock = stack.enter_context(socket.socket())
            sock.bind(("127.0.0.1", 0))
            ports.append(int(sock.getsockname()[1]))
        return ports


def _children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(stat.parent.name))
    return found


def _descendants(pid: int) -> list[int]:
    children = _children(pid)
    return children + [one for child in children for one in _descendants(child)]


def _inheritors(text: str) -> list[int]:
    """Live processes, other than this one, whose environment at their start held `text`."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if text.encode() in environ.read_bytes() and int(environ.parent.name) != os.getpid():
                found.append(int(environ.parent.name))
    return found


def _command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]
    except OSError:
        return []


def _option(pid: int, name: str) -> str | None:
    words = _command_line(pid)
    return words[words.index(name) + 1] if name in words else None


def _num_memfds(pid: int) -> int:
    count = 0
    with contextlib.suppress(OSError):
        for fd in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                count += os.readlink(fd.path).startswith("/memfd:")
    return count
