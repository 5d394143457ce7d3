"""The types of JSON fields, and how a badly typed one becomes a `ModelError` that names it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from baton.errors import ModelError

Count = Annotated[int, msgspec.Meta(gt=0, lt=1 << 40)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
TokenId = Annotated[int, msgspec.Meta(ge=0)]
TokenIds = TokenId | list[TokenId] | None

_T = TypeVar("_T")


def convert(raw: dict[str, Any], to: type[_T], where: str) -> _T:
    """`raw` as a `to`; ModelError says `where` and which field."""
    try:
        return msgspec.convert(raw, to)
    except msgspec.ValidationError as error:
        raise ModelError(f"{where}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`; ModelError if there is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise ModelError(f"{path.name} cannot be read: {error.strerror}: {path}") from error
    except msgspec.MsgspecError as error:
        raise ModelError(f"{path.name} is not a JSON object: {error}: {path}") from error
