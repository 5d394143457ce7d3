"""A worker's store with NIXL's door, in a process of its own: a script for `nixl_ends.Writer`.

It prints a `Hello`, then obeys a line at a time and says "done": "flip FRAME", "reuse FRAME",
"churn FRAME", "stop".
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from baton.core.lease import LeaseTable
from baton.core.store_index import StoreIndex
from baton.fabric.arena import Arena
from baton.fabric.nixl import NixlStore
from baton.fabric.nixl.store import Listen
from baton.types import Grant, KvFormat

SECRET = b"secret of this epoch"


class Task(msgspec.Struct, frozen=True):
    """host: where to listen for readers on other hosts; "" for none."""

    runtime_dir: str
    source: str
    epoch: int
    num_blocks: int
    kv_format: KvFormat
    host: str = ""


class Hello(msgspec.Struct, frozen=True):
    grant: Grant
    digests: list[bytes]
    serving_pid: int
    tcp_port: int | None


def key(block: int) -> bytes:
    return block.to_bytes(32, "big")


def frame(block: int, num_blocks: int) -> int:
    """Where a block is: scattered, but each in one place."""
    return (block * 7 + 3) % num_blocks


def content(block: int, epoch: int, num_bytes: int) -> bytes:
    """What a block holds: no two pages alike, no two blocks, no two epochs."""
    words = (f"{epoch}.{block}.{at}".encode().ljust(16, b"-") for at in range(-(-num_bytes // 16)))
    return b"".join(words)[:num_bytes]


def main(task: Task) -> None:
    num_blocks, num_bytes = task.num_blocks, task.kv_format.block_bytes
    arena = Arena.create(num_blocks, num_bytes, task.epoch, task.kv_format)
    leases = LeaseTable(task.source, task.epoch, SECRET, StoreIndex(0))
    digests = [
        arena.write(frame(block, num_blocks), key(block), content(block, task.epoch, num_bytes))
        for block in range(num_blocks)
    ]
    listen = Listen(task.host, allow_insecure=True) if task.host else None
    store = NixlStore(Path(task.runtime_dir), task.source, arena, SECRET, listen)
    process = store._child._process
    assert process is not None
    grant = leases.mint("an-id-nobody-guesses", "tenant", 30.0, now=0.0)
    print(msgspec.json.encode(Hello(grant, digests, process.pid, store.tcp_port)).decode())
    print(end="", flush=True)
    for line in sys.stdin:
        word, _, number = line.strip().partition(" ")
        if word == "stop":
            break
        block = int(number)
        at = frame(block, num_blocks)
        if word == "flip":
            arena._memory[arena.geometry.frame_at(at) + num_bytes // 2] ^= 0x10
        elif word == "reuse":
            arena.write(at, b"another key".ljust(32), b"other tokens")
        elif word == "churn":
            for turn in range(300):
                epoch = task.epoch + (turn % 2 == 0)
                arena.write(at, key(block), content(block, epoch, num_bytes))
        print("done", flush=True)
    store.stop()
    arena.close()


if __name__ == "__main__":
    main(msgspec.json.decode(sys.argv[1], type=Task))
