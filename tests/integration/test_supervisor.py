"""The supervisor with fake children: real processes, real signals."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

FAKE_SERVE = Path(__file__).with_name("fake_serve.py")


class Deployment:
    """A running fake `baton serve`."""

    def __init__(self, directory: Path, modes: dict[str, str], **launch: object) -> None:
        self.directory = directory
        overrides = {"model.path": "demo", "gateway.port": 0, "gateway.admin_port": 0}
        overrides |= {"launch.restart_backoff_s": 0.1}
        overrides |= {f"launch.{name}": value for name, value in launch.items()}
        (directory / "run").mkdir()
        self.process = subprocess.Popen(
            [sys.executable, FAKE_SERVE, directory, json.dumps(overrides), json.dumps(modes)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "XDG_RUNTIME_DIR": str(directory / "run"),
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
        )

    def events(self) -> list[list[str]]:
        path = self.directory / "events"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def named(self, *kinds: str) -> list[str]:
        return [f"{event[0]} {event[1]}" for event in self.events() if event[1] in kinds]

    def pids(self) -> set[int]:
        return {int(event[2]) for event in self.events() if event[1] in ("start", "family")}

    def until(self, condition: Callable[[], object], timeout_s: float = 15.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, (self.events(), self.process.poll())
            time.sleep(0.01)

    def until_up(self, *names: str) -> None:
        self.until(lambda: all((self.directory / f"up-{name}").exists() for name in names))

    def until_ready(self) -> str:
        """Wait for the announcement on standard output, and return it."""
        assert self.process.stdout is not None
        lines = []
        while "curl" not in (lines or [""])[-1]:
            lines.append(self.process.stdout.readline())
            assert lines[-1], "it ended before it was ready"
        return "".join(lines)

    def end(self, timeout_s: float = 15.0) -> tuple[int, str]:
        """Wait for the supervisor's end; its exit code and standard error. Nothing may be left."""
        _, errors = self.process.communicate(timeout=timeout_s)
        assert self.alive() == set()
        assert list((self.directory / "run").iterdir()) == []
        return self.process.returncode, errors

    def alive(self) -> set[int]:
        return {pid for pid in self.pids() if _is_alive(pid)}


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


Start = Callable[..., Deployment]


@pytest.fixture
def start() -> Iterator[Start]:
    with contextlib.ExitStack() as stack:

        def start(modes: dict[str, str] | None = None, **launch: object) -> Deployment:
            directory = Path(tempfile.mkdtemp(prefix="bt"))  # short: socket paths are bounded
            stack.callback(shutil.rmtree, directory)
            deployment = Deployment(directory, modes or {}, **launch)
            stack.callback(_kill, deployment)
            return deployment

        yield start


def _kill(deployment: Deployment) -> None:
    deployment.process.kill()
    deployment.process.communicate()
    for pid in deployment.alive():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


ALL = ("gateway", "prefill-0", "decode-0")


def test_drains_the_gateway_first_and_leaves_nothing(start: Start) -> None:
    deployment = start()
    said = deployment.until_ready()
    assert "Ready after" in said and "curl -N http://127.0.0.1:" in said
    deployment.until_up(*ALL)
    runtime = Path(deployment.events()[0][4])
    assert runtime.parent == deployment.directory / "run"
    assert runtime.stat().st_mode & 0o777 == 0o700
    assert (runtime / "secret").stat().st_mode & 0o777 == 0o600
    for _, _, pid, session, _ in deployment.events():
        assert pid == session  # a terminal's Ctrl-C does not reach it
    deployment.process.send_signal(signal.SIGINT)
    code, errors = deployment.end()
    assert code == 0, errors
    ends = deployment.named("term", "exit")
    assert ends[:2] == ["gateway term", "gateway exit"]
    assert sorted(ends[2:]) == [
        "decode-0 exit", "decode-0 term", "prefill-0 exit", "prefill-0 term",
    ]  # fmt: skip
    for name in ALL:
        assert f"[{name}] hello out\n" in errors
        assert f"[{name}] hello err\n" in errors
    assert "SIGINT: finishing open requests" in errors
    assert "\x1b" not in errors  # not a terminal


def test_dead_children_come_back_with_back_off(start: Start) -> None:
    deployment = start(layout="1U")
    deployment.until_ready()
    for restarts in (1, 2):
        deployment.until_up("unified-0")
        (deployment.directory / "up-unified-0").unlink()
        (deployment.directory / "crash-unified-0").touch()
        deployment.until(lambda n=restarts: deployment.named("start").count("unified-0 start") > n)
    deployment.until_up("unified-0")
    deployment.process.send_signal(signal.SIGTERM)
    code, errors = deployment.end()
    assert code == 0
    assert "unified-0 ended with exit code 9; starting it again in 0.1 s" in errors
    assert "unified-0 ended with exit code 9; starting it again in 0.2 s" in errors


