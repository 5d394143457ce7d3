"""The sections of the configuration and what they may hold; one declaration a field."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0, le=1e6)]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One group of fields; subclasses' docstrings are the groups' headings in `--help`."""


class ModelConfig(Section, frozen=True):
    """Model: what is served."""

    path: Annotated[
        str, Meta(description="Model directory (Hugging Face layout) or repository id.")
    ] = ""
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        Meta(description="Type of weights and KV cache; auto follows the checkpoint."),
    ] = "auto"
    served_name: Annotated[
        str | None,
        Meta(description="Model name in the API; by default the last part of the path."),
    ] = None
    max_model_len: Annotated[
        Count | None,
        Meta(description="Longest prompt plus output, in tokens; by default the model's."),
    ] = None

    @property
    def name(self) -> str:
        """The name under which clients ask for the model."""
        return self.served_name or Path(self.path).resolve().name


class EngineConfig(Section, frozen=True):
    """Engine: each worker's batches and KV cache."""

    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        Meta(description="Where the model runs; auto takes CUDA when there is one."),
    ] = "auto"
    block_size: Annotated[int, Meta(ge=1, le=1024, description="Tokens in a KV block.")] = 16
    kv_cache_bytes: Annotated[
        Count | None,
        Meta(description="KV pool of a worker; by default a share of the memory free at start."),
    ] = None
    num_kv_blocks: Annotated[
        Count | None,
        Meta(description="KV blocks of a worker, exactly; overrides kv_cache_bytes."),
    ] = None
    max_num_seqs: Annotated[Count, Meta(description="Most sequences in one step.")] = 256
    max_num_batched_tokens: Annotated[
        Count, Meta(description="Token budget of one step; longer prompts are chunked.")
    ] = 512
    cpus: Annotated[
        str | None,
        Meta(
            description="Cores such as 0-3,8, shared out among the workers; by default all that "
            "may be used. shared: every worker on all of them."
        ),
    ] = None
    threads: Annotated[
        Count | None, Meta(description="CPU threads of a worker; by default one on each core.")
    ] = None
    kernels: Annotated[
        Literal["auto", "native", "triton", "triton-exact", "torch"],
        Meta(
            description="Arithmetic: native (CPU, exact), triton (CUDA) or triton-exact (CUDA, "
            "slower), torch (anything); auto is native on a CPU where it can be, else torch."
        ),
    ] = "auto"
    prefix_cache: Annotated[bool, Meta(description="Reuse KV of prompts that begin alike.")] = True


class RoleConfig(Section, frozen=True):
    """What workers of one role have of their own; null is what all have."""

    device: Annotated[
        Literal["auto", "cpu", "cuda"] | None,
        Meta(description="Where the model runs, instead of engine.device."),
    ] = None
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"] | None,
        Meta(description="Type of weights and KV cache, instead of model.dtype."),
    ] = None
    block_size: Annotated[
        Annotated[int, Meta(ge=1, le=1024)] | None,
        Meta(description="Tokens in a KV block, instead of engine.block_size."),
    ] = None
    kernels: Annotated[
        Literal["auto", "native", "triton", "triton-exact", "torch"] | None,
        Meta(description="Arithmetic, instead of engine.kernels."),
    ] = None


class PrefillConfig(RoleConfig, frozen=True):
    """Prefill: what its workers have of their own; blocks of unlike ends are converted."""


class DecodeConfig(RoleConfig, frozen=True):
    """Decode: what its workers have of their own; blocks of unlike ends are converted."""


class StoreConfig(Section, frozen=True):
    """Store: each worker's host memory for KV that others may read."""

    max_bytes: Annotated[
        int, Meta(ge=1 << 20, description="Size of the block store; full means back-pressure.")
    ] = 256 << 20
    lease_ttl_s: Annotated[
        Seconds, Meta(description="Seconds for which a lease holds without renewal.")
    ] = 10.0
    keep_blocks: Annotated[
        bool,
        Meta(
            description="Keep every computed block in the store while there is room, for prompts "
            "that begin alike after the KV cache has evicted it, and for other workers."
        ),
    ] = True


