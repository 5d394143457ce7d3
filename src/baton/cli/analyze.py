"""`baton analyze`: what a trace says about its traffic, and what a running server makes of it."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import msgspec

from baton.cli import analyze_probe
from baton.cli.numbers import count, finite
from baton.cli.parser import Parser
from baton.cli.terminal import print_table
from baton.core.cost import ModelShape, model_shape
from baton.errors import ConfigError
from baton.model_spec import load_model_spec
from baton.planner.analyze import Analysis, analyze
from baton.planner.analyze.page import page
from baton.planner.analyze.serving import Serving
from baton.planner.analyze.sharing import DEFAULT_CACHES
from baton.planner.analyze.tables import Table, tables
from baton.planner.analyze.workers import (
    DEFAULT_HARDWARE,
    DEFAULT_MODEL,
    device_prices,
    workers,
)
from baton.planner.endpoint import EndpointFit
from baton.planner.models import find_model
from baton.planner.profiles import read_profile
from baton.planner.traces import FORMATS, read_trace

SUMMARY = (
    "Read a trace of traffic and tell what a layout is chosen by: lengths, rate, bursts, shared\n"
    "prefixes, what prefill and decode take, and which rules of thumb hold for it.\n\n"
    "Forms, told by what stands in the file (gzipped or not):\n"
    + "\n".join(f"  {name:<13} {what}" for name, what in FORMATS.items())
)
EXAMPLES = """\
  baton analyze requests.jsonl --html traffic.html
  baton analyze calls.csv --columns arrival=ts:ms,prompt=in_tokens,output=out_tokens
  baton analyze trace.jsonl --model ./my-model --profile h100.json --profile l40s.json
  baton analyze --url http://127.0.0.1:8000              measure a running server
  baton analyze trace.jsonl --url https://host --api-key @key.txt
