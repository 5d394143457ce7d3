"""The whole configuration, what follows from several of its fields, and what they must not be."""

from __future__ import annotations

import ipaddress

import msgspec

from baton.config.cpus import SHARED, parse_cpus
from baton.config.layout import Layout
from baton.config.plan import PlanConfig
from baton.config.sections import (
    DecodeConfig,
    EngineConfig,
    FabricConfig,
    GatewayConfig,
    LaunchConfig,
    LogConfig,
    ModelConfig,
    PrefillConfig,
    RpcConfig,
    StoreConfig,
)
from baton.config.tls import TlsFiles
from baton.errors import ConfigError
from baton.types import Role


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that a user can set."""

    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    prefill: PrefillConfig = PrefillConfig()
    decode: DecodeConfig = DecodeConfig()
    store: StoreConfig = StoreConfig()
    fabric: FabricConfig = FabricConfig()
    rpc: RpcConfig = RpcConfig()
    gateway: GatewayConfig = GatewayConfig()
    launch: LaunchConfig = LaunchConfig()
    log: LogConfig = LogConfig()
    plan: PlanConfig = PlanConfig()

    def for_role(self, role: Role) -> Config:
        """What a worker of this role goes by: its own settings in place of everybody's."""
        own = {Role.PREFILL: self.prefill, Role.DECODE: self.decode}.get(role)
        if own is None:
            return self
        engine = {
            name: value
            for name in ("device", "block_size", "kernels")
            if (value := getattr(own, name)) is not None
        }
        return msgspec.structs.replace(
            self,
            model=msgspec.structs.replace(self.model, dtype=own.dtype or self.model.dtype),
            engine=msgspec.structs.replace(self.engine, **engine),
        )

    def validate(self) -> None:
        """Check what no type can: listeners, TLS files, layout, lists of cores, back-off.

        Raises:
            ConfigError: it names the fields and what to change.
        """
        gateway = self.gateway
        Layout.parse(self.launch.layout)
        if self.engine.cpus not in (None, SHARED):
            parse_cpus(self.engine.cpus, "engine.cpus")
        for name in ("prefill_cpus", "decode_cpus"):
            if (cpus := getattr(self.launch, name)) is not None:
                parse_cpus(cpus, f"launch.{name}")
        for have, lack in (("cert", "key"), ("key", "cert")):
            if getattr(gateway, f"tls_{have}_file") and not getattr(gateway, f"tls_{lack}_file"):
                raise ConfigError(
                    f"gateway.tls_{have}_file is set without gateway.tls_{lack}_file: "
                    f"give both, or neither"
                )
        if not gateway.allow_insecure:
            _check_listeners(gateway)
        _check_rpc(self.rpc)
        _check_fabric(self)
        self.plan.validate()
        if gateway.port == gateway.admin_port != 0:
            raise ConfigError(
                f"gateway.port and gateway.admin_port are both {gateway.port}: "
                "give the admin listener a port of its own"
            )
        if self.launch.restart_backoff_max_s < self.launch.restart_backoff_s:
            raise ConfigError(
                "launch.restart_backoff_max_s is less than launch.restart_backoff_s: raise it"
            )

    @property
    def has_other_hosts(self) -> bool:
        """Whether processes of this host listen for those of others."""
        return not is_loopback(self.rpc.host)

    @property
    def block_host(self) -> str:
        """Where workers of this host serve their blocks, to whoever is not on it."""
        return self.fabric.tcp_host or self.rpc.host

    @property
    def serves_blocks_over_tcp(self) -> bool:
        fabric = self.fabric
        if fabric.tcp_port is not None or fabric.transport == "tcp":
            return True
        auto = fabric.transport == "auto" and fabric.between_hosts == "tcp"
        return auto and self.has_other_hosts

    @property
    def uses_nixl(self) -> bool:
        """Whether blocks may come through NIXL."""
        fabric = self.fabric
        auto = fabric.transport == "auto" and fabric.between_hosts == "nixl"
        return fabric.transport == "nixl" or (auto and self.has_other_hosts)

    @property
    def rpc_tls(self) -> TlsFiles | None:
        """None speaks plain text."""
        return _tls_files(self.rpc, "rpc")

    @property
    def block_tls(self) -> TlsFiles | None:
        """None speaks plain text."""
        return _tls_files(self.fabric, "fabric") or self.rpc_tls


