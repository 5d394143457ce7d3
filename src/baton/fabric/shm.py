"""Reading blocks from the arenas of other workers on the same host: one copy, no socket.

The first fetch from a (source, epoch) asks its worker for the arena's descriptor and maps it; the
mapping is kept while there is traffic, and later fetches touch memory only. So a worker that has
died, or is frozen, can still be read by whoever has it mapped, and a worker that was started anew
has a new epoch and needs a new mapping.

A grant carries a worker id, never an address; where to find the worker is this side's business.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from baton.errors import BatonError
from baton.fabric.arena import ArenaRefused, MappedArena, StaleEpoch, kv_format_hash
from baton.fabric.descriptors import (
    ASK_TIMEOUT_S,
    LENGTH,
    MAX_REPLY_BYTES,
    Ask,
    Descriptor,
    Refusal,
    pack,
    peer_uid,
    socket_path,
)
from baton.fabric.transport import ReadResult, Wanted
from baton.types import Grant, KvFormat

logger = logging.getLogger(__name__)

# The current one, and the one before it, from which handoffs may still be read.
MAX_EPOCHS_PER_SOURCE: Final = 2
MAX_BATCH_BYTES: Final = 4 << 20
"""Copied in one call, which the deadline does not break off (or one block that has more)."""

_reply_decoder: msgspec.msgpack.Decoder[Descriptor | Refusal] = msgspec.msgpack.Decoder(
    Descriptor | Refusal
)


class _NoArena(BatonError):
    """There is nothing to read from; `result` is what every block of the fetch gets."""

    def __init__(self, result: ReadResult, reason: str) -> None:
        super().__init__(reason)
        self.result = result


class ShmTransport:
    """A `Transport` over shared memory; cannot enforce a grant once a store is mapped.

    kv_format: ours; a store of another format answers WRONG_FORMAT.
    """

    def __init__(self, runtime_dir: Path, kv_format: KvFormat) -> None:
        self._runtime_dir = runtime_dir
        self._kv_format_hash = kv_format_hash(kv_format)
        self._arenas: dict[tuple[str, int], MappedArena] = {}  # oldest mapping first

    def fetch(
        self, grant: Grant, wanted: Sequence[Wanted], deadline: float, codec: str = "raw"
    ) -> list[ReadResult]:
        """See `Transport.fetch`. Takes at most `ASK_TIMEOUT_S` to reach a source that is new."""
        try:
            arena = self._arena(grant, deadline)
        except _NoArena as error:
            logger.warning(
                "nothing to read source=%r epoch=%d result=%s reason=%s",
                grant.source,
                grant.epoch,
                error.result,
                error,
            )
            return [error.result] * len(wanted)
        results: list[ReadResult] = []
        at_once = max(1, MAX_BATCH_BYTES // max(1, arena.geometry.frame_bytes))
        for first in range(0, len(wanted), at_once):
            batch = wanted[first : first + at_once]
            if time.monotonic() < deadline:
                results += arena.read_all(batch)
            else:
                results += [ReadResult.TIMED_OUT] * len(batch)
        return results

    def reach(self, grant: Grant, deadline: float) -> str | None:
        """Map the store of `grant`, for fetches to come; if it cannot be, why not.

        That it can is proof that the source is on this host, and that it is of this epoch.
        """
        try:
            self._arena(grant, deadline)
        except _NoArena as error:
            return str(error)
        return None

    def close(self) -> None:
        """Unmap every arena; a later fetch maps what it needs again."""
        for source in {source for source, _ in self._arenas}:
            self._keep_newest(source, 0)

    def _arena(self, grant: Grant, deadline: float) -> MappedArena:
        if time.monotonic() >= deadline:
            raise _NoArena(ReadResult.TIMED_OUT, "the deadline had passed")
        arena = self._arenas.get((grant.source, grant.epoch))
        if arena is None:
            arena = self._map(grant, deadline)
            self._arenas[grant.source, grant.epoch] = arena
            self._keep_newest(grant.source, MAX_EPOCHS_PER_SOURCE)
        return arena

    def _keep_newest(self, source: str, num_kept: int) -> None:
        mapped = [at for at in self._arenas if at[0] == source]
        for at in mapped[: len(mapped) - num_kept]:
            self._arenas.pop(at).close()

    def _map(self, grant: Grant, deadline: float) -> MappedArena:
        path = socket_path(self._runtime_dir, grant.source)
        if path is None:
            raise _NoArena(ReadResult.REFUSED, "not a worker id")
        limit = min(deadline, time.monotonic() + ASK_TIMEOUT_S)
        descriptors: list[int] = []
        try:
            reply = _ask(path, grant, limit, descriptors)
            if isinstance(reply, Refusal):
                raise _NoArena(ReadResult(reply.reason), "the source refused the grant")
            if len(descriptors) != 1:
                raise _NoArena(ReadResult.UNREACHABLE, f"{len(descriptors)} descriptors came")
            arena = MappedArena(descriptors[0], grant.epoch)
        except TimeoutError as error:
            late = time.monotonic() >= deadline
            result = ReadResult.TIMED_OUT if late else ReadResult.UNREACHABLE
            raise _NoArena(result, "no answer in time") from error
        except FileNotFoundError as error:
            raise _NoArena(ReadResult.UNREACHABLE, "it has no socket here") from error
        except (OSError, ArenaRefused, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _NoArena(ReadResult.UNREACHABLE, str(error)) from error
        except StaleEpoch as error:
            raise _NoArena(ReadResult.STALE_EPOCH, str(error)) from error
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        if arena.geometry.kv_format_hash != self._kv_format_hash:
            arena.close()
            raise _NoArena(ReadResult.WRONG_FORMAT, "the store's kv_format is not ours")
        return arena


def _ask(path: Path, grant: Grant, limit: float, descriptors: list[int]) -> Descriptor | Refusal:
    """One question and its answer; received descriptors are added to `descriptors` as they come.

    Raises:
        OSError: (TimeoutError after `limit`) the source cannot be reached or breaks off.
        msgspec.DecodeError: what came is no answer.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        _connect(connection, path, limit)
        if peer_uid(connection) != os.geteuid():
            raise ConnectionRefusedError("the socket belongs to another user")
        connection.sendall(pack(Ask(grant)))
        received = b""
        wanted = LENGTH.size
        while len(received) < wanted:
            connection.settimeout(_remaining(limit))
            data, fds, _, _ = socket.recv_fds(
                connection, wanted - len(received), 1, socket.MSG_CMSG_CLOEXEC
            )
            descriptors += fds
            if not data:
                raise ConnectionResetError("the source closed the connection")
            received += data
            if len(received) == LENGTH.size:
                (length,) = LENGTH.unpack(received)
                if length > MAX_REPLY_BYTES:
                    raise ConnectionAbortedError(f"a reply of {length} bytes")
                wanted += length
        return _reply_decoder.decode(received[LENGTH.size :])


def _connect(connection: socket.socket, path: Path, limit: float) -> None:
    """Connect by `limit`; unlike a non-blocking socket, wait for room in the backlog."""
    seconds, fraction = divmod(_remaining(limit), 1.0)
    timeval = struct.pack("@ll", int(seconds), max(1, int(fraction * 1e6)))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
    try:
        connection.connect(str(path))
    except BlockingIOError as error:
        raise TimeoutError from error
    connection.settimeout(_remaining(limit))


def _remaining(limit: float) -> float:
    remaining = limit - time.monotonic()
    if remaining <= 0:
        raise TimeoutError
    return remaining
