"""Which announcements a gateway follows, and what it tells its workers of each other."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from parts.certificates import make_certificate
from rpc_ends import SECRET, hello, run

from baton.gateway.registry import Registry
from baton.rpc.messages import Address, Announce, Hello
from baton.rpc.tls import RpcTls
from baton.types import Role


def registry(directory: Path) -> Registry:
    return Registry(
        "gw",
        1,
        SECRET,
        directory,
        {},
        on_join=lambda hello: None,
        on_report=lambda worker_id, report: None,
        on_lost=lambda worker_id, reason: None,
    )


@pytest.mark.parametrize(
    ("address", "caller", "with_tls", "refusal"),
    [
        ("unix:DIR/decode-0.sock", None, False, ""),
        ("unix:DIR/decode-1.sock", None, False, "runtime directory"),
        ("unix:/tmp/decode-0.sock", None, False, "runtime directory"),
        ("10.0.0.2:7000", None, True, "runtime directory"),
        ("unix:DIR/decode-0.sock", "10.0.0.2", True, "not the numeric address"),
        ("10.0.0.2:7000", "10.0.0.2", False, ""),
        ("[fd00::2]:7000", "fd00::2", False, ""),
        ("10.0.0.3:7000", "10.0.0.2", False, "the host that it calls from, 10.0.0.2"),
        ("127.0.0.1:22", "10.0.0.2", False, "the host that it calls from"),
        ("10.0.0.3:7000", "10.0.0.2", True, ""),
        ("internal.example:80", "10.0.0.2", True, "not the numeric address"),
        ("10.0.0.2", "10.0.0.2", True, "not the numeric address"),
        ("10.0.0.2:0", "10.0.0.2", True, "not the numeric address"),
    ],
)
def test_which_addresses_are_followed(
    tmp_path: Path, address: str, caller: str | None, with_tls: bool, refusal: str
) -> None:
    async def main() -> None:
        gateway = registry(tmp_path)
        if with_tls:
            gateway.open_to_hosts(RpcTls(make_certificate(tmp_path, "ours")))
        said = Announce("decode-0", address.replace("DIR", str(tmp_path)), Role.DECODE, 7)
        reply = gateway.announce(said, caller)
        assert reply.accepted == (not refusal)
        assert refusal in reply.reason
        assert (gateway.link("decode-0") is None) == bool(refusal)
        await gateway.close()

    run(main())


def test_workers_hear_where_the_others_serve_blocks(tmp_path: Path) -> None:
    async def main() -> None:
        gateway = registry(tmp_path)
        told: dict[str, tuple[Address, ...]] = {}
        for worker_id, tcp, nixl in (("a", 0, 0), ("b", 5, 0), ("c", 0, 6)):
            said = Announce(worker_id, f"unix:{tmp_path}/{worker_id}.sock", Role.DECODE, 7)
            assert gateway.announce(said).accepted
            member = gateway._members[worker_id]
            member.link.tell_peers = lambda peers, who=worker_id: told.update({who: peers})  # type: ignore[method-assign]
            theirs: Hello = msgspec.structs.replace(
                hello(),
                worker_id=worker_id,
                fabric_host="10.0.0.2",
                fabric_port=tcp,
                nixl_port=nixl,
            )
            gateway._greeted(member.announced, theirs)
        expected = (Address("b", 7, "10.0.0.2", 5), Address("c", 7, "10.0.0.2", 0, 6))
        assert told == {"a": expected, "b": expected, "c": expected}
        await gateway.close()

    run(main())