class FabricConfig(Section, frozen=True):
    """Fabric: how KV blocks travel between workers."""

    transport: Annotated[
        Literal["auto", "shm", "tcp", "nixl"],
        Meta(
            description="Way of the blocks: shm (shared memory), tcp or nixl; auto is shm between "
            "workers of one host, else between_hosts."
        ),
    ] = "auto"
    between_hosts: Annotated[
        Literal["tcp", "nixl"],
        Meta(description="What auto takes where there is no shared memory."),
    ] = "tcp"
    fetch_early: Annotated[
        bool,
        Meta(description="Fetch blocks of a prompt while the rest of it is still being computed."),
    ] = True
    tcp_host: Annotated[
        Annotated[str, Meta(min_length=1)] | None,
        Meta(
            description="Address on which a worker serves its blocks over TCP, and under which "
            "the others reach it; by default rpc.host.",
        ),
    ] = None
    tcp_port: Annotated[
        Annotated[int, Meta(ge=0, le=65535)] | None,
        Meta(
            description="Port for that, of each worker; 0 takes any free one; by default none, or "
            "any if the transport is tcp or there are other hosts."
        ),
    ] = None
    tcp_advertise: Annotated[
        Annotated[str, Meta(pattern=r"^.+:\d{1,5}$")] | None,
        Meta(
            description="HOST:PORT that the other workers are told instead of tcp_host and the "
            "port, where something stands in between.",
        ),
    ] = None
    tcp_streams: Annotated[
        int, Meta(ge=1, le=64, description="Most connections of one transfer over TCP.")
    ] = 2
    tls_ca_file: Annotated[
        str | None,
        Meta(
            description="The deployment's own certificate authority (PEM): whoever has a "
            "certificate of it may connect. Needs tls_cert_file and tls_key_file; by default "
            "rpc's."
        ),
    ] = None
    tls_cert_file: Annotated[
        str | None, Meta(description="TLS certificate chain of the workers (PEM).")
    ] = None
    tls_key_file: Annotated[str | None, Meta(description="TLS private key (PEM).")] = None
    max_kl: Annotated[
        float,
        Meta(
            ge=0,
            le=1e6,
            description="Most that a lossy wire codec may move any next-token distribution, in "
            "nats (KL), as baton fabric calibrate measured it; 0 sends every block as it is.",
        ),
    ] = 0.01
    allow_insecure: Annotated[
        bool, Meta(description="Serve blocks beyond loopback without TLS; NIXL has none.")
    ] = False


class RpcConfig(Section, frozen=True):
    """RPC: how gateway and workers of several hosts talk to each other."""

    host: Annotated[
        str,
        Meta(
            min_length=1,
            description="Address of this machine on which its gateway and workers listen for "
            "those of other hosts, and under which these reach them.",
        ),
    ] = "127.0.0.1"
    port: Annotated[
        Annotated[int, Meta(ge=0, le=65535)] | None,
        Meta(
            description="Port on which the gateway listens for workers of other hosts; 0 takes "
            "any free one; by default none: all are on this host and use Unix sockets."
        ),
    ] = None
    worker_port: Annotated[
        int,
        Meta(
            ge=0,
            le=65535,
            description="Port of a worker whose gateway is on another host; 0 takes any free one.",
        ),
    ] = 0
    secret_file: Annotated[
        str | None,
        Meta(
            description="File of 32 random bytes, the same on every host, that its user alone "
            "may read; by default the file secret in the runtime directory."
        ),
    ] = None
    tls_ca_file: Annotated[
        str | None,
        Meta(
            description="The deployment's own certificate authority (PEM). Needs tls_cert_file "
            "and tls_key_file."
        ),
    ] = None
    tls_cert_file: Annotated[
        str | None,
        Meta(
            description="TLS certificate chain of the processes of this host (PEM), with the "
            "names baton-gateway, baton-worker or both."
        ),
    ] = None
    tls_key_file: Annotated[str | None, Meta(description="TLS private key (PEM).")] = None
    allow_insecure: Annotated[
        bool, Meta(description="Talk to other hosts without TLS or a secret_file.")
    ] = False


