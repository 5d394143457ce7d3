"""`baton bench`: load a server open-loop, and tell what its users would have seen."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import random
import secrets
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TextIO, TypeVar

import msgspec
import uvloop

from baton.cli.endpoint import Endpoint, add_endpoint_flags, connect
from baton.cli.load import plot, report, sweep
from baton.cli.load.client import INTERRUPTED, Target, run_load, settle
from baton.cli.load.progress import ProgressBar
from baton.cli.load.prompts import PromptSource
from baton.cli.load.workload import Arrival, Range, from_dataset, from_trace, limit, synthetic
from baton.cli.numbers import count, positive
from baton.cli.parser import Parser
from baton.errors import BatonError, ConfigError
from baton.observe.results import summarize
from baton.observe.slo import Slo
from baton.planner.traces import read_trace, spread

T = TypeVar("T")
SUMMARY = (
    "Send requests to any OpenAI-compatible server as users would: each at its time, whether or\n"
    "not earlier ones have been answered. Latencies are of streamed tokens as they arrive."
)
EXAMPLES = """\
  baton bench --rate 4 --num-requests 200 --prompt-tokens 512 --output-tokens 32-128
  baton bench --rate 4 --slo ttft=2s,tpot=40ms,itl_p99=60ms --json run.json
  baton bench --sweep auto --slo ttft=2s,tpot=40ms --plot frontier.png
  baton bench --trace conversation_trace.jsonl --trace-scale 0.1 --duration 60
  baton bench --url https://host:8443 --api-key @key.txt --model my-model --dataset chat.jsonl