def _check_listeners(gateway: GatewayConfig) -> None:
    if not is_loopback(gateway.host):
        missing = [
            name
            for name in ("tls_cert_file", "tls_key_file", "api_keys_file")
            if getattr(gateway, name) is None
        ]
        if missing:
            raise ConfigError(
                f"gateway.host {gateway.host} can be reached from other machines, and "
                f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set: set "
                f"{'it' if len(missing) == 1 else 'them'}, listen on 127.0.0.1, or say "
                "--gateway.allow-insecure"
            )
    if not is_loopback(gateway.admin_host):
        raise ConfigError(
            f"gateway.admin_host {gateway.admin_host} can be reached from other machines, and the "
            "admin listener has neither TLS nor API keys: use 127.0.0.1, or say "
            "--gateway.allow-insecure"
        )


_TLS_FIELDS = ("tls_ca_file", "tls_cert_file", "tls_key_file")


def _tls_files(section: FabricConfig | RpcConfig, name: str) -> TlsFiles | None:
    ca, cert, key = section.tls_ca_file, section.tls_cert_file, section.tls_key_file
    if ca is None or cert is None or key is None:
        return None
    return TlsFiles(ca, cert, key, name)


def _check_tls_files(section: FabricConfig | RpcConfig, name: str) -> None:
    missing = [f"{name}.{field}" for field in _TLS_FIELDS if getattr(section, field) is None]
    if 0 < len(missing) < len(_TLS_FIELDS):
        given = next(field for field in _TLS_FIELDS if getattr(section, field) is not None)
        raise ConfigError(
            f"{name}.{given} is set without {' and '.join(missing)}: give all three, or none"
        )


def _check_rpc(rpc: RpcConfig) -> None:
    _check_tls_files(rpc, "rpc")
    if is_any_address(rpc.host):
        raise ConfigError(
            f"rpc.host {rpc.host} is no address that other hosts could connect to: give the one "
            "of this machine under which they reach it"
        )
    needed = (*_TLS_FIELDS, "secret_file")
    missing = [f"rpc.{field}" for field in needed if getattr(rpc, field) is None]
    if missing and not is_loopback(rpc.host) and not rpc.allow_insecure:
        raise ConfigError(
            f"rpc.host {rpc.host} can be reached from other machines, and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set: set "
            f"{'it' if len(missing) == 1 else 'them'}, use 127.0.0.1, or say --rpc.allow-insecure"
        )


def _check_fabric(config: Config) -> None:
    fabric, host = config.fabric, config.block_host
    _check_tls_files(fabric, "fabric")
    if is_any_address(host):
        raise ConfigError(
            f"fabric.tcp_host {host} is no address that other workers could connect "
            "to: give the one of this machine under which they reach it"
        )
    over_tcp = config.serves_blocks_over_tcp
    if is_loopback(host):
        reads = over_tcp or config.uses_nixl
        if config.has_other_hosts and reads and fabric.tcp_advertise is None:
            raise ConfigError(
                f"fabric.tcp_host {host} cannot be reached from the other hosts that rpc.host "
                f"{config.rpc.host} is for: leave it out, or give an address that they reach"
            )
        return
    if over_tcp and config.block_tls is None and not fabric.allow_insecure:
        raise ConfigError(
            f"fabric.tcp_host {host} can be reached from other machines, and "
            "fabric.tls_ca_file, fabric.tls_cert_file and fabric.tls_key_file are not set: "
            "set them, listen on 127.0.0.1, or say --fabric.allow-insecure"
        )
    if config.uses_nixl and config.has_other_hosts and not fabric.allow_insecure:
        raise ConfigError(
            "NIXL sends blocks to other hosts without encryption, and whoever reaches its ports "
            "can read them: use tcp, or say --fabric.allow-insecure if the network is yours alone"
        )


def is_any_address(host: str) -> bool:
    """Whether `host` stands for every address of this machine: 0.0.0.0, ::."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_unspecified
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`; a name other than localhost counts as not."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
