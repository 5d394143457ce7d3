"""The sending side of `tcp.py`'s measurements, a process of its own: prints three ports, and sends.

    python -m parts.fabric.tcp_source BLOCK_BYTES NUM_BLOCKS CA CERT KEY

The first is of a plain blocking socket, which is told what to send; the second is the fabric's
server, the third that with TLS. It ends by SIGTERM.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import sys
import threading
import time

import numpy as np

from baton.core.lease import LeaseTable
from baton.core.store_index import StoreIndex
from baton.fabric.arena import Arena
from baton.fabric.tcp_server import TcpServer
from baton.fabric.tls import TlsFiles, server_context
from baton.types import Grant, KvFormat

SECRET = b"s" * 32
TTL_S = 3600.0
ORDER = struct.Struct("<IIB")
"""To the plain socket: from which block to which, and whether as one piece of memory."""


def kv_format_of(block_bytes: int) -> KvFormat:
    return KvFormat(16, "bfloat16", 1, 1, 1, block_bytes)


def key_of(number: int) -> bytes:
    return (number + 1).to_bytes(32)


def frames_of(num_blocks: int) -> list[int]:
    """The frame of each block: as in a store that has been in use."""
    return np.random.default_rng(0).permutation(num_blocks).tolist()


def blocks_of(num_blocks: int, block_bytes: int) -> np.ndarray:
    """[num_blocks, block_bytes], the same in every process."""
    return np.random.default_rng(1).integers(0, 256, (num_blocks, block_bytes), dtype=np.uint8)


def mint(num_blocks: int) -> tuple[Grant, LeaseTable]:
    """The same grant in every process; here with a lease that covers all blocks."""
    index = StoreIndex(num_blocks)
    leases = LeaseTable("p0", 1, SECRET, index)
    grant = leases.mint("g", "", TTL_S, time.monotonic())
    index.reserve(num_blocks)
    for number in range(num_blocks):
        index.begin(key_of(number))
        leases.cover("g", key_of(number))
    return grant, leases


def send_plainly(connection: socket.socket, arena: Arena, num_blocks: int, num_bytes: int) -> None:
    """Obey orders until there are no more."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    memory = memoryview(arena._memory)
    places = [arena.geometry.frame_at(frame) for frame in frames_of(num_blocks)]
    whole = memory[arena.geometry.frame_at(0) :]
    with connection:
        while order := connection.recv(ORDER.size, socket.MSG_WAITALL):
            first, last, as_one = ORDER.unpack(order)
            if as_one:
                connection.sendall(whole[first * num_bytes : last * num_bytes])
                continue
            for place in places[first:last]:
                connection.sendall(memory[place : place + num_bytes])


def main(block_bytes: int, num_blocks: int, *files: str) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    kv_format = kv_format_of(block_bytes)
    arena = Arena.create(num_blocks, block_bytes, 1, kv_format)
    _, leases = mint(num_blocks)
    blocks = blocks_of(num_blocks, block_bytes)
    for number, frame in enumerate(frames_of(num_blocks)):
        arena.write(frame, key_of(number), blocks[number])
    plain = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            connection, _ = plain.accept()
            args = (connection, arena, num_blocks, block_bytes)
            threading.Thread(target=send_plainly, args=args, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    servers = [
        TcpServer("127.0.0.1", 0, "p0", arena, kv_format, SECRET, leases.allows, tls)
        for tls in (None, server_context(TlsFiles(*files)))
    ]
    print(plain.getsockname()[1], *(server.address[1] for server in servers), flush=True)
    signal.sigwait({signal.SIGTERM})
    os._exit(0)  # the threads need not end in good order


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