"""
_SIZES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}


def add_arguments(parser: Parser) -> None:
    parser.usage = "baton analyze [TRACE] [options]"
    parser.add_argument("trace", nargs="?", metavar="TRACE", help="File of requests.")
    add = parser.add_argument_group("Trace").add_argument
    add("--columns", default="", metavar="MAP", help="Such as arrival=ts:ms,prompt=in,output=out.")
    add("--sort", action="store_true", help="Put rows in the order of their times.")
    add("--seed", type=int, default=0, help="For forms that requests are drawn from. [0]")
    add("--cache", metavar="LIST", help="Prefix caches to try, in tokens: 300k,1M,10M.")

    add = parser.add_argument_group("Cost").add_argument
    add("--model", metavar="NAME", help=f"Model, or its directory. [{DEFAULT_MODEL}]")
    add("--hardware", metavar="LIST", help=f"Devices, the main one first. [{DEFAULT_HARDWARE}]")
    add("--profile", action="append", default=[], metavar="FILE", help="Cost model; repeat it.")
    add("--tpot", type=finite, default=50.0, metavar="MS", help="Longest decode step. [50]")
    add("--batch", type=count, metavar="N", help="Sequences a decode step; by default computed.")

    analyze_probe.add_arguments(parser)

    add = parser.add_argument_group("Result").add_argument
    add("--html", metavar="FILE", help="Write one page with plots that needs nothing else.")
    add("--json", metavar="FILE", help="Write everything; - for stdout.")


def run(args: argparse.Namespace) -> int:
    """Read, measure if there is a URL, print and write."""
    if args.trace is None and args.url is None:
        raise ConfigError("give a TRACE, or --url of a server to measure, or both")
    out = sys.stderr if args.json == "-" else sys.stdout
    for name in (args.html, args.json):
        if name and name != "-" and not Path(name).absolute().parent.is_dir():
            raise ConfigError(f"cannot write {name}: there is no such directory")
    caches = _caches(args.cache)
    trace = None
    if args.trace is not None:
        trace = read_trace(Path(args.trace), mapping=args.columns, sort=args.sort, seed=args.seed)
    model, servings, notes = _servings(args)
    fit: EndpointFit | None = None
    requests: list[dict[str, object]] = []
    if args.url is not None:
        probe = analyze_probe.measure(args, out)
        fit, requests = probe.fit, probe.requests
        columns = ("prompt tokens", "at a time", "TTFT", "ITL", "longest")
        print_table(columns, probe.rows, title="Measured (medians)", file=out)
        print(file=out)
        servings.insert(0, fit)
        trace = trace or probe.trace
    assert trace is not None  # there is a trace, or a server, which gives one
    trace = msgspec.structs.replace(trace, notes=(*trace.notes, *notes))
    analysis = analyze(
        trace, servings, model=model, endpoint=fit, caches=caches,
        tpot_s=args.tpot / 1000, batch=args.batch, prices=device_prices(),
    )  # fmt: skip
    show(analysis, out)
    if args.html:
        _write(args.html, page(analysis).encode())
        print(f"\nwrote {args.html}", file=out)
    if args.json:
        _write(args.json, document(analysis, requests))
    return 0


def _servings(args: argparse.Namespace) -> tuple[ModelShape | None, list[Serving], list[str]]:
    """The model, the kinds of worker and what was assumed of them.

    A server that is measured needs none: it is compared with others only if they are named.
    """
    profiles = [read_profile(Path(name)) for name in args.profile]
    is_asked = args.model or args.hardware or profiles
    if args.url is not None and not is_asked:
        return None, [], []
    notes = []
    if args.model is not None:
        model = _model(args.model)
    elif profiles:
        model = profiles[0].model
    else:
        model = find_model(DEFAULT_MODEL)
        notes.append(f"costs are those of {model.name}; give --model for another one")
    names = (args.hardware or ("" if profiles else DEFAULT_HARDWARE)).split(",")
    return model, [*workers(model, [n for n in names if n.strip()], profiles)], notes


def _model(name: str) -> ModelShape:
    if (Path(name) / "config.json").is_file():
        return model_shape(load_model_spec(Path(name)), Path(name).resolve().name)
    return find_model(name)


def _caches(text: str | None) -> tuple[int, ...]:
    if text is None:
        return DEFAULT_CACHES
    sizes = []
    for item in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,6})?)\s*([kMG]?)\s*", item)
        size = int(float(match[1]) * _SIZES[match[2]]) if match else 0
        if size < 1:
            raise ConfigError(f"--cache {item!r}: write sizes in tokens, such as 300k,1M,10M")
        sizes.append(size)
    return tuple(sizes)


def _write(name: str, content: bytes) -> None:
    if name == "-":
        sys.stdout.write(content.decode())
        return
    try:
        Path(name).write_bytes(content)
    except OSError as error:
        raise ConfigError(f"cannot write {name}: {error.strerror}") from None


def document(analysis: Analysis, requests: Sequence[dict[str, object]]) -> bytes:
    """The JSON form; `requests` are those that were sent to measure a server."""
    built = msgspec.to_builtins(analysis)
    if requests:
        built["measured_requests"] = list(requests)
    return msgspec.json.format(msgspec.json.encode(built)) + b"\n"


def show(analysis: Analysis, out: TextIO) -> None:
    """Print the tables."""
    print(
        f"{analysis.source}: {analysis.num_requests:,} requests, {analysis.trace_format}", file=out
    )
    for note in analysis.notes:
        print(textwrap.fill(f"note: {note}", 100, subsequent_indent="      "), file=out)
    for table in tables(analysis):
        print(file=out)
        if table.name == "claims":
            print(table.title, file=out)
            for line in _claim_lines(table):
                print(line, file=out)
        else:
            print_table(table.columns, table.rows, title=table.title, file=out)
        for line in textwrap.wrap(table.note, 100):
            print(line, file=out)


def _claim_lines(table: Table) -> Iterator[str]:
    """Sentences, which columns of numbers are no place for."""
    for says, _, verdict, why in table.rows:
        lines = textwrap.wrap(f"{says}: {why}", 82)
        yield f"  {verdict:<15}{lines[0]}"
        yield from (f"  {'':<15}{line}" for line in lines[1:])
