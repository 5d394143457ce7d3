"""`baton plan`: whether to split, on what, what it costs, how sure that is, what would flip it."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from baton.cli.numbers import count, share, whole
from baton.cli.parser import Parser
from baton.cli.plan_live import live_subject
from baton.cli.plan_subject import Subject
from baton.cli.terminal import print_table
from baton.core.cost import Link, ModelShape, model_shape
from baton.errors import ConfigError
from baton.model_spec import load_model_spec
from baton.observe.progress import counting_progress
from baton.observe.slo import Slo
from baton.planner.analyze.workers import DEFAULT_HARDWARE
from baton.planner.models import find_model
from baton.planner.plan.assumptions import assumptions, profiles_of
from baton.planner.plan.frontier import plot
from baton.planner.plan.kinds import kinds, offers
from baton.planner.plan.plan_file import plan_yaml
from baton.planner.plan.report import COLUMNS, basis, document, runners_up, sentences
from baton.planner.plan.rows import Tell, Wish
from baton.planner.plan.search import Space
from baton.planner.plan.today import parse_today
from baton.planner.plan.traffic import busiest
from baton.planner.plan.verdict import Plan, plan
from baton.planner.profiles import read_profile
from baton.planner.traces import read_trace, spread
from baton.twin.workload import TraceRequest, scale

SUMMARY = (
    "Find the deployment that serves a trace within its limits for the least money: unified or\n"
    "split, on which hardware, how many workers. Arithmetic leaves out what cannot do it, the\n"
    "twin decides, and errors drawn from the cost models' own say how sure that is."
)
EXAMPLES = """\
  baton plan --model Llama-3.1-8B --trace requests.jsonl --slo ttft=2s,tpot=50ms
  baton plan --model ./my-model --trace t.jsonl --slo ttft=1s,tpot=40ms --hardware H100,L40S \\
      --link 100 --today 4U:H100 --plot frontier.svg
  baton serve --config plan.yaml
  baton plan --from-live http://127.0.0.1:8001            anew, from what it has measured
"""
DEFAULT_BUDGETS = (2048, 8192)
CODECS = {"raw": 1.0, "fp8": 0.52, "int8": 0.52, "int4": 0.28}
"""Of a block's bytes, scales included."""


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument_group("What is asked for").add_argument
    add("--model", metavar="NAME", help="Model, or its directory.")
    add("--trace", metavar="FILE", help="Any form that baton analyze reads.")
    add("--from-live", metavar="URL", help="Traffic and steps of a gateway's admin listener.")
    add("--columns", default="", metavar="MAP", help="Such as arrival=ts:ms,prompt=in,output=out.")
    add("--rate", type=float, help="Requests per second; scales the trace.")
    add("--slo", default="", help="Such as ttft=2s,tpot=50ms,e2e=30s.")
    add("--attainment", type=share, help="Share of requests that must keep it. [0.9]")
    add("--confidence", type=share, default=0.8, help="Least probability that it holds. [0.8]")
    add("--today", metavar="LAYOUT", help="What runs now, such as 4U or 2P2D:H100+L40S.")
    add = parser.add_argument_group("What may be used").add_argument
    add("--hardware", default="", metavar="LIST", help=f"Devices. [{DEFAULT_HARDWARE}]")
    add("--profile", action="append", default=[], metavar="FILE", help="Cost model; repeat it.")
    add("--price", action="append", default=[], metavar="DEVICE=USD", help="Per device and hour.")
    add("--max-devices", type=count, default=64, metavar="N", help="In all. [64]")
    add("--pipeline", type=count, default=1, metavar="N", help="Most pipeline stages. [1]")
    add("--budgets", default="", metavar="LIST", help="Tokens of a step. [2048,8192]")
    add("--link", default="", metavar="GBIT", help="Links to try; by default the devices' own.")
    add("--link-latency", type=float, default=0.02, metavar="MS", help="Of a transfer. [0.02]")
    add("--codecs", default="raw", metavar="LIST", help=f"Of {', '.join(CODECS)}. [raw]")
    add("--transfer-price", type=float, default=0.0, metavar="USD", help="Per GB of KV. [0]")
    add = parser.add_argument_group("Search").add_argument
    add("--num-requests", type=count, default=300, metavar="N", help="That the twin runs. [300]")
    add("--draws", type=whole, default=24, metavar="N", help="Of errors, a candidate. [24]")
    add("--thorough", action="store_true", help="Run all candidates, under all errors: slow.")
    add("--processes", type=count, metavar="N", help="By default one a core.")
    add("--seed", type=int, default=0, help="Same seed, same plan. [0]")
    add = parser.add_argument_group("Result").add_argument
    add("--write", default="plan.yaml", metavar="FILE", help="For baton serve. [plan.yaml]")
    add("--plot", metavar="FILE", help="The efficient frontier, as SVG.")
    add("--json", metavar="FILE", help="Write everything; - for stdout.")


