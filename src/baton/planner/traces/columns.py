"""Any CSV file, or any JSON lines, by a mapping of its columns: `arrival=ts:ms,prompt=in,output=out`.

A column of JSON lines is a path (`usage.prompt_tokens`). Times are seconds unless a unit follows
(`:ms`, `:us`, `:ns`), or dates; an arrival that counts from 1970 may be in any of these units.
Without `arrival` the file is a set of lengths.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import msgspec

from baton.errors import ConfigError
from baton.planner.traces.checks import Place, epoch_scale
from baton.planner.traces.source import Source
from baton.planner.traces.trace import Trace, finish
from baton.twin.workload import TraceRequest

NAME = "columns"
UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
TIMES = ("arrival", "ttft", "tpot", "e2e")
LABELS = ("id", "session", "kind", "tenant")
FIELDS = ("prompt", "output", *TIMES, *LABELS)
KNOWN = (
    {"arrival": "arrived_at", "prompt": "num_prefill_tokens", "output": "num_decode_tokens"},
    {"prompt": "num_prefill_tokens", "output": "num_decode_tokens"},
    {"arrival": "arrival_s", "prompt": "input_toks", "output": "output_toks", "id": "request_id"},
)
"""Mappings of well-known headers: Vidur's and Sarathi-Serve's, LLMServingSim's."""


class Column(msgspec.Struct, frozen=True):
    """Where a field stands, and what makes seconds of it."""

    name: str
    unit: str = ""

    @property
    def scale(self) -> float:
        return UNITS.get(self.unit, 1.0)


def parse(text: str) -> dict[str, Column]:
    """Read `FIELD=COLUMN[:UNIT],…`.

    Raises:
        ConfigError: it states the grammar.
    """
    mapping: dict[str, Column] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        field, equals, name = item.partition("=")
        stem, colon, unit = name.rpartition(":")
        column = Column(stem, unit) if colon and unit in UNITS and field in TIMES else Column(name)
        if not equals or field not in FIELDS or field in mapping or not column.name:
            raise ConfigError(
                f"--columns {item!r}: write FIELD=COLUMN, each field once, such as "
                f"arrival=ts:ms,prompt=in,output=out; fields are {', '.join(FIELDS)}"
            )
        mapping[field] = column
    if "prompt" not in mapping or "output" not in mapping:
        raise ConfigError("--columns must say which columns are prompt= and output=, in tokens")
    return mapping


def known(header: Iterable[str]) -> dict[str, Column] | None:
    """The mapping of a header that needs none from the user."""
    names = set(header)
    for mapping in KNOWN:
        if names >= set(mapping.values()):
            return {field: Column(name) for field, name in mapping.items()}
    return None


def read(
    source: Source, mapping: Mapping[str, Column], *, is_json: bool, sort: bool = False
) -> Trace:
    """Read the file by the mapping.

    Raises:
        ConfigError: a column is missing; or it names the line and what to change.
    """
    if not is_json:
        _check_header(source, mapping)
    entries = source.objects() if is_json else source.records()
    scale: float | None = None

    def rows() -> Iterator[tuple[Place, TraceRequest]]:
        nonlocal scale
        for line, entry in entries:
            place = Place(str(source), line)
            found = {field: look_up(entry, column.name) for field, column in mapping.items()}
            if scale is None and "arrival" in mapping:
                scale = _arrival_scale(place, mapping["arrival"], found["arrival"])
            yield place, _request(place, mapping, found, scale or 1.0)

    return finish(
        rows(),
        source=str(source),
        format=NAME,
        in_order=not sort,
        has_arrivals="arrival" in mapping,
        notes=() if "arrival" in mapping else ("a set of lengths: it has no arrival times",),
    )


def look_up(entry: Mapping[str, object], path: str) -> object:
    """What stands at `a.b.c`, or under that very name; None if nothing does."""
    if path in entry:
        return entry[path]
    value: object = entry
    for part in path.split("."):
        if not isinstance(value, dict) or part not in value:
            return None
        value = value[part]
    return value


def _check_header(source: Source, mapping: Mapping[str, Column]) -> None:
    header = source.header()
    for field, column in mapping.items():
        if column.name not in header:
            raise ConfigError(
                f"{source} has no column {column.name!r} for {field}; "
                f"its columns are {', '.join(header)[:300]}"
            )


def _arrival_scale(place: Place, column: Column, first: object) -> float:
    """By its unit; without one, a count since 1970 tells by its size what it counts."""
    if column.unit:
        return column.scale
    if isinstance(first, str) and not first.replace(".", "").isdecimal():
        return 1.0
    return epoch_scale(place.number(first, column.name))


def _request(
    place: Place, mapping: Mapping[str, Column], found: Mapping[str, object], scale: float
) -> TraceRequest:
    durations = {}
    for field in ("ttft", "tpot", "e2e"):
        seconds = place.duration(found.get(field), field)
        if seconds is not None:
            durations[f"{field}_s"] = seconds * mapping[field].scale
    labels = {field: str(found[field]) for field in LABELS if found.get(field) is not None}
    arrival = place.time(found["arrival"], "arrival", scale) if "arrival" in mapping else 0.0
    return TraceRequest(
        arrival_s=arrival,
        num_prompt_tokens=place.tokens(found["prompt"], mapping["prompt"].name, least=1),
        num_output_tokens=place.tokens(found["output"], mapping["output"].name),
        id=labels.get("id", ""),
        session=labels.get("session", ""),
        kind=labels.get("kind", ""),
        tenant=labels.get("tenant", ""),
        ttft_s=durations.get("ttft_s"),
        tpot_s=durations.get("tpot_s"),
        e2e_s=durations.get("e2e_s"),
    )
