"""Measuring a running server for `baton analyze --url`: prompts alone, then several at a time."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import secrets
import time
from collections.abc import Iterator
from statistics import median
from typing import TextIO

import msgspec
import uvloop

from baton.cli.endpoint import DEFAULT_URL, Endpoint, connect
from baton.cli.load.client import INTERRUPTED, Target, run_load, settle
from baton.cli.load.prompts import PromptSource
from baton.cli.load.workload import Arrival
from baton.cli.parser import Parser
from baton.errors import BatonError, ConfigError
from baton.observe.results import RequestResult
from baton.planner.analyze.tables import seconds
from baton.planner.endpoint import Answer, EndpointFit, fit_endpoint
from baton.planner.traces import Trace
from baton.twin.workload import TraceRequest

LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
BATCHES = (2, 4, 8, 16)
OUTPUT_TOKENS = 32
REPEATS = 2
MIN_LENGTHS = 4


class Probe(msgspec.Struct, frozen=True):
    """What was measured: the fit, its requests as a trace without times, and one entry each.

    rows: (prompt tokens, how many at a time, TTFT, gap, longest gap) as text, medians of requests
    that were alike.
    """

    fit: EndpointFit
    trace: Trace
    requests: list[dict[str, object]]
    rows: list[tuple[str, ...]]


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument_group("Server").add_argument
    add("--url", help=f"OpenAI-compatible server to measure, such as {DEFAULT_URL}.")
    add("--served-name", metavar="NAME", help="Its model; by default its first.")
    add("--api-key", metavar="KEY", help="API key, or @FILE that holds it.")
    add("--probe", type=float, default=60.0, metavar="S", help="Measure for so long at most. [60]")
    add("--probe-lengths", metavar="LIST", help="Prompt lengths in words, about tokens; rising.")
    add("--probe-batches", metavar="LIST", help="Requests at a time. [2,4,8,16]")


def measure(args: argparse.Namespace, out: TextIO) -> Probe:
    """Send the requests and fit.

    Raises:
        ConfigError: a flag is wrong. BatonError: no server, or too few answers.
    """
    lengths = _numbers(args.probe_lengths, "--probe-lengths", LENGTHS)
    batches = _numbers(args.probe_batches, "--probe-batches", BATCHES)
    if len(lengths) < MIN_LENGTHS:
        raise ConfigError(f"--probe-lengths: {MIN_LENGTHS} lengths are needed to tell a curve")
    if not args.probe > 0:
        raise ConfigError(f"--probe {args.probe:g}: give a number of seconds above 0")
    endpoint = connect(args.url, args.served_name, args.api_key)
    print(f"measuring {endpoint.base_url}  {endpoint.model}, {args.probe:g} s at most", file=out)
    prober = _Prober(endpoint, args.probe)
    with (
        contextlib.suppress(KeyboardInterrupt),
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(prober.run(lengths, batches))
    fit = fit_endpoint(f"{endpoint.model} at {endpoint.base_url}", prober.answers)
    entries = [_entry(*pair) for pair in prober.results]
    return Probe(fit, prober.trace(), entries, prober.rows())


def _numbers(text: str | None, flag: str, default: tuple[int, ...]) -> tuple[int, ...]:
    if text is None:
        return default
    items = [item.strip() for item in text.split(",")]
    if not all(item.isdecimal() and int(item[:7]) > 0 for item in items):
        raise ConfigError(f"{flag} {text!r}: write whole numbers from 1 on, such as 64,256,1024")
    return tuple(sorted({int(item[:7]) for item in items}))


class _Prober:
    """The measurement: short prompts first, so that what there is time for is there."""

    def __init__(self, endpoint: Endpoint, budget_s: float) -> None:
        self._target = Target(endpoint=endpoint, timeout_s=max(30.0, budget_s))
        self._prompts = PromptSource(f"probe/{secrets.randbelow(1 << 32)}")
        self._budget_s = budget_s
        self.results: list[tuple[RequestResult, int]] = []  # with how many at a time

    @property
    def answers(self) -> list[Answer]:
        return [_answer(result, batch) for result, batch in self._good()]

    def trace(self) -> Trace:
        """What was sent, as a set of lengths with latencies."""
        requests = [
            TraceRequest(
                arrival_s=0.0,
                num_prompt_tokens=max(1, result.prompt_tokens or 1),
                num_output_tokens=max(1, result.output_tokens),
                ttft_s=result.ttft_s,
                tpot_s=result.tpot_s,
                e2e_s=result.e2e_s,
            )
            for result, _ in self._good()
        ]
        return Trace(
            source=self._target.endpoint.base_url,
            format="measured",
            requests=requests,
            has_arrivals=False,
            notes=("these are the requests of the measurement, not users'",),
        )

    def _good(self) -> Iterator[tuple[RequestResult, int]]:
        yield from ((r, batch) for r, batch in self.results if r.failure is None and r.event_s)

    def rows(self) -> list[tuple[str, ...]]:
        """One for each prompt length and number at a time, in the order of sending."""
        groups: dict[tuple[int, int], list[RequestResult]] = {}
        for result, batch in self._good():
            groups.setdefault((result.prompt_tokens or 0, batch), []).append(result)
        return [
            (
                f"{length:,}",
                str(batch),
                seconds(median(r.ttft_s or 0.0 for r in group)),
                seconds(median([gap for r in group for gap in r.itl_s] or [0.0])),
                seconds(max((gap for r in group for gap in r.itl_s), default=0.0)),
            )
            for (length, batch), group in groups.items()
        ]

    async def run(self, lengths: tuple[int, ...], batches: tuple[int, ...]) -> None:
        """Alone, at every length, again and again; then batches; until the time is over."""
        # The first one finds cold caches, and whether the server tells token ids.
        arrival = Arrival(0.0, lengths[0], OUTPUT_TOKENS)
        self._target, first = await settle(self._target, arrival, self._prompts)
        if first is not None and first.failure not in (None, INTERRUPTED):
            raise BatonError(
                f"the first request to {self._target.endpoint.base_url} failed "
                f"({first.failure}): {first.detail}"
            )
        start = time.perf_counter()
        alone_s = 0.6 * self._budget_s  # the rest is for batches
        usable = list(lengths)
        for _ in range(REPEATS):
            for length in list(usable):
                if time.perf_counter() - start > alone_s:
                    break
                results = await self._send(1, length)
                self.results += [(result, 1) for result in results]
                if results and results[0].failure is not None:  # too long for this server
                    usable = [shorter for shorter in usable if shorter < length]
                    break
        for batch in batches:
            if time.perf_counter() - start > self._budget_s:
                return
            length = usable[len(usable) // 2] if usable else lengths[0]
            self.results += [(result, batch) for result in await self._send(batch, length)]

    async def _send(self, batch: int, length: int) -> list[RequestResult]:
        arrivals = [Arrival(0.0, length, OUTPUT_TOKENS) for _ in range(batch)]
        return await run_load(self._target, arrivals, self._prompts)


def _answer(result: RequestResult, batch: int) -> Answer:
    computed = (result.prompt_tokens or 0) - (result.cached_tokens or 0)
    return Answer(
        sent_s=result.sent_s,
        event_s=result.event_s,
        num_prompt_tokens=max(1, computed),
        num_output_tokens=result.output_tokens,
        is_alone=batch == 1,
    )


def _entry(result: RequestResult, batch: int) -> dict[str, object]:
    return {
        "at_a_time": batch,
        "prompt_tokens": result.prompt_tokens,
        "cached_tokens": result.cached_tokens,
        "output_tokens": result.output_tokens,
        "ttft_s": result.ttft_s,
        "itl_s": result.itl_s,
        "e2e_s": result.e2e_s,
        "failure": result.failure,
        "detail": result.detail,
    }
