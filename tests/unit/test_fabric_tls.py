"""TLS between workers: certificates of one authority on both sides, 1.3, and no way round it."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import subprocess
from pathlib import Path

import msgspec
import pytest
from parts.certificates import make_certificate
from tcp_ends import Make, ask_of, num_connections, until

from baton.errors import ConfigError
from baton.fabric.tls import TlsFiles, client_context, server_context

pytest_plugins = ["tcp_fixtures"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command to make certificates")
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def ours(directory: Path) -> TlsFiles:
    return make_certificate(directory, "ours")


@pytest.fixture(scope="module")
def theirs(directory: Path) -> TlsFiles:
    return make_certificate(directory, "theirs")


def without_certificate(files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(files.ca_file)
    return context


@pytest.mark.parametrize("num_streams", [1, 3])
def test_blocks_come_whole(
    make: Make, stack: contextlib.ExitStack, ours: TlsFiles, num_streams: int
) -> None:
    store = make(num_blocks=20, block_bytes=600_000, tls=server_context(ours))
    reader = store.transport(tls=client_context(ours), num_streams=num_streams)
    stack.enter_context(contextlib.closing(reader))
    assert store.works(reader)
    assert store.works(reader), "and again"
    assert num_connections(store) <= num_streams
    (streams,) = reader._idle.values()
    assert {stream._tls.version() for stream in streams if stream._tls} == {"TLSv1.3"}
    grant = msgspec.structs.replace(store.grant, tenant="other")
    assert set(store.fetch(reader, grant=grant)) == {"refused"}


def test_a_stranger_is_refused(
    make: Make, stack: contextlib.ExitStack, ours: TlsFiles, theirs: TlsFiles
) -> None:
    """Another authority's certificate, none at all, or one that we trust but they do not."""
    store = make(tls=server_context(ours))
    mixed = TlsFiles(ours.ca_file, theirs.cert_file, theirs.key_file)
    for context in (
        client_context(theirs),
        client_context(mixed),
        without_certificate(ours),
        None,
    ):
        stranger = stack.enter_context(contextlib.closing(store.transport(tls=context)))
        assert set(store.fetch(stranger, seconds=3.0)) == {"unreachable"}
    until(lambda: num_connections(store) == 0)
    friend = stack.enter_context(contextlib.closing(store.transport(tls=client_context(ours))))
    assert store.works(friend)


def test_a_server_of_strangers_is_not_asked(
    make: Make, stack: contextlib.ExitStack, ours: TlsFiles, theirs: TlsFiles
) -> None:
    for context in (server_context(theirs), None):
        store = make(tls=context)
        reader = stack.enter_context(contextlib.closing(store.transport(tls=client_context(ours))))
        assert set(store.fetch(reader, seconds=3.0)) == {"unreachable"}


def test_older_versions_are_refused(make: Make, ours: TlsFiles) -> None:
    store = make(tls=server_context(ours))
    context = client_context(ours)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    connection = socket.create_connection(store.address, 5.0)
    with connection, pytest.raises(ssl.SSLError):
        context.wrap_socket(connection)


def test_a_handshake_has_its_time(
    make: Make, ours: TlsFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.fabric.tcp_server.ASK_S", 0.3)
    store = make(tls=server_context(ours))
    with socket.create_connection(store.address, 5.0) as silent:
        assert silent.recv(100) == b""
    with socket.create_connection(store.address, 5.0) as plain:
        plain.sendall(ask_of(store))
        with contextlib.suppress(ConnectionResetError):
            answer = plain.recv(1 << 16)
            assert not any(block[:100] in answer for block in store.blocks)


def test_files_that_cannot_be_used_are_named(
    ours: TlsFiles, theirs: TlsFiles, directory: Path
) -> None:
    encrypted = directory / "encrypted.pem"
    command = f"openssl ec -aes256 -passout pass:secret -in {ours.key_file} -out {encrypted}"
    subprocess.run(command.split(), check=True, capture_output=True)
    for change, field in (
        ({"ca_file": "/nowhere.pem"}, "tls_ca_file /nowhere.pem cannot be used"),
        ({"ca_file": ours.key_file}, "tls_ca_file"),
        ({"cert_file": "/nowhere.pem"}, "tls_cert_file /nowhere.pem with"),
        ({"key_file": theirs.key_file}, "tls_key_file .* cannot be used"),
        ({"key_file": str(encrypted)}, "the key is encrypted"),
    ):
        files = msgspec.structs.replace(ours, **change)
        for make_context in (server_context, client_context):
            with pytest.raises(ConfigError, match=field):
                make_context(files)
