"""`baton simulate`: what a deployment would do with a trace, without the deployment."""

from __future__ import annotations

import argparse
import difflib
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import msgspec

from baton.cli.load import report
from baton.cli.load.sweep import Point
from baton.cli.load.workload import Range
from baton.cli.parser import Parser, add_config_flags, config_from
from baton.cli.terminal import print_table
from baton.core.cost import Link, Profile
from baton.errors import ConfigError
from baton.observe.results import summarize
from baton.observe.slo import Slo
from baton.planner.profiles import bundled_profiles, read_profile
from baton.planner.traces import read_trace, spread
from baton.twin.failures import Failure
from baton.twin.results import RunResult, WorkerResult
from baton.twin.setup import deployment
from baton.twin.simulator import Simulator
from baton.twin.tracing import Tracer
from baton.twin.workload import TraceRequest, Uniform, check_trace, gamma, scale, synthetic
from baton.types import Role

SUMMARY = (
    "Run the code that serves on a virtual clock: real scheduler, router and handoff, and a cost\n"
    "model in place of the model. The same report as baton bench, in a fraction of the time."
)
EXAMPLES = """\
  baton simulate --layout 1P1D --profile h100.json --engine.kv-cache-bytes 40GiB --trace t.jsonl
  baton simulate --config plan.yaml --profile h100.json --rate 8 --slo ttft=2s,tpot=40ms
  baton simulate --config plan.yaml --profile prefill=h100.json --profile decode=l40s.json \\
      --link 100 --trace t.jsonl --fail kill:decode-0@60 --chrome-trace run.json
"""
SECTIONS = ("model", "engine", "store", "fabric", "gateway", "launch")


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument_group("Twin").add_argument
    add(
        "--profile",
        action="append",
        default=[],
        metavar="[ROLE=]FILE",
        help="What steps cost: from baton profile, or the name of one that comes with Baton, such "
        "as h100-sxm.vllm.qwen3-32b.16bit; repeat it for other roles.",
    )
    add("--link", type=float, metavar="GBIT", help="Gbit/s between workers; by default one host.")
    add("--link-latency", type=float, default=0.0, metavar="MS", help="Of a transfer. [0]")
    add("--fail", action="append", default=[], metavar="WHAT", help="Such as kill:decode-0@30.")
    add = parser.add_argument_group("Load").add_argument
    add("--trace", metavar="FILE", help="Any form that baton analyze reads.")
    add("--columns", default="", metavar="MAP", help="Such as arrival=ts:ms,prompt=in,output=out.")
    add("--sort", action="store_true", help="Put rows in the order of their times.")
    add("--rate", type=float, help="Requests per second; scales a trace. [1 without a trace]")
    add("--cv", type=float, default=1.0, help="Variation of gaps; 1 is Poisson. [1]")
    add("--num-requests", type=int, metavar="N", help="How many at most. [1000 without a trace]")
    add("--duration", type=float, metavar="S", help="No arrivals after so many seconds.")
    add("--prompt-tokens", metavar="N|A-B", default="256", help="Without a trace. [256]")
    add("--output-tokens", metavar="N|A-B", default="64", help="Without a trace. [64]")
    add("--seed", type=int, default=0, help="Same seed, same result, to the byte. [0]")
    add = parser.add_argument_group("Result").add_argument
    add("--slo", default="", help="Such as ttft=2s,tpot=40ms,itl_p99=60ms,e2e=30s.")
    add("--json", metavar="FILE", help="Write everything, each request too; - for stdout.")
    add("--chrome-trace", metavar="FILE", help="Steps, fetches and requests, to look at.")
    add_config_flags(parser, SECTIONS)


def run(args: argparse.Namespace) -> int:
    """Simulate and print; 1 if no request succeeded."""
    slo = Slo.parse(args.slo)
    trace = load(args)
    check_trace(trace, args.trace or "the workload")
    longest = max(each.num_prompt_tokens + each.num_output_tokens for each in trace)
    link = None
    if args.link is not None:
        link = Link(args.link * 1e9 / 8, args.link_latency * 1e-3)
    simulator = Simulator(
        deployment(config_from(args), profiles(args.profile), longest=longest, link=link),
        trace,
        failures=[Failure.parse(text) for text in args.fail],
        tracer=(tracer := Tracer() if args.chrome_trace else None),
    )
    began = time.perf_counter()
    result = simulator.run()
    took_s = time.perf_counter() - began
    point = Point(args.rate, summarize(result.requests, slo), result.requests)
    out = sys.stderr if args.json == "-" else sys.stdout
    report.print_run(point.summary, point.results, out)
    print_workers(result.workers, out)
    print(f"{result.end_s:,.0f} s simulated in {took_s:.3g} s", file=sys.stderr)
    if args.json:
        _write_json(args, point, result)
    if tracer is not None:
        Path(args.chrome_trace).write_bytes(tracer.to_json() + b"\n")
    return 0 if point.summary.num_ok else 1


