"""What a load test prints and writes: a table of latencies, a table of a sweep, a JSON document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TextIO

import msgspec

from baton import __version__
from baton.cli.load.sweep import Point, frontier
from baton.cli.terminal import print_table
from baton.observe.results import RequestResult, Stats, Summary
from baton.observe.slo import duration

LATE_S = 0.05
"""A client later than this at p99 loads the server less than the plan says."""


def print_run(summary: Summary, results: Sequence[RequestResult], file: TextIO) -> None:
    """One run: latencies, then rates, tokens, goodput, failures, and doubts."""
    rows = [
        _latency_row(name, values)
        for name, values in (
            ("TTFT", summary.ttft),
            ("TPOT", summary.tpot),
            ("ITL", summary.itl),
            ("E2E", summary.e2e),
        )
    ]
    print_table(("", "mean", "p50", "p90", "p99", "max"), rows, file=file)
    print(file=file)
    for name, text in _facts(summary, results):
        print(f"{name:<12}{text}", file=file)


def _latency_row(name: str, values: Stats | None) -> tuple[str, ...]:
    if values is None:
        return (name, *["-"] * 5)
    numbers = (values.mean, values.p50, values.p90, values.p99, values.max)
    return (name, *(duration(number) for number in numbers))


def _facts(s: Summary, results: Sequence[RequestResult]) -> list[tuple[str, str]]:
    offered = f"{s.offered_per_s:.3g}/s offered" if s.offered_per_s else "all at once"
    cached = f", {s.cached_tokens:,} of them cached" if s.cached_tokens else ""
    facts = [
        ("requests", f"{s.num_ok} of {s.num_requests} ok in {duration(s.duration_s)}"),
        (
            "rate",
            f"{offered}, {s.requests_per_s:.3g}/s done; {s.mean_concurrency:.3g} at a time",
        ),
        (
            "tokens/s",
            f"{s.output_tokens_per_s:,.0f} out, {s.input_tokens_per_s:,.0f} in "
            f"({s.output_tokens:,} out; {s.prompt_tokens:,} in{cached})",
        ),
    ]
    if s.slo:
        missed = ", ".join(f"{name} {count}x" for name, count in s.missed.items())
        facts.append(
            (
                "goodput",
                f"{s.goodput_per_s:.3g}/s within {s.slo}: {s.attainment:.1%} of requests"
                + (f"; missed {missed}" if missed else ""),
            )
        )
    details = Counter((r.failure, r.detail) for r in results if r.failure)
    for (kind, detail), count in details.most_common(5):
        facts.append(("failed", f"{count}x {kind}: {detail[:160]}"))
    hidden = _hidden_tokens(results)
    if s.counted_by == "events":
        note = "the server told neither token ids nor usage: events with text are counted"
        facts.append(("note", note))
    elif hidden:
        note = f"{hidden:,} of {s.output_tokens:,} tokens came without an event of their own"
        facts.append(("note", f"{note}; their number is the server's usage"))
    if s.send_lag_p99_s > LATE_S:
        facts.append(
            ("note", f"the client itself sent up to {duration(s.send_lag_p99_s)} late (p99)")
        )
    return facts


def _hidden_tokens(results: Sequence[RequestResult]) -> int:
    """Tokens that only the usage told of: without text, or several to an event."""
    ok = (r for r in results if r.failure is None and r.counted_by == "usage")
    return sum(max(0, r.output_tokens - len(r.event_s)) for r in ok)


def print_sweep(points: Sequence[Point], file: TextIO) -> None:
    """One row a rate; a star marks the frontier: no other point is better in every respect."""
    best = frontier(points)
    has_slo = bool(points and points[0].summary.slo)
    columns = ["rate/s", "done/s", "tok/s", "TTFT p50", "p99", "TPOT p50", "p99", "E2E p99", "ok"]
    rows = []
    for point in points:
        s = point.summary
        row = [
            f"{point.rate:.3g}{' *' if point in best else '  '}",
            f"{s.requests_per_s:.3g}",
            f"{s.output_tokens_per_s:,.0f}",
            *(_quantiles(s.ttft)),
            *(_quantiles(s.tpot)),
            duration(s.e2e.p99) if s.e2e else "-",
            f"{s.num_ok}/{s.num_requests}",
        ]
        rows.append(row + ([f"{s.attainment:.0%}", f"{s.goodput_per_s:.3g}"] if has_slo else []))
    print_table(columns + (["within SLO", "goodput/s"] if has_slo else []), rows, file=file)
    print("* on the frontier: no other rate has more throughput at lower TTFT and TPOT", file=file)


def _quantiles(values: Stats | None) -> tuple[str, str]:
    return (duration(values.p50), duration(values.p99)) if values else ("-", "-")


def document(plan: dict[str, object], points: Sequence[Point]) -> dict[str, object]:
    """The JSON form: the plan, and for each run its summary and one entry a request.

    Latencies are seconds; a request's `planned_s` and `sent_s` count from its run's start.
    """
    return {
        "format": "baton-bench/1",
        "version": __version__,
        "plan": plan,
        "runs": [
            {
                "rate": point.rate,
                "summary": msgspec.to_builtins(point.summary),
                "requests": [_request(r, point.results[0].planned_s) for r in point.results],
            }
            for point in points
        ],
    }


def _request(result: RequestResult, start_s: float) -> dict[str, object]:
    entry: dict[str, object] = {
        "index": result.index,
        "planned_s": result.planned_s - start_s,
        "sent_s": result.sent_s - start_s,
        "prompt_tokens": result.prompt_tokens,
        "cached_tokens": result.cached_tokens,
        "output_tokens": result.output_tokens,
        "failure": result.failure,
        "detail": result.detail,
    }
    return entry | {
        f"{name}_s": None if value is None else round(value, 7)
        for name, value in result.values().items()
    }