def test_killed_child_comes_back(start: Start) -> None:
    deployment = start(layout="1U")
    deployment.until_ready()
    gateway = next(int(e[2]) for e in deployment.events() if e[0] == "gateway")
    os.kill(gateway, signal.SIGKILL)
    deployment.until(lambda: deployment.named("start").count("gateway start") == 2)
    deployment.process.send_signal(signal.SIGTERM)
    code, errors = deployment.end()
    assert (code, "signal SIGKILL" in errors) == (0, True)


def test_one_that_stays_frozen_is_killed_and_comes_back(start: Start) -> None:
    """Only when it was frozen for so long; and only those that are there."""
    deployment = start(kill_frozen_after_s=5)
    deployment.until_ready()
    deployment.until_up(*ALL)
    frozen = deployment.directory / "frozen"
    frozen.write_text('{"decode-0": 4.9, "prefill-9": 60}')
    time.sleep(2.5)
    assert len(deployment.named("start")) == 3
    (deployment.directory / "up-decode-0").unlink()
    frozen.write_text('{"decode-0": 5.1, "prefill-9": 60}')
    deployment.until(lambda: deployment.named("start").count("decode-0 start") == 2)
    frozen.unlink()
    deployment.until_up("decode-0")
    deployment.process.send_signal(signal.SIGTERM)
    code, errors = deployment.end()
    assert (code, "signal SIGKILL" in errors) == (0, True)
    assert "decode-0 has stood still for 5 s: killing it" in errors
    assert deployment.named("start").count("prefill-0 start") == 1


def test_by_default_nobody_is_killed_for_it(start: Start) -> None:
    deployment = start()
    deployment.until_ready()
    (deployment.directory / "frozen").write_text('{"decode-0": 999}')
    time.sleep(2.5)
    assert len(deployment.named("start")) == 3


def test_gives_up_after_max_restarts(start: Start) -> None:
    deployment = start({"prefill-0": "crash-later:1"}, max_restarts=2)
    deployment.until_ready()
    (deployment.directory / "later").touch()
    code, errors = deployment.end()
    assert (code, "giving up" in errors) == (1, True)
    assert deployment.named("start").count("prefill-0 start") == 3
    assert "gateway exit" in deployment.named("exit")  # open requests were finished


def test_second_signal_forces(start: Start) -> None:
    deployment = start({"gateway": "stubborn"}, drain_timeout_s=60)
    deployment.until_ready()
    deployment.until_up(*ALL)
    deployment.process.send_signal(signal.SIGTERM)
    deployment.until(lambda: deployment.named("term"))
    time.sleep(0.2)
    assert deployment.process.poll() is None
    started = time.monotonic()
    deployment.process.send_signal(signal.SIGINT)
    code, errors = deployment.end()
    assert time.monotonic() - started < 10
    assert (code, "stopping at once: killing gateway" in errors) == (1, True)


def test_drain_timeout_kills(start: Start) -> None:
    deployment = start({"gateway": "stubborn"}, drain_timeout_s=0.3)
    deployment.until_ready()
    deployment.process.send_signal(signal.SIGTERM)
    code, errors = deployment.end()
    assert (code, "time is over: killing gateway" in errors) == (1, True)


@pytest.mark.parametrize(("exit_code", "starts"), [(1, 2), (2, 1)])
def test_a_child_that_cannot_start_ends_it_quickly(
    start: Start, exit_code: int, starts: int
) -> None:
    deployment = start({"gateway": f"crash:{exit_code}"}, restart_backoff_s=0.1)
    code, errors = deployment.end()
    assert code == 1
    assert deployment.named("start").count("gateway start") == starts
    assert f"gateway ended with exit code {exit_code}, giving up" in errors
    assert "\n  no such model: /nowhere\n" in errors


def test_start_timeout(start: Start) -> None:
    deployment = start({"gateway": "never-up"}, start_timeout_s=0.5)
    code, errors = deployment.end()
    assert (code, "not ready after 0.5 s: the gateway is starting" in errors) == (1, True)


def test_kill_9_of_the_supervisor_leaves_no_process(start: Start) -> None:
    deployment = start({"prefill-0": "stubborn"})
    deployment.until_ready()
    deployment.until_up(*ALL)
    assert len(deployment.alive()) == 3
    deployment.process.kill()
    deployment.until(lambda: not deployment.alive(), 10)
    # Its directory is left, and the next start removes it.
    (left,) = (deployment.directory / "run").iterdir()
    program = "from baton.launch.runtime_dir import runtime_dir\nwith runtime_dir(): pass"
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(left.parent)}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=30)
    assert not left.exists()


def test_what_a_child_started_dies_with_it(start: Start) -> None:
    deployment = start({"decode-0": "family"})
    deployment.until_ready()
    deployment.until(lambda: deployment.named("family"))
    assert len(deployment.alive()) == 4
    deployment.process.send_signal(signal.SIGTERM)
    assert deployment.end()[0] == 0


def test_signal_while_starting(start: Start) -> None:
    deployment = start({"gateway": "crash:1"}, restart_backoff_s=30, restart_backoff_max_s=30)
    deployment.until(lambda: deployment.named("start"))
    time.sleep(0.3)
    deployment.process.send_signal(signal.SIGTERM)
    assert deployment.end()[0] == 0
