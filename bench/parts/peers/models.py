"""The models that are measured: written on the spot, or a directory that is there."""

from __future__ import annotations

import shutil
from pathlib import Path

from baton.errors import ConfigError
from baton.model_spec import ModelSpec, load_model_spec
from parts.big_model import SHAPES, write_model
from parts.gguf_model import write_gguf

DEMO = Path(__file__).parents[3] / "models" / "baton-demo"


def prepare(name: str, peers: Path) -> tuple[Path, Path, ModelSpec]:
    """(directory, GGUF file, spec) of a shape of `big_model`, of `demo`, or of a directory.

    What is missing is written below `peers`/models.

    Raises:
        ConfigError: there is no such shape or directory.
    """
    store = peers / "models"
    store.mkdir(parents=True, exist_ok=True)
    if name in SHAPES:
        directory = store / name
        if not directory.exists():
            part = store / f"{name}.part"
            shutil.rmtree(part, ignore_errors=True)
            write_model(part, SHAPES[name])
            part.rename(directory)
    else:
        directory = DEMO if name == "demo" else Path(name)
        if not (directory / "config.json").exists():
            raise ConfigError(f"{name} is neither {', '.join(SHAPES)}, demo nor a model directory")
    gguf = store / f"{directory.resolve().name}.gguf"
    if not gguf.exists():
        write_gguf(directory, gguf)
    return directory.resolve(), gguf, load_model_spec(directory)
