"""The supervisor's parts that need no supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from baton.config import Config, GatewayConfig, Layout, load_config
from baton.errors import ConfigError
from baton.launch import pdeathsig, runtime_dir
from baton.launch.backoff import Backoff
from baton.launch.console import Console
from baton.launch.cores import usable_cores
from baton.launch.local import baton_command, check_ports, curl_line, resolve, worker_names
from baton.launch.process import Child, describe_exit
from baton.launch.ready import ReadyProbe, base_url
from baton.types import Role


def test_backoff_doubles_to_its_maximum_and_starts_afresh() -> None:
    backoff = Backoff(0.5, 3.0, healthy_s=60)
    assert [backoff.after(1.0) for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert backoff.num_failures == 5
    assert backoff.after(60.0) == 0.5
    assert backoff.num_failures == 1
    assert backoff.after(59.9) == 1.0
    for _ in range(5000):  # no overflow
        assert backoff.after(0.0) <= 3.0


def test_cores(tmp_path: Path) -> None:
    allowed = len(os.sched_getaffinity(0))
    cpu_max = tmp_path / "cpu.max"
    assert usable_cores(cpu_max) == allowed
    for text, cores in (
        ("max 100000\n", allowed), ("100000 100000\n", 1), ("50000 100000\n", 1),
        ("9900000 100000\n", allowed), ("nonsense", allowed), ("1 0", allowed),
    ):  # fmt: skip
        cpu_max.write_text(text)
        assert usable_cores(cpu_max) == cores


def test_resolve_fills_ports() -> None:
    config = load_config(None, {"gateway.port": "0", "launch.layout": "99U"})
    resolved = resolve(config)
    assert resolved.gateway.port > 0
    assert resolved == msgspec.structs.replace(config, gateway=resolved.gateway)
    with pytest.raises(ConfigError, match=r"203\.0\.113\.1"):
        resolve(Config(gateway=GatewayConfig(host="203.0.113.1", port=0)))


def test_taken_ports_are_told_before_anything_starts() -> None:
    with socket.socket() as taken, socket.socket() as free:
        for listener in (taken, free):
            listener.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        free_port = free.getsockname()[1]
        free.close()
        for ports in ((port, free_port), (free_port, port)):
            gateway = GatewayConfig(port=ports[0], admin_port=ports[1])
            with pytest.raises(ConfigError, match=rf"port {port} on 127.0.0.1 .*in use"):
                check_ports(Config(gateway=gateway))
        check_ports(Config(gateway=GatewayConfig(port=free_port, admin_port=0)))


def test_commands(tmp_path: Path) -> None:
    names = worker_names(Layout.parse("2P1D"))
    assert names == {"prefill-0": Role.PREFILL, "prefill-1": Role.PREFILL, "decode-0": Role.DECODE}
    here = ["--runtime-dir", str(tmp_path), "--config", f"{tmp_path}/config.yaml"]
    baton = [sys.executable, "-m", "baton"]
    assert baton_command("gateway", None, tmp_path) == [*baton, "gateway", *here]
    assert baton_command("decode-0", Role.DECODE, tmp_path, ["--engine.cpus", "1"]) == [
        *baton, "worker", "--role", "decode", "--id", "decode-0", *here,
        "--gateway", f"unix:{tmp_path}/gateway.sock", "--engine.cpus", "1",
    ]  # fmt: skip


def test_curl_line_survives_a_shell() -> None:
    config = load_config(None, {"model.path": "x", "model.served_name": "it's"})
    words = shlex.split(curl_line(config))
    assert words[:3] == ["curl", "-N", "http://127.0.0.1:8000/v1/chat/completions"]
    assert json.loads(words[words.index("-d") + 1])["model"] == "it's"
    assert "Authorization" not in curl_line(config)
    safe = load_config(
        None,
        {
            "gateway.tls_cert_file": "c.pem",
            "gateway.tls_key_file": "k",
            "gateway.api_keys_file": "f",
        },
    )
    assert "--cacert c.pem" in curl_line(safe) and "Bearer $API_KEY" in curl_line(safe)
    assert base_url(GatewayConfig(host="::", port=1)) == "http://[::1]:1"
    assert base_url(GatewayConfig(host="0.0.0.0", port=1)) == "http://127.0.0.1:1"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_console_keeps_the_status_line_last() -> None:
    pipe, terminal = io.StringIO(), _Terminal()
    for stream in (pipe, terminal):
        console = Console(stream)
        console.status("starting")
        console.child_line("prefill-0", "loading")
        console.status("")
        console.line("done")
    assert pipe.getvalue() == "[prefill-0] loading\ndone\n"
    clear = "\r\x1b[K"
    assert terminal.getvalue() == (
        f"{clear}starting{clear}\x1b[36m[prefill-0]\x1b[0m loading\nstarting{clear}{clear}done\n"
    )


def test_runtime_dir_is_private_and_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="bt") as parent:
        monkeypatch.setenv("XDG_RUNTIME_DIR", parent)
        with runtime_dir.runtime_dir() as path:
            assert path.parent == Path(parent)
            assert path.stat().st_mode & 0o777 == 0o700
            (path / "x.sock").touch()
            with runtime_dir.runtime_dir() as other:  # does not sweep away the live one
                assert other != path
            assert path.exists() and not other.exists()
        assert not path.exists()
        long = Path(parent) / ("l" * 90)
        long.mkdir()
        for unusable in (str(long), f"{parent}/absent"):
            monkeypatch.setenv("XDG_RUNTIME_DIR", unusable)
            with runtime_dir.runtime_dir() as path:
                assert not path.is_relative_to(parent)
                assert len(str(path / "prefill-99.store.sock")) < 100
        assert list(long.iterdir()) == []
        monkeypatch.setattr(runtime_dir, "MAX_SOCKET_PATH", 10)
        with pytest.raises(ConfigError, match="XDG_RUNTIME_DIR"), runtime_dir.runtime_dir():
            pass


def _child(program: str) -> tuple[Child, io.StringIO]:
    stream = io.StringIO()
    return Child("c", [sys.executable, "-c", program], Console(stream)), stream


def test_child_passes_output_on_whole() -> None:
    program = (
        "import sys; sys.stdout.buffer.write(b'a\\r\\n\\xff\\n' + b'x' * 100_000 + b'\\nlast')"
    )
    child, stream = _child(program)
    assert asyncio.run(child.run()) == 0
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["[c] a", "[c] \N{REPLACEMENT CHARACTER}"]
    assert lines[-1] == "[c] last"
    assert len(child.last_lines) <= 20


def test_child_does_not_wait_for_who_holds_its_output() -> None:
    child, stream = _child(
        "import subprocess, sys; holder = subprocess.Popen([sys.executable, '-c', "
        "'import os, time; os.setsid(); time.sleep(60)']); import time; time.sleep(0.3); "
        "print('bye', holder.pid, flush=True); sys.exit(4)"
    )

    async def main() -> int:
        async with asyncio.timeout(30):
            return await child.run()

    try:
        assert asyncio.run(main()) == 4
    finally:
        found = re.search(r"\[c\] bye (\d+)\n", stream.getvalue())
        if found is not None:
            os.kill(int(found[1]), signal.SIGKILL)
    assert found is not None


def test_missing_program_and_dead_parent() -> None:
    child = Child("c", ["/nowhere/program"], Console(io.StringIO()))
    assert asyncio.run(child.run()) == 127
    assert list(child.last_lines) == ["cannot run /nowhere/program: No such file or directory"]
    script = [sys.executable, "-I", "-S", pdeathsig.__file__, str(os.getpid() + 1), "/bin/true"]
    done = subprocess.run(script, capture_output=True, text=True)
    assert (done.returncode, "is gone" in done.stderr) == (1, True)
    assert [describe_exit(c) for c in (3, -9, -1000)] == [
        "exit code 3", "signal SIGKILL", "signal 1000",
    ]  # fmt: skip


@contextlib.contextmanager
def _gateway(status: list[int]) -> Iterator[int]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/ready"
            body = b'{"error": {"message": "no decode worker"}}'
            self.send_response(status[0])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _ask(config: GatewayConfig) -> str | None:
    return asyncio.run(ReadyProbe(config)())


def test_ready_probe() -> None:
    status = [503]
    with _gateway(status) as port:
        config = GatewayConfig(admin_port=port)
        assert _ask(config) == "no decode worker"
        status[0] = 200
        assert _ask(config) is None
    assert _ask(config) == "the gateway is starting"
