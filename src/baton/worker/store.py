"""A worker's block store with its doors, behind which others read it.

shm: the arena's descriptor, on this host; tcp and nixl where they are configured. The ways out, to
the stores of others, are in `ways`.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Final

import msgspec

from baton.config import Config
from baton.engine.build import Built
from baton.fabric.arena import Arena
from baton.fabric.codec import CODECS
from baton.fabric.descriptors import DescriptorServer
from baton.fabric.tcp_server import TcpServer
from baton.fabric.thread import Fabric
from baton.fabric.tls import server_context
from baton.rpc.channel import numeric
from baton.rpc.messages import Address
from baton.worker.ways import Ways

logger = logging.getLogger(__name__)

RAW: Final = "raw"


class Store:
    """Arena, doors and fabric threads of one worker. Call `open`, and `close` after the engine.

    `address` is where it serves its blocks to other hosts, as others are told.
    """

    def __init__(
        self,
        config: Config,
        worker_id: str,
        epoch: int,
        runtime_dir: Path,
        built: Built,
        closing: contextlib.ExitStack,
    ) -> None:
        kv_format, inbox = built.scheduler_config.kv_format, built.engine.inbox
        self.address = Address(worker_id, epoch, "", 0)
        self.ways = Ways(config, runtime_dir, kv_format, inbox.put)
        self.fabric: Fabric
        self._config = config
        self._tls = server_context(config.block_tls) if config.block_tls else None
        self._runtime_dir = runtime_dir
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
            store = cls(config, worker_id, epoch, runtime_dir, built, closing)
            descriptors = DescriptorServer(runtime_dir, worker_id, arena, lease_secret)
            closing.callback(descriptors.stop)
            if config.serves_blocks_over_tcp:
                store._listen(arena, lease_secret, built)
            if config.uses_nixl:
                store._open_nixl(arena, lease_secret)
            store.fabric = Fabric(arena, store.ways.to, built.engine.inbox.put)
            closing.callback(store.fabric.stop)
            store._closing = closing.pop_all()
        return store

    def close(self) -> None:
        """Close every door, end the threads, give back the memory."""
        self._closing.close()

    def _listen(self, arena: Arena, lease_secret: bytes, built: Built) -> None:
        fabric = self._config.fabric
        server = TcpServer(
            self._config.block_host,
            fabric.tcp_port or 0,
            self.address.worker_id,
            arena,
            built.scheduler_config.kv_format,
            lease_secret,
            built.engine.scheduler.exports.leases.allows,
            self._tls,
            {name: codec for name, codec in CODECS.items() if name != RAW},
        )
        self._closing.callback(server.stop)
        host, port = server.address
        if fabric.tcp_advertise is not None:
            host, _, digits = fabric.tcp_advertise.rpartition(":")
            host, port = host.strip("[]"), int(digits)
        self.address = msgspec.structs.replace(self.address, host=host, port=port)
        logger.info("serving blocks over tcp address=%s tls=%s", server.address, bool(self._tls))

    def _open_nixl(self, arena: Arena, lease_secret: bytes) -> None:
        from baton.fabric.nixl import NixlStore  # an optional package
        from baton.fabric.nixl.store import Listen

        tcp, host = None, self.address.host
        if self._config.has_other_hosts:
            host = host or numeric(self._config.block_host, "fabric.tcp_host")
            tcp = Listen(host, 0, self._tls, self._config.fabric.allow_insecure)
        nixl = NixlStore(self._runtime_dir, self.address.worker_id, arena, lease_secret, tcp)
        self._closing.callback(nixl.stop)
        if nixl.tcp_port is not None:
            self.address = msgspec.structs.replace(self.address, host=host, nixl_port=nixl.tcp_port)
