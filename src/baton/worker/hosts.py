"""What a worker needs to know of other hosts: where to listen for gateways there, and whether."""

from __future__ import annotations

from collections.abc import Sequence

from baton.config import Config, is_loopback
from baton.errors import ConfigError
from baton.rpc.channel import is_unix, numeric, split_tcp_address
from baton.rpc.listener import Tcp
from baton.rpc.tls import RpcTls


def listener_for(config: Config, gateways: Sequence[str]) -> Tcp | None:
    """Where gateways that are reached over TCP find this worker; None if there are none.

    Raises:
        ConfigError: an address makes no sense, the gateway could not connect back, or the secret
            would travel in plain text.
    """
    rpc, files = config.rpc, config.rpc_tls
    remote = [gateway for gateway in gateways if not is_unix(gateway)]
    for gateway in remote:
        split = split_tcp_address(gateway)
        if split is None:
            raise ConfigError(f"--gateway {gateway} is neither unix:PATH nor HOST:PORT")
        if is_loopback(split[0]):
            continue
        if not config.has_other_hosts:
            raise ConfigError(
                f"the gateway {gateway} could not connect to this worker at rpc.host {rpc.host}: "
                "set it to the address of this machine under which the gateway reaches it"
            )
        if files is None and not rpc.allow_insecure:
            raise ConfigError(
                f"the gateway {gateway} is on another host, and rpc.tls_ca_file, rpc.tls_cert_file "
                "and rpc.tls_key_file are not set: set them, or say --rpc.allow-insecure"
            )
    if not remote:
        return None
    tls = RpcTls(files) if files else None
    return Tcp(numeric(rpc.host, "rpc.host"), rpc.worker_port, tls)
