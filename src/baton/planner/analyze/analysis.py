"""One trace, analysed: everything that the tables, the page and the JSON show."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from baton.core.cost import ModelShape
from baton.planner.analyze.arrivals import Arrivals, arrivals
from baton.planner.analyze.claims import Claim, Facts, judge
from baton.planner.analyze.lengths import Lengths, lengths
from baton.planner.analyze.phases import Split, split
from baton.planner.analyze.serving import Serving
from baton.planner.analyze.sharing import (
    DEFAULT_CACHES,
    Sharing,
    Turns,
    hit_blocks,
    sharing,
    turns,
)
from baton.planner.endpoint import EndpointFit
from baton.planner.traces import Trace, spread

FORMAT = "baton-analyze/1"


class Latencies(msgspec.Struct, frozen=True):
    """What the trace itself measured, seconds: mean, p50, p90, p99 by metric."""

    count: int
    metrics: dict[str, tuple[float, float, float, float]]


class Analysis(msgspec.Struct, frozen=True):
    """What a trace says. Lengths are tokens, rates requests per second."""

    source: str
    trace_format: str
    num_requests: int
    prompts: Lengths
    outputs: Lengths
    output_over_input: float
    arrivals: Arrivals | None
    sharing: Sharing
    turns: Turns
    kinds: dict[str, int]
    latencies: Latencies | None
    model: ModelShape | None
    splits: tuple[Split, ...]
    claims: tuple[Claim, ...]
    endpoint: EndpointFit | None
    notes: tuple[str, ...]
    format: str = FORMAT


def analyze(
    trace: Trace,
    servings: Sequence[Serving] = (),
    *,
    model: ModelShape | None = None,
    endpoint: EndpointFit | None = None,
    caches: Sequence[int] = DEFAULT_CACHES,
    tpot_s: float = 0.05,
    batch: int | None = None,
    prices: dict[str, float] | None = None,
) -> Analysis:
    """Analyse a trace.

    servings: kinds of worker to split it on, the main one first. caches: sizes of prefix caches in
    tokens. tpot_s: the longest decode step wanted. prices: dollars an hour by device.
    """
    trace = spread(trace)
    requests = trace.requests
    prompts = lengths([request.num_prompt_tokens for request in requests])
    outputs = lengths([request.num_output_tokens for request in requests])
    when = arrivals(trace)
    shared = sharing(requests, caches, trace.num_cached_tokens)
    duration = when.duration_s if when else 0.0

    def on(serving: Serving, cached: Sequence[int] | None = None, by: str = "none") -> Split:
        return split(
            requests, serving, model,
            duration_s=duration, tpot_s=tpot_s, batch=batch, cached=cached, cached_by=by,
        )  # fmt: skip

    splits = [on(serving) for serving in servings]
    if servings and shared.infinite is not None:
        hits = hit_blocks(requests, None)
        tokens = [n * r.block_size for n, r in zip(hits, requests, strict=True)]
        splits.insert(1, on(servings[0], tokens, "an endless prefix cache"))
    facts = Facts(
        prompts=prompts,
        outputs=outputs,
        long_answers=_share(r.num_output_tokens > 3 * r.num_prompt_tokens for r in requests),
        arrivals=when,
        model=model,
        servings=servings,
        splits=splits,
        prices=prices or {},
    )
    return Analysis(
        source=trace.source,
        trace_format=trace.format,
        num_requests=len(requests),
        prompts=prompts,
        outputs=outputs,
        output_over_input=outputs.total / prompts.total,
        arrivals=when,
        sharing=shared,
        turns=turns(requests),
        kinds=_kinds(trace),
        latencies=_latencies(trace),
        model=model,
        splits=tuple(splits),
        claims=judge(facts),
        endpoint=endpoint,
        notes=trace.notes,
    )


def _share(flags: object) -> float:
    found = list(flags)  # type: ignore[call-overload]
    return sum(found) / len(found)


def _kinds(trace: Trace) -> dict[str, int]:
    counts: dict[str, int] = {}
    for request in trace.requests:
        if request.kind:
            counts[request.kind] = counts.get(request.kind, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1])[:10])


def _latencies(trace: Trace) -> Latencies | None:
    metrics = {}
    count = 0
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        values = sorted(v for r in trace.requests if (v := getattr(r, name)) is not None)
        if values:
            count = max(count, len(values))
            points = (values[round(q * (len(values) - 1))] for q in (0.5, 0.9, 0.99))
            metrics[name.removesuffix("_s")] = (sum(values) / len(values), *points)
    return Latencies(count, metrics) if metrics else None