"""
DEFAULT_NUM_REQUESTS = 100
REFUSED_IDS = (
    "the server refuses return_token_ids: output tokens are its usage, or events without one"
)
SWEEP_POINT_S = 30
SWEEP_MIN_REQUESTS = 20


def add_arguments(parser: Parser) -> None:
    add_endpoint_flags(parser)
    add = parser.add_argument_group("Load").add_argument
    add("--rate", type=positive, default=1.0, help="Requests per second, Poisson; inf. [1]")
    add("--num-requests", type=count, metavar="N", help=f"How many. [{DEFAULT_NUM_REQUESTS}]")
    add("--duration", type=positive, metavar="S", help="No arrivals after so many seconds.")
    add("--prompt-tokens", metavar="N|A-B", default="256", help="Length of made-up prompts. [256]")
    add("--output-tokens", metavar="N|A-B", help="Tokens to generate. [64]")
    ids = "Random token ids below N instead of words: exact in length. [N: 4000]"
    add("--token-ids", type=count, nargs="?", const=4000, metavar="N", help=ids)
    add("--dataset", metavar="FILE", help="JSONL with prompt or messages, and output_tokens.")
    add("--trace", metavar="FILE", help="Replay it; any form that baton analyze reads.")
    add("--columns", default="", metavar="MAP", help="Such as arrival=ts:ms,prompt=in,output=out.")
    add("--sort", action="store_true", help="Put rows in the order of their times.")
    add("--trace-speed", type=positive, default=1.0, metavar="F", help="So many times as fast. [1]")
    add("--trace-scale", type=positive, default=1.0, metavar="F", help="Lengths times F. [1]")
    add("--seed", type=int, help="Same seed, same load. By default a new one, which is printed.")
    warmup = "Unmeasured requests first; they find out whether the server tells token ids. [1]"
    add("--warmup", type=int, default=1, metavar="N", help=warmup)

    add = parser.add_argument_group("Requests").add_argument
    add("--api", choices=["completions", "chat"], help="By default completions, or as the data.")
    add("--stop-at-eos", action="store_true", help="Let answers end early (no ignore_eos).")
    add("--extra", metavar="JSON", default="{}", help='More fields, such as {"temperature": 0}.')
    add("--timeout", type=positive, default=600.0, metavar="S", help="Fail a request then. [600]")

    add = parser.add_argument_group("Result").add_argument
    add("--slo", default="", help="Such as ttft=2s,tpot=40ms,itl_p99=60ms,e2e=30s.")
    add("--sweep", metavar="RATES", help="Rates such as 0.5,1,2,4; or auto: raise --rate.")
    add("--plot", metavar="FILE", help="Draw the sweep's frontier (.png, .svg, .pdf).")
    add("--json", metavar="FILE", help="Write everything, each request too; - for stdout.")
    add("--quiet", action="store_true", help="No progress bar.")


def run(args: argparse.Namespace) -> int:
    """Measure and print; 1 if no request succeeded, 130 if interrupted."""
    slo = Slo.parse(args.slo)
    rates = sweep.parse_rates(args.sweep) if args.sweep else [args.rate]
    if args.plot:
        if not args.sweep:
            raise ConfigError("--plot draws a sweep: give --sweep auto, or rates")
        plot.check_plot(args.plot)
    if args.sweep and args.trace:
        raise ConfigError("--sweep raises a Poisson rate: leave out --trace")
    if math.isinf(args.rate) and (rates is None or (args.duration and not args.num_requests)):
        raise ConfigError("--rate inf sends all requests at once: give --num-requests, no sweep")
    session = _Session(args, slo)
    if rates is None:
        sweep.auto(args.rate, session.point)
    else:
        for rate in rates:
            if session.point(rate) is None:
                break
    return session.finish()


class _Session:
    """The runs of one `baton bench`, one after another, against one server."""

    def __init__(self, args: argparse.Namespace, slo: Slo) -> None:
        self._args = args
        self._slo = slo
        self._seed = args.seed if args.seed is not None else secrets.randbelow(1 << 32)
        self._out: TextIO = sys.stderr if args.json == "-" else sys.stdout
        self._points: list[sweep.Point] = []
        self._interrupted = False
        try:
            extra = msgspec.json.decode(args.extra, type=dict[str, object])
        except msgspec.MsgspecError as error:
            raise ConfigError(f"--extra {args.extra!r}: {error}") from None
        self._trace = self._read_trace() if args.trace else []
        first = self._plan(1.0 if math.isinf(args.rate) else args.rate)  # finds bad files early
        api = self._api(first)
        endpoint = connect(args.url, args.model, args.api_key)
        self._target = Target(
            endpoint=endpoint,
            api=api,
            ignore_eos=not args.stop_at_eos,
            timeout_s=args.timeout,
            extra=extra,
        )
        print(f"{endpoint.base_url}  {endpoint.model}  {self._describe()}", file=self._out)
        self._warm_up(first, endpoint)

    def _describe(self) -> str:
        args = self._args
        if args.trace:
            return f"trace {args.trace}, seed {self._seed}"
        what = args.dataset or f"{args.prompt_tokens} tokens in, {args.output_tokens or 64} out"
        return f"{what}, Poisson, seed {self._seed}"

    def _api(self, arrivals: list[Arrival]) -> str:
        """completions, or chat if asked for or if the data holds messages."""
        prompt = next((a.prompt for a in arrivals if a.prompt is not None), None)
        is_chat = isinstance(prompt, list) and isinstance(prompt[0], dict)
        api: str = self._args.api or ("chat" if is_chat else "completions")
        if api == "chat" and (self._args.token_ids or (isinstance(prompt, list) and not is_chat)):
            raise ConfigError("token ids can be sent to --api completions only")
        if api == "completions" and is_chat:
            raise ConfigError("the data set holds messages: use --api chat")
        return api

    def _read_trace(self) -> list[Arrival]:
        """As the twin reads it, so that a run and its prediction are of the same requests."""
        args = self._args
        read = read_trace(Path(args.trace), mapping=args.columns, sort=args.sort, seed=self._seed)
        trace = spread(read, self._seed)
        for note in trace.notes:
            print(f"note: {note}", file=self._out)
        return from_trace(trace, speed=args.trace_speed, scale=args.trace_scale)

    def _plan(self, rate: float) -> list[Arrival]:
        args = self._args
        rng = random.Random(f"{self._seed}/arrivals/{len(self._points)}")
        num_requests = args.num_requests
        if args.trace:
            return limit(iter(self._trace), num_requests, args.duration)
        if num_requests is None and args.duration is None:
            num_requests = DEFAULT_NUM_REQUESTS
            if args.sweep:
                num_requests = max(SWEEP_MIN_REQUESTS, math.ceil(rate * SWEEP_POINT_S))
        output = Range.parse(args.output_tokens, "--output-tokens") if args.output_tokens else None
        if args.dataset:
            stream = from_dataset(Path(args.dataset), rate, output, rng)
        else:
            prompt = Range.parse(args.prompt_tokens, "--prompt-tokens")
            stream = synthetic(rate, prompt, output or Range(64, 64), rng)
        return limit(stream, num_requests, args.duration)

    def _prompts(self, run: str) -> PromptSource:
        """Runs share no prompts, or the second one would be answered from a prefix cache."""
        return PromptSource(f"{self._seed}/{run}", self._args.token_ids)

    def _warm_up(self, arrivals: list[Arrival], endpoint: Endpoint) -> None:
        prompts = self._prompts("warmup")
        for arrival in arrivals[: self._args.warmup]:
            first = msgspec.structs.replace(arrival, at_s=0.0, blocks=())
            settled = _run(settle(self._target, first, prompts))
            target, result = settled or (self._target, None)
            if result is None or result.failure == INTERRUPTED:
                raise KeyboardInterrupt
            if result.failure:
                raise BatonError(
                    f"the first request to {endpoint.base_url} failed "
                    f"({result.failure}): {result.detail}"
                )
            if target != self._target:
                print(REFUSED_IDS, file=self._out)
            self._target = target

    def point(self, rate: float) -> sweep.Point | None:
        """One run; None once the user has interrupted."""
        arrivals = self._plan(rate)
        label = "trace" if self._args.trace else f"{rate:.3g}/s"
        with ProgressBar(label, len(arrivals), enabled=not self._args.quiet) as bar:
            prompts = self._prompts(str(len(self._points)))
            results = _run(run_load(self._target, arrivals, prompts, bar)) or []
        self._interrupted = len(results) < len(arrivals) or any(
            r.failure == INTERRUPTED for r in results
        )
        if not results:
            return None
        summary = summarize(results, self._slo)
        point = sweep.Point(None if self._args.trace else rate, summary, results)
        self._points.append(point)
        if self._args.sweep and not self._out.isatty():
            print(f"rate {rate:.3g}/s: {summary.requests_per_s:.3g}/s done", file=sys.stderr)
        return None if self._interrupted else point

    def finish(self) -> int:
        """Print and write what was measured."""
        if not self._points:
            return 130
        if self._args.sweep:
            points = sorted(self._points, key=lambda p: p.rate or 0.0)
            report.print_sweep(points, self._out)
            best = sweep.knee(points)
            if best is not None:
                print(f"sustained up to {best.rate:.3g} requests/s", file=self._out)
            if self._args.plot:
                title = f"{self._target.endpoint.model}: {self._describe()}"
                plot.plot_sweep(points, self._slo, title, self._args.plot)
        else:
            report.print_run(self._points[0].summary, self._points[0].results, self._out)
        if self._args.json:
            self._write_json()
        if self._interrupted:
            print("interrupted: the numbers cover what was sent until then", file=self._out)
            return 130
        return 0 if any(point.summary.num_ok for point in self._points) else 1

    def _write_json(self) -> None:
        hidden = ("api_key", "json", "plot", "quiet")
        plan = {k: v for k, v in vars(self._args).items() if k not in hidden}
        plan |= {"seed": self._seed, "model": self._target.endpoint.model, "api": self._target.api}
        text = msgspec.json.format(msgspec.json.encode(report.document(plan, self._points)))
        if self._args.json == "-":
            print(text.decode())
        else:
            Path(self._args.json).write_bytes(text + b"\n")


def _run(work: Coroutine[Any, Any, T]) -> T | None:
    """None after a second Ctrl-C, which gives up on what is in flight."""
    with (
        contextlib.suppress(KeyboardInterrupt),
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        return runner.run(work)
    return None
