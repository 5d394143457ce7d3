"""Defaults < YAML file < flags, and back to a file again."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from baton.config.flags import flags, format_value, parse_size, sections
from baton.config.whole import Config
from baton.errors import ConfigError

Overrides = Mapping[str, object]
"""Values by dotted path (`engine.max_num_seqs`); strings, as flags give them, are converted."""


def load_config(file: str | Path | None = None, overrides: Overrides | None = None) -> Config:
    """Defaults, then the YAML file, then `overrides`; validated.

    Raises:
        ConfigError: it names the path, where the value came from, and what to change.
    """
    tree: dict[str, Any] = {}
    if file is not None:
        tree = _read_yaml(Path(file))
        _convert(tree, strict=True, where=f"in {file}")
    layered: dict[str, Any] = {}
    for path, value in (overrides or {}).items():
        section, _, field = path.partition(".")
        layered.setdefault(section, {})[field] = None if value == "null" else value
    given = msgspec.to_builtins(_convert(layered, strict=False, where=""))
    for section, values in layered.items():
        chosen = {field: given[section][field] for field in values}
        tree[section] = {**(tree.get(section) or {}), **chosen}
    config = _convert(tree, strict=True, where="")
    config.validate()
    return config


def _convert(tree: dict[str, Any], *, strict: bool, where: str) -> Config:
    """`tree` as a `Config`; `where` says where it was read ("" for the command line)."""
    try:
        sized = {name: _sizes(name, section) for name, section in tree.items()}
        present = {name: section for name, section in sized.items() if section is not None}
        return msgspec.convert(present, Config, strict=strict)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(str(error), tree, where)) from None


def _sizes(section_name: str, section: object) -> object:
    if not isinstance(section, dict):
        return section
    result = dict(section)
    for field, value in section.items():
        if isinstance(value, str) and str(field).endswith("_bytes"):
            try:
                result[field] = parse_size(value)
            except ValueError as error:
                path = f"{section_name}.{field}"
                raise msgspec.ValidationError(f"{error} - at `$.{path}`") from None
    return result


def _explain(message: str, tree: dict[str, Any], where: str) -> str:
    """Add to msgspec's message what to change, or the name that was probably meant."""
    unknown = re.search(r"unknown field `(.*?)`(?: - at `\$\.(\w+)`)?", message)
    if unknown:
        name, section = unknown.groups()
        known = list(sections()) if section is None else _field_names(section)
        near = difflib.get_close_matches(name, known, 1)
        prefix = f"{section}." if section else ""
        if near:
            return f"{message}: did you mean {prefix}{near[0]} ({where or 'on the command line'})?"
        return f"{message}: known here are {', '.join(known)}"
    at = re.search(r"`\$\.(\w+)\.(\w+)`", message)
    if not at:
        return f"{message} ({where})" if where else message
    section, field = at.groups()
    flag = next(f for f in flags() if (f.section, f.field) == (section, field))
    expected = f", expected {flag.kind}" if "enum value" in message else ""
    change = f"{flag.path} {where}" if where else flag.name
    return f"{message}{expected}: change {change} (now {tree[section][field]})"


def _field_names(section: str) -> list[str]:
    return [field.name for field in msgspec.structs.fields(sections()[section])]


def _read_yaml(file: Path) -> dict[str, Any]:
    import yaml

    try:
        text = file.read_text(encoding="utf-8")
        tree = yaml.safe_load(text)
        _refuse_repeats(yaml.compose(text, Loader=yaml.SafeLoader), file)
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} must map sections to fields: {', '.join(sections())}")
    return {str(name): section for name, section in tree.items()}


def _refuse_repeats(node: Any, file: Path) -> None:
    """YAML lets the last of two equal keys win silently; here that is an error."""
    if not isinstance(getattr(node, "value", None), list) or node.id != "mapping":
        return
    seen: set[str] = set()
    for key, value in node.value:
        if key.value in seen:
            line = key.start_mark.line + 1
            raise ConfigError(f"{key.value} stands twice in {file} (line {line}): keep one")
        seen.add(key.value)
        _refuse_repeats(value, file)


def to_yaml(config: Config, *, comments: bool = False) -> str:
    """The whole configuration as a file that `load_config` reads back unchanged."""
    import yaml

    lines: list[str] = []
    section = None
    for flag in flags():
        if flag.section != section:
            section = flag.section
            lines.append(f"{section}:")
        if comments:
            lines.append(f"  # {flag.help}")
        value = getattr(getattr(config, flag.section), flag.field)
        if isinstance(value, str):
            text = yaml.safe_dump(value, width=1 << 30).removesuffix("...\n").strip()
        else:
            text = format_value(flag.field, value)
        lines.append(f"  {flag.field}: {text}")
    return "\n".join(lines) + "\n"
