"""Configuration: order of the layers, bounds, messages, the round trip, listeners."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from baton.config import (
    Config,
    GatewayConfig,
    Layout,
    ModelConfig,
    TlsFiles,
    flags,
    format_size,
    is_loopback,
    load_config,
    parse_size,
    to_yaml,
)
from baton.errors import ConfigError
from baton.types import Role


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "baton.yaml"
    file.write_text(text)
    return file


def test_flags_beat_the_file_and_the_file_beats_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, "engine: {max_num_seqs: 8, threads: 3}\nlog:\n")
    config = load_config(file, {"engine.max_num_seqs": "9", "engine.prefix_cache": "false"})
    assert config.engine.max_num_seqs == 9
    assert config.engine.threads == 3
    assert config.engine.prefix_cache is False
    assert config.engine.block_size == 16


def test_a_flag_can_unset_what_the_file_set(tmp_path: Path) -> None:
    file = write(tmp_path, "model: {served_name: x}\nengine: {threads: 3}")
    config = load_config(file, {"model.served_name": "null", "engine.threads": "null"})
    assert config.model.served_name is None
    assert config.engine.threads is None


def test_every_flag_sets_its_own_field_and_has_help() -> None:
    samples = {"INT": "17", "FLOAT": "7.5", "SIZE": "3MiB", "BOOL": "true"}
    for flag in flags():
        if flag.path == "launch.layout":
            text = "4U"
        elif flag.path == "fabric.tcp_advertise":
            text = "127.0.0.1:9"
        elif flag.path == "gateway.host":
            text = "::1"
        elif flag.path == "gateway.admin_host":
            text = "localhost"
        elif flag.path in ("engine.prefix_cache", "store.keep_blocks", "fabric.fetch_early"):
            text = "false"
        elif flag.field.endswith("cpus"):
            text = "0-3,8"
        elif flag.field.endswith("attainment"):
            text = "0.5"
        elif flag.path in ("plan.prompt_tokens", "plan.output_tokens"):
            text = "1 2 3 4 5 6 7 8 9"
        elif flag.path in ("fabric.tcp_host", "rpc.host"):
            text = "::1"
        elif ".tls_" in flag.path:
            continue  # needs others: tested below
        else:
            others = [choice for choice in flag.kind.split("|") if choice != flag.default]
            text = samples.get(flag.kind, others[-1])
        config = load_config(None, {flag.path: text})
        changed = [
            other.path
            for other in flags()
            if getattr(getattr(config, other.section), other.field) != other.default
        ]
        assert changed == [flag.path]
        assert flag.help.endswith("."), flag.path
        assert flag.name == "--" + flag.path.replace("_", "-")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("engine: {max_num_seqs: 0}", r"Expected `int` >= 1 - at `\$.engine.max_num_seqs`"),
        ("engine: {max_num_seqs: 0}", r"change engine.max_num_seqs in .*baton.yaml \(now 0\)"),
        ("engine: {max_num_seqs: '8'}", r"Expected `int`, got `str`"),
        ("engine: {max_num_seq: 8}", r"did you mean engine.max_num_seqs"),
        ("engin: {}", r"did you mean engine"),
        ("engine: 7", r"Expected `object`, got `int` - at `\$.engine`"),
        ("store: {max_bytes: lots}", r"'lots' is not a size.*`\$.store.max_bytes`"),
        ("log: {level: loud}", r"expected debug\|"),
        ("store: {lease_ttl_s: .nan}", r"`\$.store.lease_ttl_s`"),
        ("[1, 2]", r"must map sections to fields"),
        ("engine: [", r"is not YAML"),
        ("log: {}\nlog: {}", r"log stands twice.*line 2"),
        ("gateway: {port: 1, port: 2}", r"port stands twice"),
        ("plan: {prompt_tokens: 1 2 3}", r"plan.prompt_tokens '1 2 3': write 9 rising numbers"),
        ("plan: {output_tokens: 1 2 3 4 5 6 7 9 8}", r"plan.output_tokens .*: write 9 rising"),
        ("plan: {output_tokens: 1 2 3 4 5 6 7 8 nan}", r"plan.output_tokens .*: write 9 rising"),
        ("plan: {min_rate: 2.0, max_rate: 1.0}", r"plan.min_rate 2 is above plan.max_rate 1"),
        ("plan: {rate: 0.0}", r"`\$.plan.rate`"),
        ("gateway: {port: 8001}", r"give the admin listener a port"),
        ("engine: {cpus: 0-}", r"engine.cpus '0-' is not a list of cores: write it as 0-3,8"),
        ("launch: {prefill_cpus: '1,0-1'}", r"launch.prefill_cpus '1,0-1' names a core twice"),
        ("launch: {decode_cpus: shared}", r"launch.decode_cpus 'shared' is not a list"),
        ("launch: {restart_backoff_s: 60}", r"restart_backoff_max_s is less"),
        ("gateway: {tls_cert_file: a}", r"tls_cert_file is set without gateway.tls_key_file"),
        ("gateway: {tls_key_file: a}", r"tls_key_file is set without gateway.tls_cert_file"),
        ("fabric: {tls_key_file: a}", r"set without fabric.tls_ca_file and fabric.tls_cert_file"),
        (
            "fabric: {tls_ca_file: a, tls_key_file: b}",
            r"tls_ca_file is set without fabric",
        ),
        ("fabric: {tcp_host: 0.0.0.0}", r"no address that other workers could connect to: give"),
        ("fabric: {tcp_host: '::'}", r"fabric.tcp_host :: is no address"),
        (
            "rpc: {tls_key_file: a}",
            r"rpc.tls_key_file is set without rpc.tls_ca_file and rpc.tls_c",
        ),
        ("rpc: {host: 0.0.0.0}", r"rpc.host 0.0.0.0 is no address that other hosts could connect"),
        ("fabric: {transport: smoke}", r"expected auto\|nixl\|shm\|tcp"),
    ],
)
def test_errors_name_the_field_and_what_to_change(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


def test_an_error_on_the_command_line_names_the_flag() -> None:
    with pytest.raises(ConfigError, match=r"change --engine.max-num-seqs \(now 0\)"):
        load_config(None, {"engine.max_num_seqs": "0"})


def test_a_missing_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("comments", [False, True])
def test_yaml_round_trip(tmp_path: Path, comments: bool) -> None:
    config = load_config(
        None,
        {
            "model.path": "null-model: #1",
            "model.served_name": "true",
            "engine.kv_cache_bytes": "1234567",
            "store.max_bytes": "1GiB",
            "store.lease_ttl_s": "0.1234567890123",
            "launch.restart_backoff_s": "0.00001",
            "gateway.host": "::1",
            "launch.layout": "2P3D",
            "log.level": "debug",
        },
    )
    assert load_config(write(tmp_path, to_yaml(config, comments=comments))) == config


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Config().engine.threads = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("1P1D", {Role.PREFILL: 1, Role.DECODE: 1}),
        ("2p3d", {Role.PREFILL: 2, Role.DECODE: 3}),
        ("4U", {Role.UNIFIED: 4}),
        ("1P1D1U", {Role.PREFILL: 1, Role.DECODE: 1, Role.UNIFIED: 1}),
        ("12U", {Role.UNIFIED: 12}),
    ],
)
def test_layout(text: str, counts: dict[Role, int]) -> None:
    layout = Layout.parse(text)
    assert layout.counts() == counts
    assert str(layout) == text.upper()
    assert layout.num_workers == sum(counts.values())


@pytest.mark.parametrize("text", ["", "P", "PD", "0U", "1D1P", "1P", "1D", "1P1U", "-1U", "99P99D"])
def test_bad_layout(text: str) -> None:
    with pytest.raises(ConfigError, match=r"launch\.layout"):
        load_config(None, {"launch.layout": text})


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("512MiB", 512 << 20), ("2GiB", 2 << 30), ("1.5k", 1500), ("4096", 4096), ("1 TB", 10**12)],
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes
    assert parse_size(format_size(num_bytes)) == num_bytes


@pytest.mark.parametrize("text", ["", "MiB", "-1MiB", "1 2", "1PiB", "0x10"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


def test_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "")))


def test_listening_beyond_loopback_needs_tls_and_keys_or_the_word() -> None:
    open_host = {"gateway.host": "0.0.0.0"}
    tls = {"gateway.tls_cert_file": "c", "gateway.tls_key_file": "k"}
    keys = {"gateway.api_keys_file": "keys"}
    for partial in ({}, tls, keys):
        with pytest.raises(ConfigError, match=r"--gateway\.allow-insecure"):
            load_config(None, {**open_host, **partial})
    load_config(None, {**open_host, **tls, **keys})
    load_config(None, {**open_host, "gateway.allow_insecure": "true"})


@pytest.mark.parametrize("listens", [{"fabric.transport": "tcp"}, {"fabric.tcp_port": "0"}])
def test_serving_blocks_beyond_loopback_needs_tls_or_the_word(listens: dict[str, str]) -> None:
    beyond = {"fabric.tcp_host": "10.0.0.1", **listens}
    with pytest.raises(ConfigError, match=r"10\.0\.0\.1 can be reached.*--fabric\.allow-insecure"):
        load_config(None, beyond)
    tls = {f"fabric.tls_{name}_file": name for name in ("ca", "cert", "key")}
    assert load_config(None, {**beyond, **tls}).serves_blocks_over_tcp
    load_config(None, {**beyond, "fabric.allow_insecure": "true"})
    assert load_config(None, listens).serves_blocks_over_tcp
    silent = load_config(None, {"fabric.tcp_host": "10.0.0.1"})
    assert not silent.serves_blocks_over_tcp, "nor exposed"


SECURE = {f"rpc.tls_{name}_file": name for name in ("ca", "cert", "key")}
SECURE |= {"rpc.secret_file": "secret"}


def test_talking_to_other_hosts_needs_tls_and_a_secret_or_the_word() -> None:
    beyond = {"rpc.host": "10.0.0.1"}
    for lacking in SECURE:
        partial = {field: value for field, value in SECURE.items() if field == "rpc.secret_file"}
        if lacking == "rpc.secret_file":
            partial = {field: value for field, value in SECURE.items() if field != lacking}
        with pytest.raises(ConfigError, match=r"10\.0\.0\.1 can be reached.*--rpc\.allow-insecure"):
            load_config(None, {**beyond, **partial})
    load_config(None, {**beyond, **SECURE})
    words = {"rpc.allow_insecure": "true", "fabric.allow_insecure": "true"}
    load_config(None, {**beyond, **words})
    load_config(None, {"rpc.port": "7000"})


def test_blocks_are_served_where_other_hosts_are() -> None:
    config = load_config(None, {"rpc.host": "10.0.0.1", **SECURE})
    assert (config.has_other_hosts, config.serves_blocks_over_tcp) == (True, True)
    assert config.block_host == "10.0.0.1"
    assert config.block_tls == config.rpc_tls == TlsFiles("ca", "cert", "key", "rpc")
    own = {f"fabric.tls_{name}_file": f"own {name}" for name in ("ca", "cert", "key")}
    tls = load_config(None, {"rpc.host": "10.0.0.1", **SECURE, **own}).block_tls
    assert tls == TlsFiles("own ca", "own cert", "own key")
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1 cannot be reached from the other hosts"):
        load_config(None, {"rpc.host": "10.0.0.1", **SECURE, "fabric.tcp_host": "127.0.0.1"})
    words = {"rpc.host": "10.0.0.1", **SECURE, "rpc.allow_insecure": "true"}
    load_config(None, {**words, "fabric.tcp_host": "::1", "fabric.tcp_advertise": "10.0.0.9:1"})
    alone = load_config(None, {"rpc.port": "7000"})
    assert (alone.has_other_hosts, alone.serves_blocks_over_tcp) == (False, False)
    assert alone.rpc_tls is alone.block_tls is None


@pytest.mark.parametrize("field", ["fabric.transport", "fabric.between_hosts"])
def test_nixl_between_hosts_must_be_told_that_it_is_open(field: str) -> None:
    beyond = {"rpc.host": "10.0.0.1", **SECURE, field: "nixl"}
    with pytest.raises(ConfigError, match=r"without encryption.*--fabric\.allow-insecure"):
        load_config(None, beyond)
    assert load_config(None, {**beyond, "fabric.allow_insecure": "true"}).uses_nixl
    assert load_config(None, {field: "nixl"}).uses_nixl == (field == "fabric.transport")


def test_the_admin_listener_stays_on_loopback_even_with_tls() -> None:
    gateway = GatewayConfig(
        admin_host="0.0.0.0", tls_cert_file="c", tls_key_file="k", api_keys_file="f"
    )
    with pytest.raises(ConfigError, match="admin"):
        Config(gateway=gateway).validate()
    Config(gateway=msgspec.structs.replace(gateway, allow_insecure=True)).validate()


def test_the_model_is_called_after_its_directory() -> None:
    assert ModelConfig(path="/models/tiny/").name == "tiny"
    assert ModelConfig(path="org/tiny").name == "tiny"
    assert ModelConfig(path="/models/tiny", served_name="x").name == "x"


def test_import_is_light() -> None:
    code = "import sys, baton.config; print(sorted({'torch', 'numpy', 'yaml'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_role_may_have_settings_of_its_own(tmp_path: Path) -> None:
    text = "engine: {block_size: 16, kernels: torch}\nprefill: {block_size: 64, dtype: bfloat16}\n"
    own = {"decode.kernels": "native", "decode.device": "cpu"}
    config = load_config(write(tmp_path, text), own)
    prefill, decode = config.for_role(Role.PREFILL), config.for_role(Role.DECODE)
    assert (prefill.engine.block_size, prefill.model.dtype) == (64, "bfloat16")
    assert (decode.engine.block_size, decode.model.dtype) == (16, "auto")
    assert (prefill.engine.kernels, decode.engine.kernels) == ("torch", "native")
    assert (prefill.engine.device, decode.engine.device) == ("auto", "cpu")
    assert config.for_role(Role.UNIFIED) == config
    assert load_config(write(tmp_path, to_yaml(config))) == config


@pytest.mark.parametrize("name", ["host-a.yaml", "host-b.yaml"])
def test_the_example_of_two_hosts_is_a_configuration(name: str) -> None:
    config = load_config(Path(__file__).parents[2] / "examples" / "two-hosts" / name)
    assert config.has_other_hosts and config.serves_blocks_over_tcp
    assert config.rpc_tls is not None
    assert config.block_tls == config.rpc_tls