class GatewayConfig(Section, frozen=True):
    """Gateway: the HTTP service."""

    host: Annotated[str, Meta(min_length=1, description="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="Port; 0 takes any free one.")] = 8000
    admin_host: Annotated[
        str, Meta(min_length=1, description="Address of the admin listener (/metrics).")
    ] = "127.0.0.1"
    admin_port: Annotated[
        int, Meta(ge=0, le=65535, description="Port of the admin listener; 0 takes any free one.")
    ] = 8001
    api_keys_file: Annotated[
        str | None, Meta(description="File with one SHA-256 hash of an API key a line.")
    ] = None
    tls_cert_file: Annotated[
        str | None, Meta(description="TLS certificate chain (PEM); needs tls_key_file.")
    ] = None
    tls_key_file: Annotated[str | None, Meta(description="TLS private key (PEM).")] = None
    allow_insecure: Annotated[
        bool, Meta(description="Listen beyond loopback without TLS and API keys.")
    ] = False
    max_body_bytes: Annotated[
        int, Meta(ge=1024, description="Largest request body; larger ones get 413.")
    ] = 8 << 20
    max_connections: Annotated[
        Count, Meta(description="Most open connections; further ones get 503.")
    ] = 1024
    max_queued_requests: Annotated[
        Count, Meta(description="Most requests in flight; further ones get 429.")
    ] = 1024
    request_timeout_s: Annotated[
        Seconds, Meta(description="Deadline of a request, in seconds.")
    ] = 600.0
    frozen_after_s: Annotated[
        float,
        Meta(
            ge=1,
            le=1e6,
            description="A worker of which nothing is heard for so long, or whose step does not "
            "get on for that and for 5 times what it was predicted to take, stands still: its "
            "requests go to others.",
        ),
    ] = 3.0


class LaunchConfig(Section, frozen=True):
    """Launch: which workers run, and what happens when one ends."""

    layout: Annotated[
        str, Meta(description="Workers by role: 1P1D, 2P3D, 1U (prefill, decode, unified).")
    ] = "1P1D"
    needs: Annotated[
        str | None,
        Meta(
            description="What this configuration needs that Baton cannot run yet; serve refuses "
            "it with that reason. baton plan writes it."
        ),
    ] = None
    prefill_cpus: Annotated[
        str | None, Meta(description="Cores of the prefill workers, instead of engine.cpus.")
    ] = None
    decode_cpus: Annotated[
        str | None, Meta(description="Cores of the decode workers, instead of engine.cpus.")
    ] = None
    restart_backoff_s: Annotated[
        Seconds, Meta(description="Pause before the first restart; doubles each time.")
    ] = 0.5
    restart_backoff_max_s: Annotated[
        Seconds, Meta(description="Longest pause between restarts.")
    ] = 30.0
    max_restarts: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(description="Give up after so many restarts of one worker in a row."),
    ] = None
    kill_frozen_after_s: Annotated[
        Seconds | None,
        Meta(
            description="Kill a worker that has been known to stand still for so long, and start "
            "it again; by default never: it may go on, and until then its blocks can be read."
        ),
    ] = None
    start_timeout_s: Annotated[
        Seconds, Meta(description="Seconds until every process must be ready.")
    ] = 300.0
    drain_timeout_s: Annotated[
        float, Meta(ge=0, le=1e6, description="Seconds for running requests at shutdown.")
    ] = 30.0


class LogConfig(Section, frozen=True):
    """Log: what is written down."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="Least level to log.")
    ] = "info"
    decision_log: Annotated[
        str | None, Meta(description="Directory for decision logs, which `baton replay` reads.")
    ] = None
