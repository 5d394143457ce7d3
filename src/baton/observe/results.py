"""The arithmetic of a load test: pure, from arrival times to goodput.

    sent ──TTFT──▶ first event ──gap──▶ event ──gap──▶ … last event        E2E = sent to end
                   └───────────── TPOT × (tokens − 1) ─────────┘

TTFT: from sending the request to the first event that carries tokens. ITL: each gap between two
such events. TPOT: from the first token to the last, divided by (output tokens − 1), so it excludes
TTFT; undefined for fewer than two tokens. Goodput: requests a second that met *all* SLOs;
attainment: their share of all requests, failed ones included. Times are seconds of one monotonic
clock.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from baton.observe.slo import Slo

COUNTED_BY = ("events", "usage", "token ids")
"""What output tokens were counted by, the least exact first."""


class RequestResult(msgspec.Struct, frozen=True):
    """What became of one request.

    planned_s, sent_s, end_s and event_s (arrivals of events that carried tokens) are on one clock.
    last_s is the arrival of the last token where that need not be the last such event, else None.
    output_tokens is the number of token ids that came, else the server's count, else the number of
    such events (`counted_by`, of `COUNTED_BY`). `failure` is a kind (`timeout`, `http 429`), None
    if all went well; `detail` is the server's message.
    """

    index: int
    planned_s: float
    sent_s: float
    end_s: float
    event_s: tuple[float, ...] = ()
    last_s: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int = 0
    counted_by: str = "events"
    failure: str | None = None
    detail: str = ""

    @property
    def ttft_s(self) -> float | None:
        return self.event_s[0] - self.sent_s if self.event_s else None

    @property
    def tpot_s(self) -> float | None:
        if self.output_tokens < 2 or not self.event_s:
            return None
        last = self.event_s[-1] if self.last_s is None else self.last_s
        return (last - self.event_s[0]) / (self.output_tokens - 1)

    @property
    def itl_s(self) -> list[float]:
        return [b - a for a, b in zip(self.event_s, self.event_s[1:], strict=False)]

    @property
    def e2e_s(self) -> float:
        return self.end_s - self.sent_s

    def values(self) -> dict[str, float | None]:
        """Every quantity that an SLO may bound, in seconds; None where it is undefined."""
        gaps = sorted(self.itl_s)
        return {
            "ttft": self.ttft_s,
            "tpot": self.tpot_s,
            "e2e": self.e2e_s,
            "itl_p50": percentile(gaps, 50) if gaps else None,
            "itl_p90": percentile(gaps, 90) if gaps else None,
            "itl_p99": percentile(gaps, 99) if gaps else None,
            "itl_max": gaps[-1] if gaps else None,
        }


def percentile(ordered: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100) of sorted values, linear between neighbours as in numpy.

    Raises:
        ValueError: no values.
    """
    if not ordered:
        raise ValueError("percentile of nothing")
    rank = (len(ordered) - 1) * q / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


class Stats(msgspec.Struct, frozen=True):
    """A distribution of seconds."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


def stats(values: Iterable[float]) -> Stats | None:
    """None if there are no values."""
    ordered = sorted(values)
    if not ordered:
        return None
    return Stats(
        count=len(ordered),
        mean=math.fsum(ordered) / len(ordered),
        p50=percentile(ordered, 50),
        p90=percentile(ordered, 90),
        p99=percentile(ordered, 99),
        max=ordered[-1],
    )


class Summary(msgspec.Struct, frozen=True):
    """One run. Rates are over `duration_s`: from the first planned arrival to the last end.

    offered_per_s is what the plan asked for: requests after the first, over the planned span; None
    if all came at once. `missed` counts, for each SLO, the successful requests that broke it.
    send_lag_p99_s says how late the client itself was. Latencies are of successful requests.
    """

    num_requests: int
    num_ok: int
    failures: dict[str, int]
    duration_s: float
    offered_per_s: float | None
    requests_per_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    mean_concurrency: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    counted_by: str
    ttft: Stats | None
    tpot: Stats | None
    itl: Stats | None
    e2e: Stats | None
    send_lag_p99_s: float
    slo: str
    num_good: int
    goodput_per_s: float
    attainment: float
    missed: dict[str, int]


def summarize(results: Sequence[RequestResult], slo: Slo) -> Summary:
    """Reduce the results of one run.

    Raises:
        ValueError: no results.
    """
    if not results:
        raise ValueError("no requests were sent")
    ok = [r for r in results if r.failure is None]
    planned = sorted(r.planned_s for r in results)
    duration = max(max(r.end_s for r in results) - planned[0], 1e-9)
    span = planned[-1] - planned[0]
    broken = [slo.broken_by(r.values()) for r in ok]
    num_good = sum(not names for names in broken)
    output_tokens = sum(r.output_tokens for r in ok)
    prompt_tokens = sum(r.prompt_tokens or 0 for r in ok)
    return Summary(
        num_requests=len(results),
        num_ok=len(ok),
        failures=dict(Counter(r.failure for r in results if r.failure).most_common()),
        duration_s=duration,
        offered_per_s=(len(results) - 1) / span if span > 0 else None,
        requests_per_s=len(ok) / duration,
        input_tokens_per_s=prompt_tokens / duration,
        output_tokens_per_s=output_tokens / duration,
        mean_concurrency=math.fsum(r.e2e_s for r in results) / duration,
        prompt_tokens=prompt_tokens,
        cached_tokens=sum(r.cached_tokens or 0 for r in ok),
        output_tokens=output_tokens,
        counted_by=min((r.counted_by for r in ok), key=COUNTED_BY.index, default=COUNTED_BY[-1]),
        ttft=stats(r.ttft_s for r in ok if r.ttft_s is not None),
        tpot=stats(r.tpot_s for r in ok if r.tpot_s is not None),
        itl=stats(gap for r in ok for gap in r.itl_s),
        e2e=stats(r.e2e_s for r in ok),
        send_lag_p99_s=percentile(sorted(r.sent_s - r.planned_s for r in results), 99),
        slo=str(slo),
        num_good=num_good,
        goodput_per_s=num_good / duration,
        attainment=num_good / len(results),
        missed=dict(Counter(name for names in broken for name in names)),
    )
