"""The serving process: one arena, mapped read-only, registered with NIXL, and nothing else.

    python -m baton.fabric.nixl.serving ARENA_DESCRIPTOR AGENT_NAME

It writes one framed `Registered` to its standard output, then makes progress for `AWAKE_S` after
each byte on its standard input, sleeps between, and ends with it. A READ is one-sided where the
memory or the network card does it, and then needs nobody here; what needs this side to make
progress is a new connection, and every read over TCP.
"""

from __future__ import annotations

import mmap
import os
import select
import sys
import time
from typing import Any, Final

import numpy as np

from baton.fabric.descriptors import pack
from baton.fabric.nixl.agent import MEMORY, new_agent
from baton.fabric.nixl.wire import Registered

AWAKE_S: Final = 0.1
PAUSE_S: Final = 100e-6


def main(descriptor: int, name: str) -> None:
    """Serve until standard input ends."""
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever else prints
    memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size, prot=mmap.PROT_READ)
    agent = new_agent(name)
    address = int(np.frombuffer(memory, dtype=np.uint8).ctypes.data)
    agent.register_memory([(address, len(memory), 0, "")], MEMORY)
    with open(answers, "wb") as out:  # open until we end: that is how the worker learns of it
        out.write(pack(Registered(name, address, agent.get_agent_metadata())))
        out.flush()
        _serve(agent)
        # Without taking the agent apart: with readers still connected that can go on for ever.
        os._exit(0)


def _serve(agent: Any) -> None:
    awake_until = 0.0
    while True:
        awake = time.monotonic() < awake_until
        if select.select([0], [], [], PAUSE_S if awake else None)[0]:
            if not os.read(0, 4096):
                return
            awake_until = time.monotonic() + AWAKE_S
        agent.get_new_notifs()  # the way to have it make progress; we send none


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
