"""A deployment that cannot start says why, naming the field, and ends at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults.served import make_model

QUICK_S = 30.0  # importing torch in several processes is most of it


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("served") / "org-tiny")


def serve(*arguments: str, home: Path) -> tuple[int, str, float]:
    """(exit code, all output, seconds) of a `baton serve` that is expected to end by itself."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "baton", "serve", "--port", "0", "--admin-port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        env={
            **os.environ,
            "XDG_RUNTIME_DIR": str(home),
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
    )
    assert "Ready after" not in done.stdout
    assert "Traceback" not in done.stdout, done.stdout
    assert not list(home.iterdir())  # no runtime directory is left
    return done.returncode, done.stdout, time.monotonic() - started


def set_config(path: Path, fields: dict[str, Any]) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | fields))


def other_architecture(path: Path) -> None:
    set_config(path, {"architectures": ["FalconForCausalLM"], "model_type": "falcon"})


def unsupported_field(path: Path) -> None:
    set_config(path, {"hidden_act": "relu6"})


def no_config(path: Path) -> None:
    (path / "config.json").unlink()


def no_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def broken_weights(path: Path) -> None:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def no_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (other_architecture, "architectures"),
        (unsupported_field, "hidden_act"),
        (no_config, "config.json"),
        (no_weights, "safetensors"),
        (broken_weights, "model.safetensors"),
        (no_tokenizer, "tokenizer.json"),
    ],
)
def test_a_model_that_cannot_be_served(
    tmp_path: Path, spoil: Callable[[Path], None], named: str
) -> None:
    path = make_model(tmp_path / "org-tiny")
    spoil(path)
    (tmp_path / "run").mkdir()
    code, said, seconds = serve("--model", str(path), "--layout", "1U", home=tmp_path / "run")
    assert code != 0
    assert named in said.rpartition("giving up")[2] or named in said.splitlines()[-1], said
    assert seconds < QUICK_S


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "/no/such/model"], "/no/such/model"),
        ([], "model"),
        (["--model", "MODEL", "--layout", "2X"], "layout"),
        (["--model", "MODEL", "--engine.block-size", "0"], "block"),
        (["--model", "MODEL", "--model.max-model-len", "99999"], "max_model_len"),
        (["--model", "MODEL", "--gateway.api-keys-file", "/no/such/keys"], "api_keys_file"),
    ],
    ids=["no such model", "no model", "layout", "block size", "length", "keys"],
)
def test_arguments_that_cannot_be_used(
    tmp_path: Path, model: Path, arguments: list[str], named: str
) -> None:
    arguments = [str(model) if word == "MODEL" else word for word in arguments]
    code, said, seconds = serve(*arguments, home=tmp_path)
    assert code != 0
    assert named in said, said
    assert seconds < QUICK_S
