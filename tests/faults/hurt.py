"""Baton with engines that a prompt can hurt: `python -m faults.hurt serve …`, as `python -m baton`.

Points, at which a worker of some role is hurt by a step with a sequence whose prompt has a token:

    HANG     at the second layer of the step, while FOLDER/hang-ROLE is there; the first worker that
             comes there takes the file (FOLDER/hung-ROLE), and goes on when it is gone
    POISON   at the beginning of the step, each time, while FOLDER/poison-ROLE is there; a line of
             FOLDER/crashes-ROLE then tells how many sequences were in the step
    DEADLY   as POISON, while FOLDER/deadly-ROLE is there; but the kernel ends the process, by the
             signal that the file names (SIGSEGV: by a read of address 0)

and two at which a thread of its fabric hangs, whatever the tokens:

    fetch    before blocks of a peer are read, while FOLDER/fetch-ROLE is there; taken as with HANG
             (FOLDER/fetching-ROLE); when that is gone they are read after all, late as it is
    copy     before a block is copied into its own store; FOLDER/copy-ROLE, FOLDER/copying-ROLE

FOLDER is the environment's HURT_FOLDER. The gateway and the supervisor are as they are.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from baton.cli.main import main
from baton.launch import local
from baton.types import Role

DEADLY, HANG, POISON = 404, 405, 406
"""Tokens of the padded vocabulary, which no other prompt of the suites has."""

SECOND_LAYER = 2
POLL_S = 0.02


def hurt_engine(role: str, folder: Path) -> None:
    """Set the points in this process, before it makes an engine."""
    from baton.core.plan import StepPlan
    from baton.engine.runner import TorchRunner
    from baton.model.native_layers import NativeLayers

    hangs = [False]
    layers = [0]
    submit = TorchRunner.submit

    def hurt_submit(self: TorchRunner, plan: StepPlan) -> None:
        tokens = {token for chunk in plan.chunks for token in chunk.seq.request.prompt}
        if POISON in tokens and (folder / f"poison-{role}").exists():
            with (folder / f"crashes-{role}").open("a") as crashes:
                crashes.write(f"{len(plan.chunks)}\n")
            raise RuntimeError("a poisoned step")
        deadly = folder / f"deadly-{role}"
        if DEADLY in tokens and deadly.exists():
            with (folder / f"crashes-{role}").open("a") as crashes:
                crashes.write(f"{len(plan.chunks)}\n")
            _end(deadly.read_text())
        hangs[0], layers[0] = HANG in tokens, 0
        submit(self, plan)

    def begun(self: NativeLayers) -> int:
        return self.__dict__.get("begun", 0)  # type: ignore[no-any-return]

    def begin(self: NativeLayers, count: int) -> None:
        self.__dict__["begun"] = count
        layers[0] += 1
        if hangs[0] and layers[0] == SECOND_LAYER:
            _hang(folder / f"hang-{role}", folder / f"hung-{role}")

    TorchRunner.submit = hurt_submit  # type: ignore[method-assign]
    NativeLayers.progress = property(begun, begin)  # type: ignore[assignment]


def hurt_fabric(role: str, folder: Path) -> None:
    """Set the points at which threads of the fabric hang."""
    from baton.fabric.arena import Arena
    from baton.worker.ways import _Way

    write, fetch = Arena.write, _Way.fetch

    def hung_write(self: Arena, *args: Any) -> bytes:
        _hang(folder / f"copy-{role}", folder / f"copying-{role}")
        return write(self, *args)

    def hung_fetch(self: _Way, grant: Any, wanted: Any, deadline: float, codec: str) -> Any:
        if _hang(folder / f"fetch-{role}", folder / f"fetching-{role}"):
            deadline = time.monotonic() + 60
        return fetch(self, grant, wanted, deadline, codec)

    Arena.write = hung_write  # type: ignore[method-assign]
    _Way.fetch = hung_fetch  # type: ignore[method-assign]


def _end(how: str) -> None:
    if how == "SIGSEGV":
        ctypes.string_at(0)
    os.kill(os.getpid(), signal.Signals[how])


def _hang(wanted: Path, taken: Path) -> bool:
    try:
        wanted.rename(taken)
    except FileNotFoundError:
        return False  # it is not wanted, or another worker has it
    while taken.exists():
        time.sleep(POLL_S)
    return True


def hurt_command(
    name: str, role: Role | None, directory: Path, flags: Sequence[str] = ()
) -> list[str]:
    """Children are of this program, too."""
    python, option, _, *rest = local.baton_command(name, role, directory, flags)
    return [python, option, "faults.hurt", *rest]


if __name__ == "__main__":
    defaults = local.serve.__kwdefaults__
    assert defaults is not None
    defaults["command"] = hurt_command
    if sys.argv[1] == "worker":
        where = sys.argv[sys.argv.index("--role") + 1], Path(os.environ["HURT_FOLDER"])
        hurt_engine(*where)
        hurt_fabric(*where)
    sys.exit(main())
