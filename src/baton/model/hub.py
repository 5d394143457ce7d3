"""A model's name on a command line, made into a directory."""

from __future__ import annotations

import re
from pathlib import Path

from baton.errors import ConfigError

_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_model(name_or_path: str) -> Path:
    """The local directory of a model: a path as it is, or a Hugging Face repo id, fetched.

    Only JSON files (tokenizer.json among them), templates and safetensors are downloaded; what is
    in the Hugging Face cache already is used without a network.

    Raises:
        ConfigError: there is no such directory, or the model cannot be fetched.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"model {name_or_path!r} is a directory without a config.json")
        return path
    if path.exists() or not _REPO_ID.fullmatch(name_or_path):
        raise ConfigError(
            f"model {name_or_path!r} is neither a directory nor a Hugging Face name "
            "like 'Qwen/Qwen3-0.6B'"
        )
    return _fetched(name_or_path)


def _fetched(name: str) -> Path:
    # Its import takes as long as a small model's weights, and a directory needs none of it.
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                name,
                allow_patterns=["*.json", "*.safetensors", "*.jinja"],
                # Copies of the weights in other formats lie in folders or under these names.
                ignore_patterns=["*/*", "consolidated*"],
            )
        )
    except GatedRepoError as error:
        raise ConfigError(
            f"model {name!r} needs its licence accepted on huggingface.co and a token "
            "(`hf auth login`)"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ConfigError(
            f"model {name!r} is neither a directory here nor a public model on huggingface.co"
        ) from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ConfigError(
            f"model {name!r} is not a directory here, not in the cache "
            f"({constants.HF_HUB_CACHE}), and huggingface.co cannot be reached; "
            "give a directory, or fetch it where there is a network"
        ) from error
