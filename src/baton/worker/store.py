"""A worker's block store with its doors, and the ways to the stores of others.

doors   shm: the arena's descriptor, on this host; tcp and nixl where they are configured
ways    chosen for each source when its first block is wanted, and logged with the reason
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from baton.config import Config, FabricConfig
from baton.engine import inbox
from baton.engine.build import Built
from baton.errors import ConfigError
from baton.fabric.arena import Arena
from baton.fabric.codec import CODECS
from baton.fabric.descriptors import DescriptorServer, socket_path
from baton.fabric.shm import ShmTransport
from baton.fabric.tcp import TcpTransport
from baton.fabric.tcp_server import TcpServer
from baton.fabric.thread import Fabric
from baton.fabric.tls import TlsFiles, client_context, server_context
from baton.fabric.transport import Peer, Transport
from baton.rpc.messages import Address
from baton.types import KvFormat

logger = logging.getLogger(__name__)

RAW: Final = "raw"


class Store:
    """Arena, doors and fabric threads of one worker. Call `open`, and `close` after the engine.

    `peers` are the workers that serve blocks over TCP, by id; it is replaced as they change.
    `address` is where this one does, as others are told; ("", 0) if it does not.
    """

    def __init__(
        self, config: Config, runtime_dir: Path, built: Built, closing: contextlib.ExitStack
    ) -> None:
        self.peers: Mapping[str, Address] = {}
        self.address: tuple[str, int] = ("", 0)
        self.fabric: Fabric
        self._config = config.fabric
        self._runtime_dir = runtime_dir
        self._kv_format = built.scheduler_config.kv_format
        self._inbox = built.engine.inbox
        self._tls = _tls_files(config.fabric)
        self._closing = closing

    @classmethod
    def open(
        cls,
        config: Config,
        worker_id: str,
        epoch: int,
        runtime_dir: Path,
        lease_secret: bytes,
        built: Built,
    ) -> Store:
        """Make the arena and open every door that the configuration asks for.

        Raises:
            ConfigError: a door cannot be opened, or the memory is not to be had.
        """
        kv_format, limits = built.scheduler_config.kv_format, built.limits
        with contextlib.ExitStack() as closing:
            arena = Arena.create(limits.num_frames, limits.block_bytes, epoch, kv_format)
            closing.callback(arena.close)
            store = cls(config, runtime_dir, built, closing)
            descriptors = DescriptorServer(runtime_dir, worker_id, arena, lease_secret)
            closing.callback(descriptors.stop)
            if config.fabric.listens:
                store._listen(worker_id, arena, lease_secret, built)
            if config.fabric.transport == "nixl":
                store._open_nixl(worker_id, arena, lease_secret)
            store.fabric = Fabric(arena, store._way_to, built.engine.inbox.put)
            closing.callback(store.fabric.stop)
            store._closing = closing.pop_all()
        return store

    def close(self) -> None:
        """Close every door, end the threads, give back the memory."""
        self._closing.close()

    def _listen(self, worker_id: str, arena: Arena, lease_secret: bytes, built: Built) -> None:
        config = self._config
        server = TcpServer(
            config.tcp_host,
            config.tcp_port or 0,
            worker_id,
            arena,
            self._kv_format,
            lease_secret,
            built.engine.scheduler.exports.leases.allows,
            server_context(self._tls) if self._tls else None,
            {name: codec for name, codec in CODECS.items() if name != RAW},
        )
        self._closing.callback(server.stop)
        self.address = server.address
        if config.tcp_advertise is not None:
            host, _, port = config.tcp_advertise.rpartition(":")
            self.address = (host.strip("[]"), int(port))
        logger.info("serving blocks over tcp address=%s tls=%s", server.address, bool(self._tls))

    def _open_nixl(self, worker_id: str, arena: Arena, lease_secret: bytes) -> None:
        from baton.fabric.nixl import NixlStore  # an optional package

        nixl = NixlStore(self._runtime_dir, worker_id, arena, lease_secret)
        self._closing.callback(nixl.stop)

    # Ways to others; called on the thread that fetches from `source` -----------------------

    def _way_to(self, source: str, kv_format: KvFormat | None) -> Transport:
        name, reason = self._choose(source)
        logger.info("transport source=%s name=%s reason=%s", source, name, reason)
        if kv_format is not None:
            ours = self._kv_format
            logger.info("blocks of source=%s are unlike ours: %s, not %s", source, kv_format, ours)
        return self.open_way(name, kv_format)

    def open_way(self, name: str, kv_format: KvFormat | None = None) -> Transport:
        """A transport of this name, for one thread to use and close.

        kv_format: of the blocks that it is to fetch; None is ours.

        Raises:
            ConfigError: the package that it needs is missing.
        """
        kv_format = kv_format or self._kv_format
        if name == "shm":
            return ShmTransport(self._runtime_dir, kv_format)
        if name == "nixl":
            from baton.fabric.nixl import NixlTransport
            from baton.fabric.nixl.door import Doors

            return NixlTransport(Doors(self._runtime_dir), kv_format)
        tls = client_context(self._tls) if self._tls else None
        codecs = {name: codec for name, codec in CODECS.items() if name != RAW}
        return TcpTransport(self._resolve, kv_format, tls, self._config.tcp_streams, codecs)

    def ways(self, source: str) -> list[str]:
        """Names of the transports by which blocks of `source` could come."""
        found = []
        if self._is_here(source):
            found.append("shm")
        if source in self.peers:
            found.append("tcp")
        if self._config.transport == "nixl":
            found.append("nixl")
        return found

    def _choose(self, source: str) -> tuple[str, str]:
        """The transport for a source, and why."""
        wanted = self._config.transport
        if wanted != "auto":
            choice = wanted, "fabric.transport says so"
        elif self._is_here(source):
            choice = "shm", "it is on this host"
        elif source in self.peers:
            choice = "tcp", "it is on another host"
        else:
            choice = "shm", "no address of it is known"
        if choice[0] == "tcp":
            self._inbox.put(inbox.Wire(source))
        return choice

    def _is_here(self, source: str) -> bool:
        path = socket_path(self._runtime_dir, source)
        return path is not None and path.exists()

    def _resolve(self, source: str) -> Peer | None:
        peer = self.peers.get(source)
        return None if peer is None else Peer(peer.worker_id, peer.epoch, peer.host, peer.port)


def _tls_files(config: FabricConfig) -> TlsFiles | None:
    files = (config.tls_ca_file, config.tls_cert_file, config.tls_key_file)
    given = [file for file in files if file is not None]
    if given and len(given) < len(files):
        raise ConfigError("fabric.tls_ca_file, tls_cert_file and tls_key_file come together")
    return TlsFiles(*given) if given else None
