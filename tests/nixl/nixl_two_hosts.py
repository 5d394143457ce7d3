"""A reader and a store in two network namespaces, with a wire between them: a script.

It runs in user, network and mount namespaces of its own (see `NAMESPACES` in the test), which are
the reader's, and prints a `Story`. Everything is gone when it ends. UCX finds its devices in /sys,
which must be mounted anew to show those of the namespace.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
from nixl_ends import KV_FORMAT, Fetched, Writer, fetch, wait_until

from baton.fabric.nixl import NixlTransport
from baton.fabric.nixl.door import Doors

HERE, THERE = "10.77.0.1", "10.77.0.2"


class Told(msgspec.Struct, frozen=True):
    """results: the different ones, and how many of each."""

    results: dict[str, int]
    num_right: int
    elapsed_s: float
    quarantined_bytes: int


class Story(msgspec.Struct, frozen=True):
    together: Told
    cut: Told
    again: Told
    """While the wire is still cut."""
    mended: Told
    dead: Told


def run(command: str, prefix: tuple[str, ...] = ()) -> None:
    subprocess.run([*prefix, *command.split()], check=True)


def is_running(device: str, prefix: tuple[str, ...] = ()) -> bool:
    command = [*prefix, "cat", f"/sys/class/net/{device}/operstate"]
    return subprocess.run(command, check=True, capture_output=True).stdout == b"up\n"


def tell(transport: NixlTransport, fetched: Fetched) -> Told:
    counts: dict[str, int] = {}
    for result in fetched.results:
        counts[result] = counts.get(result, 0) + 1
    return Told(counts, fetched.num_right, fetched.elapsed_s, transport.quarantined_bytes)


SYSFS = "mount -t sysfs none /sys"


def main(directory: Path, tls: str) -> Story:
    subprocess.run(SYSFS.split(), check=True)
    there = ["unshare", "--net", "--mount", "sh", "-c", f"{SYSFS} && echo ready && exec sleep 600"]
    holder = subprocess.Popen(there, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"ready\n"
        return tell_story(directory, tls, holder.pid)
    finally:
        holder.kill()
        holder.wait()


def tell_story(directory: Path, tls: str, there_pid: int) -> Story:
    other = ("nsenter", f"--target={there_pid}", "--net", "--mount")
    run("ip link set lo up")
    run(f"ip link add here type veth peer name there netns {there_pid}")
    run(f"ip addr add {HERE}/24 dev here")
    run("ip link set here up")
    run("ip link set lo up", other)
    run(f"ip addr add {THERE}/24 dev there", other)
    run("ip link set there up", other)
    # The kernel says so up to a second later, and UCX finds no device until then.
    wait_until(lambda: is_running("here") and is_running("there", other))

    os.environ |= {"UCX_TLS": tls, "UCX_NET_DEVICES": "here"}
    environment = {"UCX_TLS": tls, "UCX_NET_DEVICES": "there"}
    writer = Writer(directory / "run", environment=environment, host=THERE, prefix=other)
    port = writer.hello.tcp_port
    assert port is not None
    transport = NixlTransport(Doors(directory, lambda _: (THERE, port)), KV_FORMAT)
    try:
        together = tell(transport, fetch(transport, writer))
        run("ip link set there down", other)
        cut = tell(transport, fetch(transport, writer, seconds=0.5))
        again = tell(transport, fetch(transport, writer, seconds=0.5))
        run("ip link set there up", other)
        wait_until(lambda: transport.rest() is None and transport.quarantined_bytes == 0, 30.0)
        mended = tell(transport, fetch(transport, writer, seconds=30.0))
        writer.kill_all()
        dead = tell(transport, fetch(transport, writer, seconds=30.0))
    finally:
        transport.close()
        writer.close()
    return Story(together, cut, again, mended, dead)


if __name__ == "__main__":
    print(msgspec.json.encode(main(Path(sys.argv[1]), sys.argv[2])).decode())
