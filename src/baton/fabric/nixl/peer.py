"""One source, in one epoch, as a reader has it: an open door and a NIXL agent of its own.

    ready ──a read misses its deadline──► stuck ──that read ends well──► ready
      │                                     │
      └──────────── it fails ───────────────┴──────────────► lost: to be destroyed

An agent for each source, because only the end of an agent is sure to end its reads. Not for two
threads at a time.
"""

from __future__ import annotations

import itertools
import os
import time
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from baton.errors import BatonError
from baton.fabric.arena import PAGE_BYTES
from baton.fabric.nixl.agent import MEMORY, agent_errors, new_agent
from baton.fabric.nixl.door import Door
from baton.fabric.nixl.staging import NUM_BANKS, NUM_PAGES, Staging

SPIN_S: Final = 100e-6
"""How long a read is asked for its end without a pause."""
PAUSE_S: Final = 50e-6
MAX_PAUSE_S: Final = 200e-6

Numbers = npt.NDArray[np.int32]

_numbers = itertools.count()


class PeerLost(BatonError):
    """The source ended, or NIXL cannot reach it."""


class Peer:
    """Reads frames and headers of one arena. `num_reads` counts NIXL transfers.

    Raises:
        PeerLost: NIXL does not take the metadata, or cannot reach whom they name.
    """

    def __init__(self, door: Door) -> None:
        self.door = door
        self.geometry = door.opened.geometry
        self.num_reads = 0
        self._stuck: tuple[Any, Staging] | None = None
        self._local: dict[Staging, tuple[Any, Any]] = {}
        self._agent: Any = new_agent(f"reader-{os.getpid()}-{next(_numbers)}")
        registered, geometry = door.opened.registered, self.geometry
        try:
            self._agent.add_remote_agent(registered.metadata)
            # NIXL holds both lists against the agent and the memory that the metadata speak of.
            self._remote_pages, self._remote_frames = (
                self._prepared(registered.agent, address, num_bytes, stride, count)
                for address, num_bytes, stride, count in (
                    (
                        registered.address,
                        PAGE_BYTES,
                        PAGE_BYTES,
                        geometry.frames_at // PAGE_BYTES,
                    ),
                    (
                        registered.address + geometry.frames_at,
                        geometry.frame_bytes,
                        geometry.stride,
                        geometry.num_frames,
                    ),
                )
            )
        except agent_errors() as error:
            raise PeerLost(f"NIXL: {error}") from error

    @property
    def stuck_in(self) -> Staging | None:
        """The memory in which a read that missed its deadline may still land."""
        return self._stuck[1] if self._stuck else None

    def read_pages(self, staging: Staging, after: bool, pages: Numbers, deadline: float) -> None:
        """Read whole pages of the arena, in order, into those of `staging`. Raises as `_read`."""
        start = NUM_PAGES if after else 0
        into = np.arange(start, start + len(pages), dtype=np.int32)
        local = self._lists(staging)[0]
        self._read(staging, local, into, self._remote_pages, pages, deadline)

    def read_frames(self, staging: Staging, bank: int, frames: Numbers, deadline: float) -> None:
        """Read whole frames, in order, into `bank` of `staging`. Raises as `_read`."""
        start = bank * staging.banks.frames_per_bank
        into = np.arange(start, start + len(frames), dtype=np.int32)
        local = self._lists(staging)[1]
        self._read(staging, local, into, self._remote_frames, frames, deadline)

    def settle(self) -> Staging | None:
        """Ask after the read that is stuck: the memory that is free again, None if none is.

        Raises:
            PeerLost: it failed. Destroy the peer, then its memory is free.
        """
        if self._stuck is None:
            return None
        handle, staging = self._stuck
        if not self.door.nudge(time.monotonic()):
            raise PeerLost("the source closed its door")
        if self._state(self._agent.check_xfer_state, handle) == "PROC":
            return None
        handle.release()
        self._stuck = None
        return staging

    def destroy(self) -> Staging | None:
        """End the agent. Nothing of the source arrives after that: the memory it was stuck in."""
        self.door.close()
        freed = self.stuck_in
        handles = list(itertools.chain(*self._local.values()))
        handles += [self._remote_pages, self._remote_frames]
        if self._stuck is not None:
            handles.append(self._stuck[0])
        for handle in reversed(handles):
            handle.release()
        # Handles and agent refer to each other in no circle: with the last name it ends.
        self._stuck = self._agent = self._remote_pages = self._remote_frames = None
        self._local.clear()
        return freed

    def _lists(self, staging: Staging) -> tuple[Any, Any]:
        """NIXL's lists of the pages and of the frames of `staging`, which it registers once."""
        if staging not in self._local:
            banks = staging.banks
            count = NUM_BANKS * banks.frames_per_bank
            at, num_bytes = staging.pages_address, staging.pages.size
            self._agent.register_memory([(at, num_bytes, 0, "")], MEMORY)
            self._agent.register_memory(
                [(banks.address, banks.num_bytes, banks.device, "")], banks.kind
            )
            self._local[staging] = (
                self._prepared("", at, PAGE_BYTES, PAGE_BYTES, 2 * NUM_PAGES),
                self._prepared("", banks.address, self.geometry.frame_bytes, banks.stride, count),
            )
        return self._local[staging]

    def _prepared(self, agent: str, address: int, num_bytes: int, stride: int, count: int) -> Any:
        strided = np.array([(address, num_bytes, 0, stride, count)], dtype=np.uint64)
        return self._agent.prep_xfer_dlist(agent, strided, MEMORY)

    def _read(
        self,
        staging: Staging,
        local: Any,
        into: Numbers,
        remote: Any,
        wanted: Numbers,
        deadline: float,
    ) -> None:
        """Read and wait for the end.

        Raises:
            TimeoutError: the deadline passed; if the read had begun, we are stuck in `staging`.
            PeerLost: it failed. Destroy the peer before `staging` is used again.
        """
        if time.monotonic() >= deadline:
            raise TimeoutError
        self.num_reads += 1
        try:
            handle = self._agent.make_prepped_xfer("READ", local, into, remote, wanted)
        except agent_errors() as error:
            raise PeerLost(f"NIXL: {error}") from error
        state = self._state(self._agent.transfer, handle)
        if state == "PROC":
            self._wait(handle, staging, deadline)
        handle.release()

    def _wait(self, handle: Any, staging: Staging, deadline: float) -> None:
        started = now = time.monotonic()
        pause = PAUSE_S
        while self._state(self._agent.check_xfer_state, handle) == "PROC":
            now = time.monotonic()
            if now >= deadline:
                self._stuck = handle, staging
                raise TimeoutError
            if not self.door.nudge(now):
                raise PeerLost("the source closed its door")
            if now - started > SPIN_S:
                time.sleep(pause)
                pause = min(2 * pause, MAX_PAUSE_S)

    def _state(self, ask: Any, handle: Any) -> str:
        try:
            state: str = ask(handle)
        except agent_errors() as error:
            raise PeerLost(f"NIXL: {error}") from error
        if state == "ERR":
            raise PeerLost("NIXL: the read failed")
        return state