def run(args: argparse.Namespace) -> int:
    """Plan, print and write; 1 if nothing keeps the promise."""
    out = sys.stderr if args.json == "-" else sys.stdout
    for name in (args.write, args.plot, args.json):
        if name and name != "-" and not Path(name).absolute().parent.is_dir():
            raise ConfigError(f"cannot write {name}: there is no such directory")
    subject = _live(args) if args.from_live else _subject(args)
    wish = Wish(
        Slo.parse(args.slo or subject.slo or ""),
        args.attainment or subject.attainment or 0.9,
        args.confidence, args.draws, args.num_requests, args.transfer_price, args.seed,
        args.thorough,
    )  # fmt: skip
    if not wish.slo.limits:
        raise ConfigError("a plan needs a promise to keep: give --slo such as ttft=2s,tpot=50ms")
    model, trace = subject.model, subject.trace
    if args.rate is not None:
        trace = scale(trace, args.rate)
    offered = offers(
        subject.hardware, model, subject.profiles, _prices(args.price), subject.by_role
    )
    longest = max(each.num_prompt_tokens + each.num_output_tokens for each in trace)
    budgets = _budgets(args.budgets, subject.budget)
    usable = kinds(model, offered, longest=longest, budgets=budgets, max_pipeline=args.pipeline)
    links = _links(args.link, args.link_latency)
    today = parse_today(subject.today, offered, usable, links) if subject.today else None
    space = Space(tuple(usable), tuple(links), _codecs(args.codecs), args.max_devices)
    with _progress() as tell:
        found = plan(
            trace, space, wish, today=today, tell=tell,
            num_processes=args.processes or len(os.sched_getaffinity(0)),
        )  # fmt: skip
    said = [*sentences(found), *(f"{note}." for note in subject.notes)]
    for line in said:
        print(textwrap.fill(line, 100, subsequent_indent="  "), file=out)
    print(file=out)
    title = (
        f"{found.num_candidates:,} candidates, {found.num_survivors:,} of which may hold, "
        f"{found.num_runs:,} runs of the twin "
        "(latencies at the attained share; * Baton cannot run it yet)"
    )
    print_table(COLUMNS, runners_up(found), title=title, file=out)
    print(file=out)
    for line in basis(offered):
        print(textwrap.fill(line, 100, subsequent_indent="  "), file=out)
    _write(Path(args.write), found, subject.model_path, trace, said)
    print(f"\nwrote {args.write}, for baton serve --config {args.write}", file=out)
    if args.plot:
        Path(args.plot).write_text(plot(found), encoding="utf-8")
    if args.json:
        text = msgspec.json.format(msgspec.json.encode(document(found, offered)))
        if args.json == "-":
            print(text.decode())
        else:
            Path(args.json).write_bytes(text + b"\n")
    return 0 if found.holds else 1


