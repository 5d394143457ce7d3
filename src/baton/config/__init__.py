"""Typed configuration: one declaration a field gives the flag, the YAML key and the docs.

`engine.max_num_seqs: 64` in a file is `--engine.max-num-seqs 64` on the command line, and the
order is: defaults < YAML file < flags. No environment variable is read. A `Config` is never
changed after `load_config`; what a worker works out from it (device, number of blocks, length) is
a struct of the engine's, not a field here. Fields whose name ends in `_bytes` take an integer or
a string such as `512MiB`.
"""

from baton.config.cpus import SHARED, format_cpus, parse_cpus
from baton.config.flags import Flag, flags, format_size, format_value, parse_size, sections
from baton.config.layout import Layout
from baton.config.load import Overrides, load_config, to_yaml
from baton.config.plan import PlanConfig, parse_deciles
from baton.config.sections import (
    EngineConfig,
    FabricConfig,
    GatewayConfig,
    LaunchConfig,
    LogConfig,
    ModelConfig,
    RpcConfig,
    Section,
    StoreConfig,
)
from baton.config.tls import TlsFiles
from baton.config.whole import Config, is_loopback

__all__ = [
    "SHARED",
    "Config",
    "EngineConfig",
    "FabricConfig",
    "Flag",
    "GatewayConfig",
    "LaunchConfig",
    "Layout",
    "LogConfig",
    "ModelConfig",
    "Overrides",
    "PlanConfig",
    "RpcConfig",
    "Section",
    "StoreConfig",
    "TlsFiles",
    "flags",
    "format_cpus",
    "format_size",
    "format_value",
    "is_loopback",
    "load_config",
    "parse_cpus",
    "parse_deciles",
    "parse_size",
    "sections",
    "to_yaml",
]
