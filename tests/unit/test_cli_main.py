"""The command line itself: help, hints, exit codes, lazy imports, and what commands pass on."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from baton import __version__
from baton.cli.main import COMMANDS, main
from baton.cli.parser import ALIASES, Parser, add_config_flags, config_from
from baton.config import Config, flags, load_config, to_yaml
from baton.errors import BatonError
from baton.types import Role


def test_overview_names_every_command(capsys: Any) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in COMMANDS:
        assert f"\n  {name} " in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_within_100_columns(
    name: str, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: baton {name} ")
    assert "Examples:" in text
    assert max(map(len, text.splitlines())) <= 100
    assert main(["help", name]) == 0
    assert capsys.readouterr().out == text


def test_serve_has_a_flag_for_every_field(capsys: Any) -> None:
    main(["serve", "--help"])
    text = capsys.readouterr().out
    for flag in flags():
        assert flag.name in text
        assert ALIASES.get(flag.path, flag.name) in text


def test_aliases_name_real_fields_and_do_not_collide() -> None:
    paths = {flag.path for flag in flags()}
    assert set(ALIASES) <= paths
    assert len(set(ALIASES.values())) == len(ALIASES)


def test_version_and_no_command(capsys: Any) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"baton {__version__}\n"
    assert main([]) == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["serv"], "did you mean serve?"),
        (["--modle"], "unknown option --modle"),
        (["serve", "--modle", "x"], "did you mean --model?"),
        (["serve", "--max-num-seq", "3"], "did you mean --engine.max-num-seqs?"),
        (["serve", "--engine.max_num_seqs", "3"], "did you mean --engine.max-num-seqs?"),
        (["serve", "--engine.max-num-batched=3"], "did you mean --engine.max-num-batched-tokens?"),
        (["serve", "--zzzzzz"], "unknown option --zzzzzz (see baton serve --help)"),
        (["serve", "model"], "unexpected argument 'model'"),
        (["serve"], "give --model DIR"),
        (["serve", "--model", "x", "--engine.max-num-seqs", "0"], "change --engine.max-num-seqs"),
        (["serve", "--config", "nowhere.yaml"], "cannot read nowhere.yaml"),
        (["worker", "--role", "boss"], "invalid choice"),
        (["worker", "--role", "decode", "--id", "d", "--runtime-dir", "r"], "give --model"),
        (["fabric"], "required: COMMAND"),
        (["fabric", "calibrat"], "invalid choice: 'calibrat'"),
        (["fabric", "calibrate"], "give --model DIR"),
        (["fabric", "calibrate", "--modle", "x"], "did you mean --model?"),
        (["replay", "a.log", "--set", "x"], "not scheduler.NAME=N"),
        (["replay", "a.log", "--set", "scheduler.x=-1"], "not scheduler.NAME=N"),
    ],
)
def test_wrong_usage_says_what_to_do(argv: list[str], message: str, capsys: Any) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("argv", "path", "value"),
    [
        (["--port", "9000"], "gateway.port", 9000),
        (["--gateway.port=9000"], "gateway.port", 9000),
        (["--engine.prefix-cache", "false"], "engine.prefix_cache", False),
        (["--gateway.allow-insecure"], "gateway.allow_insecure", True),
        (["--store.max-bytes", "2GiB"], "store.max_bytes", 2 << 30),
    ],
)
def test_flags_set_fields(argv: list[str], path: str, value: object) -> None:
    parser = Parser("baton x", summary="")
    add_config_flags(parser)
    config = config_from(parser.parse(argv))
    assert config == load_config(None, {path: value})
    assert config != Config()


def test_config_show_is_a_file_that_comes_to_the_same(tmp_path: Path, capsys: Any) -> None:
    args = ["--layout", "2P3D", "--engine.kv-cache-bytes", "1GiB"]
    file = tmp_path / "baton.yaml"
    for extra in ([], ["--plain"]):
        assert main(["config", "show", *args, *extra]) == 0
        file.write_text(capsys.readouterr().out)
        assert load_config(file).launch.layout == "2P3D"
        assert load_config(file).engine.kv_cache_bytes == 1 << 30
    assert main(["config", "show", "--config", str(file), "--port", "1", "--plain"]) == 0
    expected = load_config(file, {"gateway.port": 1})
    assert capsys.readouterr().out == to_yaml(expected)


def test_config_docs_lists_every_field(capsys: Any) -> None:
    assert main(["config", "docs"]) == 0
    text = capsys.readouterr().out
    assert all(f"`{flag.path}` | " in text and flag.help in text for flag in flags())


@pytest.fixture
def calls(monkeypatch: Any) -> list[tuple[Any, ...]]:
    """What the processes' entry points are called with; each returns 7."""
    seen: list[tuple[Any, ...]] = []

    def entry(*args: Any) -> int:
        seen.append(args)
        return 7

    for module, function in (
        ("baton.launch.local", "serve"),
        ("baton.worker.main", "run"),
        ("baton.gateway.main", "run"),
    ):
        fake = types.ModuleType(module)
        setattr(fake, function, entry)
        monkeypatch.setitem(sys.modules, module, fake)
    return seen


