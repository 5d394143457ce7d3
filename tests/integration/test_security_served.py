"""Keys, TLS, and what another process of this machine may do to a deployment: nothing."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import ssl
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from faults.served import SMALL, Victim, make_model, prompt_of
from rpc_ends import run

from baton.rpc.auth import METADATA_KEY, read_secret
from baton.rpc.client import WorkerLink, announce
from baton.rpc.messages import Announce, Hello, StepReport
from baton.types import Role

ALICE, BOB = "sk-of-alice-0123456789", "sk-of-bob-0123456789"
ENDPOINTS = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("GET", "/v1/models"),
    ("GET", "/openapi.json"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
    ("GET", "/requests"),
    ("GET", "/nothing"),
]


class Guarded(Victim):
    """A deployment behind TLS and keys."""

    cert: Path

    def open(self, key: str | None = None, verify: bool = True) -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        root = self.url.replace("http:", "https:")
        context = ssl.create_default_context(cafile=str(self.cert) if verify else None)
        return httpx.Client(
            base_url=root, headers=headers, verify=context, timeout=30, trust_env=False
        )

    @property
    def runtime_dir(self) -> Path:
        (path,) = (self._home / "run").iterdir()
        return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cert.pem and key.pem of 127.0.0.1, signed by itself; keys, a file of two hashes."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command to make a certificate")
    directory = tmp_path_factory.mktemp("files")
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
        "-subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1 "
        f"-keyout {directory}/key.pem -out {directory}/cert.pem"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    hashes = [hashlib.sha256(key.encode()).hexdigest() for key in (ALICE, BOB)]
    (directory / "keys").write_text(f"# two\n{hashes[0]} alice\n{hashes[1]} bob\n")
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("served") / "org-tiny")


@pytest.fixture(scope="module")
def served(model: Path, files: Path) -> Iterator[Guarded]:
    Guarded.cert = files / "cert.pem"
    flags = [*SMALL, "--gateway.api-keys-file", str(files / "keys")]
    flags += ["--gateway.tls-cert-file", str(files / "cert.pem")]
    flags += ["--gateway.tls-key-file", str(files / "key.pem")]
    with Guarded.start(model, "1P1D", *flags) as deployment:
        assert isinstance(deployment, Guarded)
        yield deployment
        for secret in (ALICE, BOB):
            assert secret not in deployment.output


@pytest.mark.parametrize("key", [None, "sk-wrong", ALICE[:-1], ALICE.upper(), f"{ALICE} {BOB}"])
def test_without_the_key_only_health_is_open(served: Guarded, key: str | None) -> None:
    with served.open(key) as client:
        for method, path in ENDPOINTS:
            response = client.request(method, path, json={} if method == "POST" else None)
            assert response.status_code == 401, path
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/health").json() == {"status": "ok"}
        for scheme in (f"Basic {ALICE}", ALICE, f"Bearer{ALICE}", "Bearer"):
            response = client.get("/v1/models", headers={"authorization": scheme})
            assert response.status_code == 401


def test_the_official_client_with_its_key_over_tls(served: Guarded) -> None:
    with (
        served.open() as transport,
        openai.OpenAI(
            base_url=f"{transport.base_url}/v1", api_key=ALICE, http_client=transport
        ) as client,
    ):
        whole = client.completions.create(
            model=served.model, prompt="Hello", max_tokens=8, temperature=0
        )
        parts = client.completions.create(
            model=served.model, prompt="Hello", max_tokens=8, temperature=0, stream=True
        )
        assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    with served.open() as transport, pytest.raises(openai.AuthenticationError):
        openai.OpenAI(
            base_url=f"{transport.base_url}/v1", api_key="sk-wrong", http_client=transport
        ).models.list()


def test_metrics_are_not_on_the_public_port(served: Guarded) -> None:
    with served.open(ALICE) as client:
        for path in ("/metrics", "/requests"):
            assert client.get(path).status_code == 404
    assert ("baton_num_requests_running", ()) in served.metrics()


def test_tenants_do_not_see_each_others_cache(served: Guarded) -> None:
    prompt = prompt_of(200, 5)

    def cached(key: str) -> int:
        body = {"model": served.model, "prompt": prompt, "max_tokens": 2}
        with served.open(key) as client:
            usage = client.post("/v1/completions", json=body).json()["usage"]
        found: int = usage["prompt_tokens_details"]["cached_tokens"]
        return found

    assert [cached(ALICE), cached(ALICE), cached(BOB), cached(BOB)] == [0, 192, 0, 192]


def test_plain_http_and_unknown_certificates_fail(served: Guarded) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{served.url}/health", trust_env=False)
    with served.open(verify=False) as client, pytest.raises(httpx.ConnectError, match="CERT"):
        client.get("/health")


def test_only_loopback_listens(served: Guarded) -> None:
    """Every TCP socket that listens in these processes, from the kernel's own table."""
    inodes = set()
    for pid in (served.pid, *served.processes().values()):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            link = os.readlink(descriptor)
            if link.startswith("socket:["):
                inodes.add(link[8:-1])
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                listening.append(fields[1].split(":")[0])
    assert listening == ["0100007F"] * 2  # 127.0.0.1: the public port and the admin port


