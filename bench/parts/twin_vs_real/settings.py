"""How a server is configured: one mapping makes its flags and the configuration of the twin."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from baton.config import Layout, format_cpus
from baton.model_spec import ModelSpec, load_model_spec
from parts.big_model import SHAPES, write_model
from parts.twin_vs_real.cells import Server, share_cores

DEMO = Path(__file__).parents[3] / "models" / "baton-demo"
BLOCK_SIZE = 16
NUM_BLOCKS = 2560
STORE_BLOCKS = NUM_BLOCKS // 2
MAX_MODEL_LEN = 2048
MODEL_FIELDS = ("model.path", "model.max_model_len")


class Setup(msgspec.Struct, frozen=True):
    """A server, the directory of its model, and what is set, by dotted path.

    cpus: of one worker; all have as many.
    """

    server: Server
    directory: Path
    spec: ModelSpec
    cpus: tuple[int, ...]
    settings: dict[str, str]

    @property
    def flags(self) -> list[str]:
        return to_flags(self.settings)

    @property
    def profile_name(self) -> str:
        """What was measured for one server holds for another one with the same workers."""
        return f"profile-{self.server.model}-{len(self.cpus)}-threads.json"

    @property
    def profile_flags(self) -> list[str]:
        """Of `baton profile`, as one worker runs."""
        kept = {
            path: value
            for path, value in self.settings.items()
            if path.startswith("engine.") or path in MODEL_FIELDS
        }
        return to_flags(kept | {"engine.cpus": format_cpus(self.cpus)})


def to_flags(settings: Mapping[str, str]) -> list[str]:
    return [
        word for path, value in settings.items() for word in ("--" + path.replace("_", "-"), value)
    ]


def setup(server: Server, models: Path, cores: Sequence[int]) -> Setup:
    """Settings for these cores; a model of `SHAPES` that is missing is written below `models`."""
    directory = model_dir(server.model, models)
    spec = load_model_spec(directory)
    num_workers = sum(Layout.parse(server.layout).counts().values())
    shares = share_cores(num_workers, cores)
    store_bytes = STORE_BLOCKS * BLOCK_SIZE * spec.kv_bytes_per_token()
    settings = {
        "model.path": str(directory),
        "model.max_model_len": str(MAX_MODEL_LEN),
        "engine.device": "cpu",
        "engine.kernels": "native",
        "engine.block_size": str(BLOCK_SIZE),
        "engine.num_kv_blocks": str(NUM_BLOCKS),
        "engine.max_num_seqs": "64",
        "engine.max_num_batched_tokens": "256",
        "engine.cpus": format_cpus({core for share in shares for core in share}),
        "engine.threads": str(len(shares[0])),
        "store.max_bytes": str(store_bytes),
        "gateway.max_queued_requests": "10000",
        "gateway.max_connections": "10000",
        "launch.layout": server.layout,
    }
    return Setup(server, directory, spec, shares[0], settings)


def model_dir(name: str, models: Path) -> Path:
    if name not in SHAPES:
        return DEMO
    directory = models / name
    if not directory.exists():
        part = models / f"{name}.part"
        shutil.rmtree(part, ignore_errors=True)
        write_model(part, SHAPES[name])
        part.rename(directory)
    return directory.resolve()
