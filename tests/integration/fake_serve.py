"""`baton serve` with fake children, as a process of its own: `fake_serve.py DIR CONFIG MODES`.

Children append what happens to them to DIR/events. MODES is JSON: child name → how it behaves.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from baton.config import load_config
from baton.launch.local import serve
from baton.types import Role

CHILD = """
import os, signal, subprocess, sys, time
name, mode, directory, runtime = sys.argv[1:]

def event(text):
    with open(f"{directory}/events", "a") as file:
        file.write(f"{name} {text}\\n")

def on_term(*_):
    event("term")
    if mode != "stubborn":
        time.sleep(0.1)
        event("exit")
        os._exit(0)

signal.signal(signal.SIGTERM, on_term)
event(f"start {os.getpid()} {os.getsid(0)} {runtime}")
print("hello out")
print("hello err", file=sys.stderr, flush=True)
while mode == "crash-later:1" and not os.path.exists(f"{directory}/later"):
    time.sleep(0.02)
if mode.startswith("crash"):
    print("no such model: /nowhere", flush=True)
    os._exit(int(mode.split(":")[1]))
if mode == "family":
    family = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    event(f"family {family.pid}")
if mode != "never-up":
    open(f"{directory}/up-{name}", "w").close()
while True:
    time.sleep(0.02)
    if os.path.exists(f"{directory}/crash-{name}"):
        os.unlink(f"{directory}/crash-{name}")
        os._exit(9)
"""


def main() -> int:
    directory, overrides, modes = (
        Path(sys.argv[1]),
        json.loads(sys.argv[2]),
        json.loads(sys.argv[3]),
    )

    def command(name: str, role: Role | None, runtime: Path, flags: Sequence[str]) -> list[str]:
        mode = modes.get(name, "steady")
        return [sys.executable, "-c", CHILD, name, mode, str(directory), str(runtime)]

    async def probe() -> str | None:
        return None if (directory / "up-gateway").exists() else "the gateway is starting"

    async def frozen() -> dict[str, float]:
        path = directory / "frozen"
        return json.loads(path.read_text()) if path.exists() else {}

    return serve(load_config(None, overrides), command=command, probe=probe, frozen=frozen)


if __name__ == "__main__":
    sys.exit(main())
