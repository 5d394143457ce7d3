"""The gateway process: two HTTP listeners, the registry for workers, signals.

SIGTERM or SIGINT: no new connection is accepted, open requests finish (for at most
`launch.drain_timeout_s`), then it exits 0. A second one ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import signal
import socket
from pathlib import Path

import uvicorn
import uvloop

from baton.config import Config, Layout
from baton.core.decision_log import LoggedRouter
from baton.core.life import HandoffPolicy
from baton.core.router import Router
from baton.errors import ConfigError
from baton.gateway.app import create_admin_app, create_app
from baton.gateway.auditor import Auditor
from baton.gateway.auth import ApiKeys
from baton.gateway.limits import Limits
from baton.gateway.placement import PlacingDispatcher
from baton.gateway.worker_metrics import export
from baton.model.hub import resolve_model
from baton.observe.logs import open_decision_log, setup_logging
from baton.observe.metrics import Metrics
from baton.rpc.auth import read_secret
from baton.rpc.channel import numeric
from baton.rpc.listener import Tcp
from baton.rpc.server import RegistryServer
from baton.rpc.tls import RpcTls
from baton.text.chat_template import ChatTemplate
from baton.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

REGISTRY_SOCKET = "gateway.sock"


def run(config: Config, runtime_dir: Path) -> int:
    """Serve until told to stop; returns the exit code.

    Raises:
        ConfigError: a listener, key file or model directory cannot be used.
    """
    setup_logging(config.log.level, "gateway")
    logger.info("loading model=%s", config.model.path)
    return uvloop.run(_serve(config, runtime_dir))


async def _serve(config: Config, runtime_dir: Path) -> int:
    model_dir = resolve_model(config.model.path)
    tokenizer = Tokenizer.from_dir(model_dir)
    template = ChatTemplate.from_dir(model_dir)
    gateway = config.gateway
    gateway_id = "gateway"
    secret = read_secret(runtime_dir, config.rpc.secret_file)
    tcp = _tcp(config)
    with contextlib.ExitStack() as stack:
        router = Router()
        decisions = open_decision_log(config.log.decision_log, gateway_id)
        if decisions is not None:
            router = LoggedRouter(gateway_id, stack.enter_context(decisions).write)
        dispatcher = PlacingDispatcher(
            gateway_id,
            secrets.randbits(63),
            secret,
            runtime_dir,
            Layout.parse(config.launch.layout).counts(),
            router=router,
            policy=HandoffPolicy(
                lease_ttl_s=config.store.lease_ttl_s, fetch_early=config.fabric.fetch_early
            ),
            patience_s=gateway.frozen_after_s,
            auditor=Auditor.open(config, model_dir),
        )
        metrics = Metrics()
        app = create_app(
            dispatcher=dispatcher,
            tokenizer=tokenizer,
            chat_template=template if template.exists else None,
            model_name=config.model.name,
            metrics=metrics,
            limits=Limits(
                max_body_bytes=gateway.max_body_bytes,
                max_queued_requests=gateway.max_queued_requests,
                request_timeout_s=gateway.request_timeout_s,
            ),
            keys=ApiKeys.from_file(gateway.api_keys_file) if gateway.api_keys_file else None,
            tenant_secret=secret,
        )
        admin = create_admin_app(
            metrics=metrics,
            refresh=lambda: export(dispatcher, metrics),
            recent=dispatcher.recent,
            readiness=dispatcher.readiness,
            frozen=dispatcher.watch.frozen,
            check_fabric=dispatcher.fabric_check.run,
            audit=dispatcher.auditor.view,
        )
        servers = [
            _server(
                app,
                timeout_graceful_shutdown=int(config.launch.drain_timeout_s) or None,
                ssl_certfile=gateway.tls_cert_file,
                ssl_keyfile=gateway.tls_key_file,
                limit_concurrency=gateway.max_connections,
            ),
            _server(admin, timeout_graceful_shutdown=1),
        ]
        sockets = [
            _listen(gateway.host, gateway.port, "gateway.port"),
            _listen(gateway.admin_host, gateway.admin_port, "gateway.admin_port"),
        ]
        if tcp is not None:
            dispatcher.registry.open_to_hosts(tcp.tls)
        registry = RegistryServer(dispatcher.registry.announce, secret)
        await registry.start(f"unix:{runtime_dir / REGISTRY_SOCKET}", tcp)
        await registry.set_serving(True)
        stopping = asyncio.Event()
        _on_signals(servers, stopping)
        try:
            running = [
                asyncio.create_task(server.serve(sockets=[sock]))
                for server, sock in zip(servers, sockets, strict=True)
            ]
            logger.info("listening host=%s port=%d", gateway.host, gateway.port)
            await running[0]
            servers[1].should_exit = True
            await running[1]
        finally:
            await dispatcher.close()
            await registry.stop(0.0)
    return 0


def _tcp(config: Config) -> Tcp | None:
    """Where workers of other hosts announce themselves, if they may."""
    rpc, files = config.rpc, config.rpc_tls
    if rpc.port is None:
        return None
    return Tcp(numeric(rpc.host, "rpc.host"), rpc.port, RpcTls(files) if files else None)


class _Server(uvicorn.Server):
    """Without uvicorn's own signal handling: two servers share this process."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield


def _server(app: object, **options: object) -> _Server:
    return _Server(
        uvicorn.Config(
            app,  # type: ignore[arg-type]
            log_config=None,
            access_log=False,
            http="httptools",
            lifespan="off",
            server_header=False,
            **options,  # type: ignore[arg-type]
        )
    )


def _on_signals(servers: list[_Server], stopping: asyncio.Event) -> None:
    def stop() -> None:
        for server in servers[:1]:
            if stopping.is_set():
                server.force_exit = True
            server.should_exit = True
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)


def _listen(host: str, port: int, field: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"{field}: cannot listen on {host}:{port}: {error.strerror}; choose another port"
        ) from error
    return sock