def test_files_are_private(served: Guarded) -> None:
    path = served.runtime_dir
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE((path / "secret").stat().st_mode) == 0o600
    secret = read_secret(path)
    for pid in served.processes().values():
        for name in ("cmdline", "environ"):
            held = Path(f"/proc/{pid}/{name}").read_bytes()
            assert secret not in held
            assert secret.hex().encode() not in held
    assert secret.hex() not in (path / "config.yaml").read_text()


def test_a_stranger_cannot_talk_to_a_worker(served: Guarded) -> None:
    """With another secret, a stream to a worker is refused; with the right one it opens."""
    path = served.runtime_dir
    address = f"unix:{path / 'decode-0.sock'}"

    async def knock(secret: bytes) -> tuple[list[Hello], list[str]]:
        hellos: list[Hello] = []
        lost: list[str] = []
        heard = asyncio.Event()

        def on_hello(hello: Hello) -> None:
            hellos.append(hello)
            heard.set()

        def on_lost(reason: str) -> None:
            lost.append(reason)
            heard.set()

        def on_report(report: StepReport) -> None: ...

        link = WorkerLink(address, "stranger", 1, secret, on_hello, on_report, on_lost)
        link.start()
        async with asyncio.timeout(10):
            await heard.wait()
        await link.close()
        return hellos, lost

    for secret in (bytes(32), b"", read_secret(path)[::-1]):
        hellos, lost = run(knock(secret))
        assert not hellos
        assert "UNAUTHENTICATED" in lost[0]
    hellos, lost = run(knock(read_secret(path)))
    assert (len(hellos), lost) == (1, [])
    assert METADATA_KEY not in served.output


def test_a_stranger_cannot_announce_a_worker(served: Guarded) -> None:
    path = served.runtime_dir
    gateway = f"unix:{path / 'gateway.sock'}"
    said = Announce("decode-0", f"unix:{path / 'decode-0.sock'}", Role.DECODE, 666)
    reply = run(announce(gateway, said, bytes(32)))
    assert not reply.accepted
    assert "UNAUTHENTICATED" in reply.reason
    # One who knows the secret still cannot send the gateway elsewhere.
    elsewhere = Announce("decode-9", "unix:/tmp/elsewhere.sock", Role.DECODE, 1)
    reply = run(announce(gateway, elsewhere, read_secret(path)))
    assert (reply.accepted, "runtime directory" in reply.reason) == (False, True)
    with served.open(ALICE) as client:
        assert client.get("/ready").status_code == 200


@pytest.mark.parametrize(
    ("flags", "missing"),
    [
        ([], ["tls_cert_file", "tls_key_file", "api_keys_file"]),
        (["--gateway.api-keys-file", "FILES/keys"], ["tls_cert_file", "tls_key_file"]),
        (
            [
                "--gateway.tls-cert-file",
                "FILES/cert.pem",
                "--gateway.tls-key-file",
                "FILES/key.pem",
            ],
            ["api_keys_file"],
        ),
    ],
    ids=["nothing", "keys alone", "tls alone"],
)
@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_addresses_need_tls_and_keys(
    model: Path, files: Path, host: str, flags: list[str], missing: list[str]
) -> None:
    arguments = [flag.replace("FILES", str(files)) for flag in flags]
    code, said = refused(model, "--gateway.host", host, *arguments)
    assert code == 2
    for name in ("tls_cert_file", "tls_key_file", "api_keys_file"):
        assert (name in said) == (name in missing), said
    assert f"gateway.host {host}" in said
    assert "allow-insecure" in said


def test_the_admin_listener_stays_on_loopback(model: Path) -> None:
    code, said = refused(model, "--gateway.admin-host", "0.0.0.0")
    assert code == 2
    assert "gateway.admin_host 0.0.0.0" in said


def refused(model: Path, *arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "baton", "serve", "--model", str(model), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    return done.returncode, done.stdout
