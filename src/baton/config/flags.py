"""The walk over every field from which the command line, `config show` and the docs are made."""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal

import msgspec
from msgspec import inspect

from baton.config.sections import Section
from baton.config.whole import Config

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_size(text: str) -> int:
    """Bytes of `512MiB`, `2GiB`, `1.5GB` or `4096`: KiB is 1024, KB is 1000.

    Raises:
        ValueError: not a size.
    """
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r} is not a size such as 512MiB or 2GiB")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** _POWERS[prefix.upper()])


def format_size(num_bytes: int) -> str:
    """The shortest exact form: 268435456 is `256MiB`."""
    for prefix in "TGMK":
        unit = 1024 ** _POWERS[prefix]
        if num_bytes and num_bytes % unit == 0:
            return f"{num_bytes // unit}{prefix}iB"
    return str(num_bytes)


class Flag(msgspec.Struct, frozen=True):
    """One field, as the command line, `config show` and the docs see it.

    `kind` is what a value looks like: INT, FLOAT, BOOL, SIZE, TEXT or the choices, `a|b|c`.
    """

    section: str
    field: str
    kind: str
    default: object
    help: str

    @property
    def path(self) -> str:
        return f"{self.section}.{self.field}"

    @property
    def name(self) -> str:
        return "--" + self.path.replace("_", "-")

    @property
    def default_text(self) -> str:
        return format_value(self.field, self.default)


def format_value(field: str, value: object) -> str:
    """A field's value as a file would have it: `256MiB`, `true`, `null`."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if field.endswith("_bytes") and isinstance(value, int):
        return format_size(value)
    if isinstance(value, float):  # YAML 1.1 reads 1e-05 as a string, so write it out
        return format(Decimal(repr(value)), "f").removesuffix(".0")
    return str(value)


def sections() -> dict[str, type[Section]]:
    """The section classes by name, in their order."""
    return {field.name: type(field.default) for field in msgspec.structs.fields(Config)}


def flags() -> Iterator[Flag]:
    """Walk every field in the order of declaration."""
    for section, cls in sections().items():
        info = inspect.type_info(cls)
        assert isinstance(info, inspect.StructType)
        for field in info.fields:
            schema = field.type
            assert isinstance(schema, inspect.Metadata)
            help_text = (schema.extra_json_schema or {})["description"]
            yield Flag(section, field.name, _kind(field.name, schema), field.default, help_text)


def _kind(name: str, kind: inspect.Type) -> str:
    if isinstance(kind, inspect.Metadata):
        return _kind(name, kind.type)
    if isinstance(kind, inspect.UnionType):
        return next(_kind(name, t) for t in kind.types if not isinstance(t, inspect.NoneType))
    if isinstance(kind, inspect.LiteralType):
        return "|".join(str(value) for value in sorted(kind.values, key=_choice_order))
    if isinstance(kind, inspect.IntType):
        return "SIZE" if name.endswith("_bytes") else "INT"
    return {inspect.FloatType: "FLOAT", inspect.BoolType: "BOOL"}.get(type(kind), "TEXT")


def _choice_order(value: str | int | None) -> tuple[bool, int]:
    """msgspec gives choices in no useful order: auto first, log levels and widths as usual."""
    order = ["auto", "debug", "info", "warning", "error"]
    return (value not in order, order.index(str(value)) if value in order else 0)
