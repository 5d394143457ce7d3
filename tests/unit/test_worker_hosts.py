"""Where a worker listens for gateways of other hosts, and what it refuses to start with."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from baton.config import load_config
from baton.errors import ConfigError
from baton.rpc.listener import Tcp
from baton.worker.hosts import listener_for

OPEN = {"rpc.allow_insecure": "true", "fabric.allow_insecure": "true"}


def listener(gateway: str, **fields: str) -> Tcp | None:
    config = load_config(None, {f"rpc.{field}": value for field, value in fields.items()})
    return listener_for(config, ["unix:/run/baton/gateway.sock", gateway])


def test_a_worker_listens_over_tcp_only_for_a_gateway_over_tcp() -> None:
    assert listener("unix:/run/other/gateway.sock") is None
    assert listener("127.0.0.1:7000") == Tcp("127.0.0.1", 0, None)
    assert listener("[::1]:7000", host="::1", worker_port="7001") == Tcp("::1", 7001, None)
    config = load_config(None, {"rpc.host": "10.0.0.2", **OPEN})
    assert listener_for(config, ["10.0.0.1:7000"]) == Tcp("10.0.0.2", 0, None)


@pytest.mark.parametrize(
    ("gateway", "message"),
    [
        ("10.0.0.1", "--gateway 10.0.0.1 is neither unix:PATH nor HOST:PORT"),
        ("/run/baton/gateway.sock", "neither unix:PATH nor"),
        ("10.0.0.1:7000", r"could not connect to this worker at rpc.host 127.0.0.1: set it"),
        ("gateway.example:7000", r"could not connect to this worker"),
    ],
)
def test_gateways_that_cannot_be_used(gateway: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        listener(gateway)


def test_the_secret_does_not_travel_in_plain_text_unless_told() -> None:
    # What `load_config` refuses already, should a configuration come otherwise.
    config = load_config(None, {"rpc.host": "10.0.0.2", **OPEN})
    config = replace(config, rpc=replace(config.rpc, allow_insecure=False))
    with pytest.raises(ConfigError, match=r"10\.0\.0\.1:7000 is on another host, and rpc\.tls_ca"):
        listener_for(config, ["10.0.0.1:7000"])
