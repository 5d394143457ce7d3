"""RPC over TCP with mutual TLS: it works as over a Unix socket, and strangers get nowhere."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import subprocess
from pathlib import Path

import grpc
import msgspec
import pytest
from parts.certificates import make_certificate
from rpc_ends import LOAD, SECRET, Gateway, TcpProxy, hello, request, run, status_of, until, worker

from baton.config import TlsFiles
from baton.errors import ConfigError
from baton.rpc.auth import read_secret
from baton.rpc.channel import caller_host, connect, split_tcp_address, tcp_address
from baton.rpc.client import announce
from baton.rpc.listener import Tcp
from baton.rpc.messages import Announce, AnnounceReply, Open, encode
from baton.rpc.server import RegistryServer
from baton.rpc.tls import GATEWAY, WORKER, RpcTls
from baton.types import Role


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("certificates")
    make_certificate(directory, "theirs", (GATEWAY, WORKER))
    make_certificate(directory, "ours", (GATEWAY, WORKER))
    for name, roles in (("gateway", [GATEWAY]), ("worker", [WORKER]), ("nobody", [])):
        make_certificate(directory, name, roles, authority="ours")
    return directory


def tls(files: Path, name: str, authority: str = "ours") -> RpcTls:
    paths = (f"{authority}-ca.pem", f"{name}.pem", f"{name}-key.pem")
    return RpcTls(TlsFiles(*(str(files / path) for path in paths), section="rpc"))


def listen(files: Path, name: str = "worker", authority: str = "ours") -> Tcp:
    return Tcp("127.0.0.1", 0, tls(files, name, authority))


def test_a_stream_over_tls_is_as_one_over_a_socket(tmp_path: Path, files: Path) -> None:
    async def main() -> None:
        async with worker(f"unix:{tmp_path}/w", tcp=listen(files)) as (srv, handler, here):
            assert here == f"unix:{tmp_path}/w"
            gateway = Gateway(srv.tcp_address, tls=tls(files, "gateway"))
            await until(lambda: gateway.hellos)
            assert gateway.hellos == [hello()]
            for i in range(50):
                gateway.link.submit(request(f"r{i}"))
                srv.report("gw", load=LOAD, counters={"step": i})
                await asyncio.sleep(0.001)
            await until(lambda: len(gateway.reports) == 50 and len(handler.submitted()) == 50)
            assert [report.index for report in gateway.reports] == list(range(1, 51))
            await gateway.link.close()
            beside = Gateway(here)  # without a certificate: the kernel knows it
            await until(lambda: beside.hellos)
            await beside.link.close()

    run(main())


def test_a_link_that_is_cut_resumes(tmp_path: Path, files: Path) -> None:
    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:
            serving = worker(f"unix:{tmp_path}/w", tcp=listen(files))
            srv, handler, _ = await stack.enter_async_context(serving)
            proxy = await stack.enter_async_context(TcpProxy(srv.tcp_address))
            gateway = Gateway(proxy.address, tls=tls(files, "gateway"))
            await until(lambda: gateway.hellos)
            for i in range(100):
                if i % 40 == 20:
                    await proxy.cut()
                srv.report("gw", load=LOAD, counters={"step": i})
                gateway.link.submit(request(f"r{i}"))
                await asyncio.sleep(0.005)
            await until(lambda: len(gateway.reports) == 100)
            assert [r.counters["step"] for r in gateway.reports] == list(range(100))
            assert handler.submitted() == [f"r{i}" for i in range(100)]
            assert proxy.num_connections == 3
            assert gateway.losses == []
            await gateway.link.close()

    run(main())


@pytest.mark.parametrize(
    ("name", "authority", "secret", "reason"),
    [
        ("theirs", "theirs", SECRET, "CERTIFICATE_VERIFY_FAILED"),
        ("theirs", "ours", SECRET, ""),  # it trusts us, we do not trust it
        ("", "", SECRET, ""),  # plain text
        ("worker", "ours", SECRET, "lacks the name baton-gateway"),
        ("nobody", "ours", SECRET, "lacks the name baton-gateway"),
        ("gateway", "ours", b"x" * 32, "the secrets differ"),
    ],
    ids=["other authority", "mixed", "plain text", "another worker", "no name", "other secret"],
)
def test_a_stranger_opens_no_stream(
    tmp_path: Path, files: Path, name: str, authority: str, secret: bytes, reason: str
) -> None:
    async def main() -> None:
        async with worker(f"unix:{tmp_path}/w", tcp=listen(files)) as (srv, handler, _):
            shown = tls(files, name, authority) if name else None
            stranger = Gateway(srv.tcp_address, secret=secret, tls=shown)
            await until(lambda: stranger.losses, 10.0)
            assert reason in stranger.losses[0]
            assert stranger.hellos == handler.events == []
            friend = Gateway(srv.tcp_address, tls=tls(files, "gateway"))
            await until(lambda: friend.hellos)
            await friend.link.close()

    run(main())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("theirs", "CERTIFICATE_VERIFY_FAILED"),
        ("gateway", "Hostname Verification Check failed"),
        ("nobody", "Hostname Verification Check failed"),
        ("", ""),
    ],
)
def test_a_worker_that_is_none_of_ours_is_told_nothing(
    tmp_path: Path, files: Path, name: str, reason: str
) -> None:
    """One of another authority, with a certificate for something else, or without TLS."""
    authority = "theirs" if name == "theirs" else "ours"
    tcp = listen(files, name, authority) if name else Tcp("127.0.0.1", 0, None)

    async def main() -> None:
        async with worker(f"unix:{tmp_path}/w", tcp=tcp) as (srv, handler, _):
            gateway = Gateway(srv.tcp_address, tls=tls(files, "gateway"))
            await until(lambda: gateway.losses, 10.0)
            assert reason in gateway.losses[0]
            assert gateway.hellos == handler.events == []

    run(main())


def test_announcements(tmp_path: Path, files: Path) -> None:
    seen: list[tuple[Announce, str | None]] = []

    def on_announce(said: Announce, caller: str | None) -> AnnounceReply:
        seen.append((said, caller))
        return AnnounceReply(True)

    async def main() -> None:
        registry = RegistryServer(on_announce, SECRET)
        await registry.start(f"unix:{tmp_path}/g", listen(files, "gateway"))
        address = registry._listener.tcp_address
        said = Announce("decode-0", "10.0.0.2:9", Role.DECODE, 7)
        shown = tls(files, "worker")
        assert await announce(address, said, SECRET, shown) == AnnounceReply(True)
        assert await announce(f"unix:{tmp_path}/g", said, SECRET, shown) == AnnounceReply(True)
        assert seen == [(said, "127.0.0.1"), (said, None)]
        for refused, secret in ((tls(files, "gateway"), SECRET), (shown, b"x" * 32)):
            reply = await announce(address, said, secret, refused)
            assert (reply.accepted, "UNAUTHENTICATED" in reply.reason) == (False, True)
        for stranger in (tls(files, "theirs", "theirs"), None):
            with pytest.raises(TimeoutError):  # it tries again and again
                await asyncio.wait_for(announce(address, said, SECRET, stranger), 0.5)
        assert len(seen) == 2
        await registry.stop(0.2)

    run(main())


def test_plain_bytes_get_no_answer(tmp_path: Path, files: Path) -> None:
    async def main() -> None:
        async with worker(f"unix:{tmp_path}/w", tcp=listen(files)) as (srv, handler, here):
            host, port = split_tcp_address(srv.tcp_address) or ("", 0)

            def talk() -> bytes:
                with socket.create_connection((host, port), 5.0) as plain:
                    plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(100))
                    try:
                        return plain.recv(100)
                    except ConnectionResetError:
                        return b""

            # At most an alert of TLS: no word of HTTP/2.
            assert len(await asyncio.to_thread(talk)) <= 7
            async with connect(srv.tcp_address) as channel:
                with pytest.raises(grpc.aio.AioRpcError):
                    await channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=3.0)
            assert handler.events == []
            code, _ = await status_of(here, encode(Open("gw", 1)), metadata=None)
            assert code is grpc.StatusCode.UNAUTHENTICATED

    run(main())


def test_the_certificates_of_the_example(tmp_path: Path) -> None:
    """Made as examples/two-hosts says: A's gateway reaches B's worker, and not the reverse."""
    readme = Path(__file__).parents[2] / "examples" / "two-hosts" / "README.md"
    (commands,) = re.findall(r"^```\n(EC=.*?)^```$", readme.read_text(), re.M | re.S)
    subprocess.run(["bash", "-euc", commands], cwd=tmp_path, check=True, capture_output=True)
    a, b = (
        RpcTls(TlsFiles(*(str(tmp_path / name) for name in ("ca.pem", f"{x}.pem", f"{x}.key"))))
        for x in ("host-a", "host-b")
    )
    secret = read_secret(tmp_path)

    async def main() -> None:
        for here, there, joins in ((a, b, True), (b, a, False), (a, a, True)):
            tcp = Tcp("127.0.0.1", 0, there)
            async with worker(f"unix:{tmp_path}/w", tcp=tcp) as (srv, _, _):
                gateway = Gateway(srv.tcp_address, tls=here)
                await until(lambda: gateway.hellos or gateway.losses)  # noqa: B023
                assert bool(gateway.hellos) is joins
                await gateway.link.close()

    assert len(secret) == 32
    run(main())


def test_files_that_cannot_be_used_are_named(files: Path) -> None:
    good = TlsFiles(*(str(files / f"ours{end}.pem") for end in ("-ca", "", "-key")), section="rpc")
    for change, field in (
        ({"ca_file": "/nowhere.pem"}, "rpc.tls_ca_file /nowhere.pem cannot be used"),
        ({"cert_file": "/nowhere.pem"}, "rpc.tls_cert_file /nowhere.pem with"),
        ({"key_file": str(files / "theirs-key.pem")}, "rpc.tls_key_file .* cannot be used"),
    ):
        with pytest.raises(ConfigError, match=field):
            RpcTls(msgspec.structs.replace(good, **change))


def test_addresses() -> None:
    for host, port in (("10.0.0.1", 7000), ("fd00::1", 1), ("gateway.example", 65535)):
        assert split_tcp_address(tcp_address(host, port)) == (host, port)
    for wrong in ("", "10.0.0.1", "10.0.0.1:0", "10.0.0.1:65536", "::1:7", "unix:/a:7", "a b:7"):
        assert split_tcp_address(wrong) is None
    assert caller_host("ipv4:10.0.0.2:4567") == "10.0.0.2"
    assert caller_host("ipv6:%5Bfd00::2%5D:4567") == "fd00::2"
    assert caller_host("unix:/run/baton/w.sock") is None
    assert caller_host("unix:") is None