def load(args: argparse.Namespace) -> list[TraceRequest]:
    """The requests that are asked for.

    Raises:
        ConfigError: the trace cannot be read, or a figure makes no sense.
    """
    num_requests, seed = args.num_requests, args.seed
    if args.trace:
        file = Path(args.trace)
        read = spread(read_trace(file, mapping=args.columns, sort=args.sort, seed=seed), seed)
        if not read.has_arrivals:
            raise ConfigError(f"{args.trace} has lengths but no times: the twin needs both")
        trace = read.requests[:num_requests]
        if args.rate is not None:
            trace = scale(trace, args.rate)
        if args.duration is not None:
            trace = [each for each in trace if each.arrival_s <= args.duration]
        return trace
    rng = random.Random(seed)
    if num_requests is None and args.duration is None:
        num_requests = 1000
    return synthetic(
        _arrivals(1.0 if args.rate is None else args.rate, args.cv, rng),
        _lengths(args.prompt_tokens, "--prompt-tokens"),
        _lengths(args.output_tokens, "--output-tokens"),
        rng,
        num_requests=num_requests,
        duration_s=args.duration,
    )


def _arrivals(rate: float, cv: float, rng: random.Random) -> Iterator[float]:
    return gamma(rate, cv, rng)


def _lengths(text: str, flag: str) -> Uniform:
    parsed = Range.parse(text, flag)
    return Uniform(parsed.low, parsed.high)


def profiles(given: Sequence[str]) -> dict[Role, Profile]:
    """The profile of each role, from `FILE` and `ROLE=FILE`; the latter wins. A name is a file's,
    or that of a profile that comes with Baton.

    Raises:
        ConfigError: none is given, or one cannot be read.
    """
    found: dict[Role, Profile] = {}
    roles = {role.value: role for role in Role}
    for text in sorted(given, key=lambda text: text.partition("=")[0] in roles):
        name, equals, file = text.partition("=")
        mine = [roles[name]] if equals and name in roles else list(Role)
        profile = _profile(file if equals and name in roles else text)
        found.update(dict.fromkeys(mine, profile))
    if not found:
        raise ConfigError(
            "what does a step cost? give --profile FILE, which baton profile writes for the "
            "machine at hand, or the name of a profile that comes with Baton"
        )
    return found


def _profile(text: str) -> Profile:
    """A file, or one that comes with Baton, by its name."""
    if Path(text).exists():
        return read_profile(Path(text))
    bundled = bundled_profiles()
    if text not in bundled:
        near = difflib.get_close_matches(text, bundled, 3, cutoff=0.3)
        hint = f"; those that come with Baton and are next to it: {', '.join(near)}" if near else ""
        raise ConfigError(f"cannot read {text}: there is no such file{hint}")
    return bundled[text]


def print_workers(workers: Sequence[WorkerResult], file: TextIO) -> None:
    """One row a worker."""
    rows = [
        (
            each.worker_id,
            f"{each.utilisation:.0%}",
            f"{each.num_steps:,}",
            f"{each.mean_seqs:.3g}",
            f"{each.num_tokens:,}",
            f"{each.counters.get('preemptions', 0):,}",
            f"{each.bytes_received / 1e9:.3g}",
        )
        for each in workers
    ]
    print(file=file)
    columns = ("worker", "busy", "steps", "seqs/step", "tokens", "preempted", "GB in")
    print_table(columns, rows, file=file)


def _write_json(args: argparse.Namespace, point: Point, result: RunResult) -> None:
    hidden = ("json", "chrome_trace")
    plan = {name: value for name, value in vars(args).items() if name not in hidden}
    document = report.document(plan | {"simulated": True}, [point])
    document["workers"] = msgspec.to_builtins(result.workers)
    document["gateway"] = result.gateway
    text = msgspec.json.format(msgspec.json.encode(document))
    if args.json == "-":
        print(text.decode())
    else:
        Path(args.json).write_bytes(text + b"\n")