def _write(
    file: Path, found: Plan, model_path: str, trace: list[TraceRequest], said: list[str]
) -> None:
    """The plan, and beside it the cost models that it rests on: `plan.profile.json`, or one a role,
    such as `plan.prefill.profile.json`."""
    files = {}
    for field, profile in profiles_of(found).items():
        ending = field.removesuffix("_file").replace("_", ".")
        beside = file.absolute().with_suffix(f".{ending}.json")
        beside.write_bytes(profile.to_json())
        files[field] = str(beside)
    assumed = assumptions(found, busiest(trace, found.wish.num_requests), files)
    longest = max(each.num_prompt_tokens + each.num_output_tokens for each in trace)
    text = plan_yaml(found.chosen.candidate, longest, model_path, said, assumed)
    file.write_text(text, encoding="utf-8")


def _subject(args: argparse.Namespace) -> Subject:
    model, trace = _model(args.model), _trace(args)
    profiles = [read_profile(Path(name)) for name in args.profile]
    names = args.hardware or ("" if profiles else DEFAULT_HARDWARE)
    return Subject(model, args.model, trace, profiles, _list(names), today=args.today)


def _live(args: argparse.Namespace) -> Subject:
    if args.trace:
        raise ConfigError("--trace and --from-live are two traffics: give one of them")
    found = live_subject(
        args.from_live,
        model=_model(args.model) if args.model else None,
        profiles=[read_profile(Path(name)) for name in args.profile],
        hardware=_list(args.hardware),
        today=args.today,
        seed=args.seed,
    )
    return msgspec.structs.replace(found, model_path=args.model or found.model_path)


def _budgets(text: str, today: int | None) -> list[int]:
    given = [max(1, int(_number(each, "--budgets"))) for each in _list(text)]
    found = given or list(DEFAULT_BUDGETS)
    return found if today is None else sorted({*found, today})


def _model(name: str | None) -> ModelShape:
    if not name:
        raise ConfigError("which model? give --model NAME, or its directory")
    if (Path(name) / "config.json").is_file():
        return model_shape(load_model_spec(Path(name)), Path(name).resolve().name)
    return find_model(name)


def _trace(args: argparse.Namespace) -> list[TraceRequest]:
    if not args.trace:
        raise ConfigError("what is the traffic? give --trace FILE, in any form baton analyze reads")
    read = spread(read_trace(Path(args.trace), mapping=args.columns, seed=args.seed), args.seed)
    if not read.has_arrivals:
        raise ConfigError(f"{args.trace} has lengths but no times: a plan needs both")
    return read.requests


def _prices(given: list[str]) -> dict[str, float]:
    found = {}
    for text in given:
        name, equals, usd = text.partition("=")
        if not equals:
            raise ConfigError(f"--price {text!r}: write DEVICE=USD, such as H100=2.49")
        found[name] = _number(usd, "--price")
    return found


def _links(text: str, latency_ms: float) -> list[Link]:
    rates = [_number(each, "--link") for each in _list(text)]
    return [Link(rate * 1e9 / 8, latency_ms * 1e-3) for rate in rates]


def _codecs(text: str) -> tuple[tuple[str, float], ...]:
    names = _list(text)
    if unknown := [name for name in names if name not in CODECS] or (not names and [text]):
        raise ConfigError(f"--codecs {unknown[0]!r}: there are {', '.join(CODECS)}")
    return tuple((name, CODECS[name]) for name in names)


def _list(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _number(text: str, flag: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"{flag} {text!r}: give a number above 0")
    return value


@contextmanager
def _progress() -> Iterator[Tell]:
    """One bar a stage, one after the other."""
    with ExitStack() as stack:
        stage = ""
        bar: Callable[[int, int], None] | None = None

        def tell(name: str, done: int, total: int) -> None:
            nonlocal stage, bar
            if name != stage:
                stack.close()
                stage, bar = name, stack.enter_context(counting_progress(name))
            if bar is not None:
                bar(done, total)

        yield tell
