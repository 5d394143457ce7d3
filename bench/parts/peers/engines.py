"""Starting the engines as processes, and asking them for one cell at a time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from baton.launch.cores import Share, usable_cores, waiting
from baton.model_spec import ModelSpec
from parts.peers.cells import Cell
from parts.processes import BENCH_DIR

TOKEN_BUDGET = 2048
"""Of a step, for the engines that have one: offline there is no reason for a small one."""
NAMES = ("baton", "transformers", "llama.cpp", "vllm")


class Setting(msgspec.Struct, frozen=True):
    """What all engines have in common. `peers` is the folder that `make peers` filled."""

    model: Path
    gguf: Path
    spec: ModelSpec
    threads: int
    kv_tokens: int
    peers: Path


class Missing(msgspec.Struct, frozen=True):
    """An engine that is not there, and why."""

    name: str
    reason: str


class Broken(RuntimeError):
    """An engine ended, or could not start; the message says what it said last."""


def command(name: str, setting: Setting) -> list[str] | Missing:
    """The command line of an engine's process, or why there is none."""
    module = [sys.executable, "-m"]
    model, threads = str(setting.model), str(setting.threads)
    if name == "probe":
        return [*module, "parts.peers.run_probe", threads]
    if name == "baton":
        sizes = (str(setting.kv_tokens), str(TOKEN_BUDGET))
        return [*module, "parts.peers.run_baton", model, threads, *sizes]
    if name == "transformers":
        return [*module, "parts.peers.run_transformers", model, threads]
    if (missing := find_missing(name, setting.peers)) is not None:
        return missing
    if name == "llama.cpp":
        tools = str(llama_tools(setting.peers))
        return [*module, "parts.peers.run_llama", tools, str(setting.gguf), threads]
    kv_bytes = setting.kv_tokens * setting.spec.kv_bytes_per_token()
    sizes = (str(kv_bytes), str(TOKEN_BUDGET))
    return [str(vllm_python(setting.peers)), "-m", "parts.peers.run_vllm", model, threads, *sizes]


def environment(name: str, setting: Setting) -> dict[str, str]:
    """Variables for an engine's process: Baton's loop has what `baton serve` gives its workers."""
    if name != "baton":
        return {}
    return waiting(Share((), setting.threads, setting.threads > usable_cores()))


def llama_tools(peers: Path) -> Path:
    return peers / "llama.cpp" / "build" / "bin"


def vllm_python(peers: Path) -> Path:
    return peers / "vllm" / "bin" / "python"


def find_missing(name: str, peers: Path) -> Missing | None:
    """Why a peer cannot be used, in the words that its build left; None if it can."""
    if (peers / f"{name}.done").exists():
        return None
    reason = peers / f"{name}.reason"
    return Missing(name, reason.read_text().strip() if reason.exists() else "run `make peers`")


class Child:
    """An engine's process. It is stopped (SIGSTOP) except while it is asked.

    `mixes`: it takes prompts in while other sequences decode.
    """

    def __init__(
        self, name: str, words: list[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self._log = log
        # Baton's sources, too: a peer's environment has no Baton, and the models' shapes are its.
        own = (str(BENCH_DIR), str(BENCH_DIR.parent / "src"))
        paths = [*own, *filter(None, [os.environ.get("PYTHONPATH")])]
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **(environment or {})},
                start_new_session=True,
            )
        start = time.monotonic()
        hello = self._answer()
        self.mixes = bool(hello["mixes"])
        self.about = f"{hello['about']} (ready after {time.monotonic() - start:.1f} s)"
        self._signal(signal.SIGSTOP)

    def measure(self, cell: Cell, seed: str) -> float:
        """Seconds, as `Cell` says. Raises: as `ask`."""
        return self.ask({**msgspec.to_builtins(cell), "seed": seed})

    def ask(self, question: dict[str, object]) -> float:
        """Let the process run until it has answered.

        Raises:
            Broken: the engine could not; its own words are in the message.
        """
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps(question).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._answer()
        self._signal(signal.SIGSTOP)
        if "error" in answer:
            raise Broken(f"{self.name}: {answer['error']}")
        return float(answer["seconds"])  # type: ignore[arg-type]

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._signal(signal.SIGKILL)
        self._process.wait()

    def _answer(self) -> dict[str, object]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            last = self._log.read_text(errors="replace").strip().splitlines()[-3:]
            raise Broken(f"{self.name} ended with code {self._process.returncode}: {last}")
        found: dict[str, object] = json.loads(line)
        return found

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)


@contextlib.contextmanager
def started(
    names: list[str], setting: Setting, logs: Path
) -> Iterator[tuple[dict[str, Child], list[Missing]]]:
    """The engines that can be had, running, and those that cannot."""
    children: dict[str, Child] = {}
    missing: list[Missing] = []
    running: list[Child] = []  # the caller may take some out of `children`
    try:
        for name in names:
            words = command(name, setting)
            if isinstance(words, Missing):
                missing.append(words)
                continue
            try:
                log = logs / f"{name}.log"
                children[name] = Child(name, words, log, environment(name, setting))
                running.append(children[name])
            except (Broken, OSError) as error:
                missing.append(Missing(name, str(error)))
        yield children, missing
    finally:
        for child in running:
            child.close()
