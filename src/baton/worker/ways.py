"""The ways from a worker to the stores of others: which one for which source, and why.

A way is chosen when the first block of a source is wanted, and again after a rest of the thread
that fetches; the choice is logged with its reason, and what came by it is counted.

Where a source is, its gateway says (`peers`); a grant never does. Whether it is on this host, only
the kernel says: it is if its store comes as a descriptor over a Unix socket, handed out by a
process of our user id that knows the epoch and the MAC of the grant. Names and addresses prove
nothing, since a socket may be left over, and an id be taken elsewhere.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from baton.config import Config
from baton.engine import inbox
from baton.fabric.codec import CODECS
from baton.fabric.descriptors import ASK_TIMEOUT_S
from baton.fabric.shm import ShmTransport
from baton.fabric.tcp import TcpTransport
from baton.fabric.tls import client_context
from baton.fabric.transport import Peer, ReadResult, Transport, Wanted
from baton.rpc.messages import Address
from baton.types import Grant, KvFormat

logger = logging.getLogger(__name__)

RAW: Final = "raw"

_NOT_HERE = frozenset((ReadResult.UNREACHABLE, ReadResult.STALE_EPOCH))


class Ways:
    """Opens transports for one worker; `peers` are the workers that serve blocks to other hosts.

    on_wire: told of a source whose blocks come over TCP, where a codec may pay. `peers` is replaced
    as they change. All but `peers` is used by the threads that fetch.
    """

    def __init__(
        self,
        config: Config,
        runtime_dir: Path,
        kv_format: KvFormat,
        on_wire: Callable[[inbox.Wire], None],
    ) -> None:
        self.peers: Mapping[str, Address] = {}
        self.may_choose = config.fabric.transport == "auto"
        self._config = config.fabric
        self._uses_nixl = config.uses_nixl
        self._runtime_dir = runtime_dir
        self._kv_format = kv_format
        self._on_wire = on_wire
        self._tls = client_context(config.block_tls) if config.block_tls else None
        self._lock = threading.Lock()
        self._counters: dict[str, int] = {}
        self._unlike: set[tuple[str, KvFormat]] = set()  # sources of which that was told

    def to(self, source: str, kv_format: KvFormat | None = None) -> Transport:
        """The way to a source; for one thread, which closes it.

        kv_format: of the blocks that it is to fetch; None is ours.
        """
        if kv_format is not None:
            self._tell_unlike(source, kv_format)
        return _Way(self, kv_format or self._kv_format)

    def _tell_unlike(self, source: str, kv_format: KvFormat) -> None:
        with self._lock:
            if (source, kv_format) in self._unlike:
                return
            self._unlike.add((source, kv_format))
        logger.info(
            "blocks of source=%s are unlike ours: %s, not %s; they come raw, as codecs are "
            "measured on blocks of one form, and no prefix is lent, as the keys are others",
            source,
            kv_format,
            self._kv_format,
        )

    def choose(self, grant: Grant, kv_format: KvFormat) -> tuple[str, Transport]:
        """The transport for blocks of this form from the source of `grant` now, by name."""
        name, transport, reason = self._choose(grant, kv_format)
        logger.info("transport source=%s name=%s reason=%s", grant.source, name, reason)
        if name == "tcp":
            self._on_wire(inbox.Wire(grant.source))
        return name, transport

    def count(self, name: str, num_blocks: int, seconds: float) -> None:
        """So many blocks came by this way, in so many seconds."""
        with self._lock:
            for event, more in (("blocks", num_blocks), ("ms", round(1000 * seconds))):
                event = f"{event}_by_{name}"
                self._counters[event] = self._counters.get(event, 0) + more

    def open(self, name: str, kv_format: KvFormat) -> Transport:
        """A transport of this name for blocks of this form, for one thread to use and close.

        Raises:
            ConfigError: the package that it needs is missing.
        """
        if name == "shm":
            return ShmTransport(self._runtime_dir, kv_format)
        if name == "nixl":
            from baton.fabric.nixl import NixlTransport  # an optional package
            from baton.fabric.nixl.door import Doors

            doors = Doors(self._runtime_dir, self._nixl_address, self._tls)
            return NixlTransport(doors, kv_format)
        codecs = {name: codec for name, codec in CODECS.items() if name != RAW}
        streams = self._config.tcp_streams
        return TcpTransport(self._tcp_peer, kv_format, self._tls, streams, codecs)

    def names(self, grant: Grant, kv_format: KvFormat) -> list[str]:
        """Names of the transports by which blocks of this form, of the source of `grant`, could
        come.
        """
        found = []
        near = ShmTransport(self._runtime_dir, kv_format)
        if near.reach(grant, time.monotonic() + ASK_TIMEOUT_S) is None:
            found.append("shm")
        near.close()
        peer = self.peers.get(grant.source)
        if peer is not None and peer.port:
            found.append("tcp")
        if self._uses_nixl:
            found.append("nixl")
        return found

    @property
    def counters(self) -> dict[str, int]:
        """Blocks that came by each way, and milliseconds spent on it."""
        with self._lock:
            return dict(self._counters)

    def _choose(self, grant: Grant, kv_format: KvFormat) -> tuple[str, Transport, str]:
        """Name, transport, and why this one."""
        if not self.may_choose:
            name: str = self._config.transport
            return name, self.open(name, kv_format), "fabric.transport says so"
        near = ShmTransport(self._runtime_dir, kv_format)
        if grant.source not in self.peers:
            return "shm", near, "it serves this host alone"
        reason = near.reach(grant, time.monotonic() + ASK_TIMEOUT_S)
        if reason is None:
            return "shm", near, "it is on this host: its store came over a Unix socket"
        near.close()
        name = self._config.between_hosts
        return name, self.open(name, kv_format), f"it is not on this host: {reason}"

    def _tcp_peer(self, source: str) -> Peer | None:
        peer = self.peers.get(source)
        if peer is None or not peer.port:
            return None
        return Peer(peer.worker_id, peer.epoch, peer.host, peer.port)

    def _nixl_address(self, source: str) -> tuple[str, int] | None:
        peer = self.peers.get(source)
        return (peer.host, peer.nixl_port) if peer is not None and peer.nixl_port else None


class _Way:
    """A transport to one source, chosen with the first fetch; what comes by it is counted.

    A source that its shared memory does not reach any more may be on another host by now, so that
    is left behind, and the next fetch chooses again.
    """

    def __init__(self, ways: Ways, kv_format: KvFormat) -> None:
        self._ways = ways
        self._kv_format = kv_format
        self._chosen: tuple[str, Transport] | None = None

    def fetch(
        self, grant: Grant, wanted: Sequence[Wanted], deadline: float, codec: str = RAW
    ) -> list[ReadResult]:
        """See `Transport.fetch`."""
        if self._chosen is None:
            self._chosen = self._ways.choose(grant, self._kv_format)
        name, transport = self._chosen
        started = time.monotonic()
        results = transport.fetch(grant, wanted, deadline, codec)
        num_ok = sum(result is ReadResult.OK for result in results)
        self._ways.count(name, num_ok, time.monotonic() - started)
        if name == "shm" and self._ways.may_choose and _NOT_HERE.issuperset(results):
            self.close()
        return results

    def close(self) -> None:
        if self._chosen is not None:
            self._chosen[1].close()
            self._chosen = None
