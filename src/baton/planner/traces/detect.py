"""Which reader a file is for, told by what stands in it, never by its name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import msgspec

from baton.errors import ConfigError
from baton.planner.traces import (
    access_log,
    azure,
    bench_results,
    columns,
    digitised,
    lifecycle,
    mooncake,
)
from baton.planner.traces.source import Source
from baton.planner.traces.trace import Trace

FORMATS = {
    lifecycle.NAME: "what the gateway's admin listener gives under /requests",
    azure.NAME: "Azure LLM inference traces 2023 and 2024, CSV",
    mooncake.NAME: "Mooncake, JSON lines with hash_ids",
    bench_results.VLLM: "vllm bench serve --save-result --save-detailed",
    bench_results.BATON: "baton bench --json",
    access_log.NAME: "access logs of OpenAI-compatible servers, JSON lines",
    columns.NAME: "any CSV or JSON lines, by --columns",
    digitised.NAME: "curves read off published figures, drawn from",
}


def read_trace(file: Path, *, mapping: str = "", sort: bool = False, seed: int = 0) -> Trace:
    """Read a trace of any known form; gzip is unpacked.

    mapping: `arrival=ts:ms,prompt=in,output=out` (see `columns`), for forms that are not known.
    sort: put rows in order that should be but are not. seed: for forms that are drawn from.

    Raises:
        ConfigError: it names the file, the line and what to change.
    """
    source = Source(file)
    first = source.first_line().lstrip()
    is_json = first.startswith(("{", "["))
    if mapping:
        return columns.read(source, columns.parse(mapping), is_json=is_json, sort=sort)
    if is_json:
        return _read_json(source, first, sort)
    header = source.header()
    if set(header) >= set(azure.COLUMNS):
        return azure.read(source, sort=sort)
    if set(header) >= set(digitised.RATE_COLUMNS):
        return digitised.read(source, seed=seed)
    found = columns.known(header)
    if found is None:
        raise ConfigError(
            f"{file}: its columns are {', '.join(header)[:300]}; say which is which with "
            "--columns arrival=…,prompt=…,output=…"
        )
    return columns.read(source, found, is_json=False, sort=sort)


def _read_json(source: Source, first: str, sort: bool) -> Trace:
    try:
        head = cast(object, msgspec.json.decode(first))
    except (msgspec.MsgspecError, RecursionError):  # a document over several lines, or no JSON
        head = None
    if isinstance(head, dict) and not _is_document(head):
        return _read_lines(source, head, sort)
    document = source.document()
    if isinstance(document, list):
        return _read_array(source, document)
    if isinstance(document, dict) and document.get("format") == "baton-bench/1":
        return bench_results.read_baton(source, document)
    if isinstance(document, dict) and "input_lens" in document:
        return bench_results.read_vllm(source, document)
    raise _unknown(source, document)


def _is_document(head: dict[str, object]) -> bool:
    return "input_lens" in head or head.get("format") == "baton-bench/1"


def _read_lines(source: Source, head: dict[str, object], sort: bool) -> Trace:
    if "input_length" in head and "output_length" in head:
        return mooncake.read(source, sort=sort)
    if all(name in head for name in lifecycle.FIELDS):
        return lifecycle.read(source, source.objects(), "line")
    if access_log.looks_like_one(head):
        return access_log.read(source, source.objects(), "line")
    raise _unknown(source, head)


def _read_array(source: Source, entries: list[object]) -> Trace:
    def numbered() -> Iterator[tuple[int, object]]:
        yield from enumerate(entries, 1)

    if not entries:
        raise ConfigError(f"{source} holds no requests: give a trace with at least one")
    head = entries[0]
    if isinstance(head, dict) and all(name in head for name in lifecycle.FIELDS):
        return lifecycle.read(source, numbered(), "entry")
    if isinstance(head, dict) and access_log.looks_like_one(head):
        return access_log.read(source, numbered(), "entry")
    raise _unknown(source, head)


def _unknown(source: Source, head: object) -> ConfigError:
    names = ", ".join(map(str, head)) if isinstance(head, dict) else type(head).__name__
    return ConfigError(
        f"{source} is in no known form; it begins with an entry of {names[:200]}. Known forms: "
        f"{', '.join(FORMATS)}. For JSON lines, say which field is which with "
        "--columns arrival=…,prompt=…,output=…"
    )
