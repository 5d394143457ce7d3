"""Every command in the README works as printed (`make` targets and installs excepted: CI's).

Blocks marked `bash` and `python` are run in order in the repository's root. A `baton serve` goes on
until the next one, or until a block marked `after stop`. Unmarked blocks are not commands.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(bash|python)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BIN = Path(sys.executable).parent


def blocks() -> list[tuple[str, str, str]]:
    return BLOCK.findall((ROOT / "README.md").read_text())


def environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}


class Server:
    """The README's `baton serve` of the moment."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def start(self, command: str) -> None:
        self.stop()
        self.process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("Ready after"):
                return
        pytest.fail(f"{command} ended with {self.process.wait()} before it was ready")

    def stop(self) -> None:
        if self.process is not None:
            assert self.process.stdout is not None
            self.process.send_signal(signal.SIGINT)
            self.process.stdout.close()
            assert self.process.wait(timeout=60) == 0
            self.process = None


def run(command: list[str]) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.timeout(400)
def test_every_command_in_the_readme_works() -> None:
    found = blocks()
    assert len(found) >= 10, "the README's blocks were not found"
    server = Server()
    outputs = []
    try:
        for language, mark, text in found:
            if mark.strip() == "after stop":
                server.stop()
            if language == "python":
                outputs.append(run([sys.executable, "-c", text]))
                continue
            for command in text.strip().splitlines():
                if command.startswith("baton serve"):
                    server.start(command)
                else:
                    outputs.append(run(["bash", "-o", "pipefail", "-ec", command]))
    finally:
        server.stop()
    everything = "\n".join(outputs)
    assert "Join two or more pathname components" in everything
    assert "baton_time_to_first_token_seconds" in everything
    assert "prefill_worker" in everything
    assert '"error"' not in everything.replace('"error":null', "")
    # Nothing differs in any row of the replay's table.
    row = r"^(?:gateway|\w+-\d+) +[\d,]+ +[\d,]+ +(\d+) +(\S+)$"
    rows = re.findall(row, everything, re.MULTILINE)
    assert len(rows) >= 3
    assert all(differences == "0" for differences, _ in rows)