def test_processes_get_their_arguments(calls: list[tuple[Any, ...]], tmp_path: Path) -> None:
    file = tmp_path / "baton.yaml"
    file.write_text("model: {path: m}\n")
    run = str(tmp_path)
    config = load_config(file)
    assert main(["serve", "--config", str(file)]) == 7
    argv = ["worker", "--role", "decode", "--id", "d0", "--runtime-dir", run]
    argv += ["--gateway", "a:1", "--gateway", "b:2", "--weights-fd", "9"]
    assert main([*argv, "--config", str(file)]) == 7
    assert main(["gateway", "--runtime-dir", run, "--config", str(file)]) == 7
    assert calls == [
        (config,),
        (config, Role.DECODE, "d0", tmp_path, ["a:1", "b:2"], 9),
        (config, tmp_path),
    ]


def test_replay_tells_by_its_exit_code(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    seen: list[tuple[Any, ...]] = []

    def replay(data: bytes, changes: dict[str, int]) -> types.SimpleNamespace:
        seen.append((data, changes))
        found = {"num_differences": 3, "first": 2, "parted": "why"} if changes else {}
        return types.SimpleNamespace(
            source="decode-0", num_records=1234, num_decisions=5,
            **{"num_differences": 0, "first": None, "parted": None, **found},
        )  # fmt: skip

    fake = types.ModuleType("baton.core.replay")
    monkeypatch.setattr(fake, "replay", replay, raising=False)
    monkeypatch.setitem(sys.modules, "baton.core.replay", fake)
    log = tmp_path / "log"
    log.write_bytes(b"x")
    assert main(["replay", str(log), str(log)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["decode-0", "1,234", "5", "0", "-"]
    assert main(["replay", str(log), "--set", "scheduler.max_num_seqs=1"]) == 1
    assert "decode-0: not comparable from there on: why" in capsys.readouterr().out
    assert seen == [(b"x", {}), (b"x", {}), (b"x", {"max_num_seqs": 1})]
    assert main(["replay", str(tmp_path / "none")]) == 2
    assert "cannot read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"), [(BatonError("no"), 1), (KeyboardInterrupt(), 130), (BrokenPipeError(), 1)]
)
def test_exit_codes(error: BaseException, code: int, monkeypatch: Any) -> None:
    module = importlib.import_module("baton.cli.config")

    def fail(_: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(module, "run", fail)
    monkeypatch.setattr("os.dup2", lambda *_: None)
    assert main(["config", "show"]) == code


def test_help_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'fastapi', 'numpy', 'httpx', 'grpc', 'rich', 'yaml', 'uvicorn'}"
    serve = f"main(['serve', '--help']); late = {heavy} & set(sys.modules)"
    code = (
        "import sys; from baton.cli.main import main; main(['--help']); "
        f"early = {heavy} & set(sys.modules); {serve}; print(early, late, file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr.strip() == "set() set()"


def test_bench_and_chat_need_no_torch() -> None:
    code = (
        "import sys, baton.cli.bench, baton.cli.chat; "
        "print({'torch', 'transformers', 'fastapi', 'matplotlib'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
