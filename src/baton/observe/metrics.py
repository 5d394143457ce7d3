"""Every metric that Baton exports, declared once, and the registry that holds their values.

A metric is a constant here; code names the constant, never a string. `METRICS` is the table from
which the registry and the documentation are made. Label values come from small fixed sets (never
from a client), so the number of series is bounded. Where the field already has a name and a
meaning for something, the name after `baton_` is that one.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST

_FAST_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5, 5.0)
_SLOW_S = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


class Metric(msgspec.Struct, frozen=True):
    """One line of the table. Counters' names end in `_total`; `buckets` are for histograms."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


HTTP_REQUESTS = Metric(
    "baton_http_requests_total",
    "counter",
    "HTTP requests answered, by route and status; 499 is a client that left before the answer.",
    ("endpoint", "status"),
)
RUNNING = Metric(
    "baton_num_requests_running",
    "gauge",
    "Completion requests between the arrival of their first byte and the end of their answer.",
)
REQUESTS_FINISHED = Metric(
    "baton_request_success_total",
    "counter",
    "Choices that came to their end, by finish reason.",
    ("finished_reason",),
)
ERRORS = Metric(
    "baton_request_errors_total",
    "counter",
    "Requests that ended in an error, by its code and the stage it came from.",
    ("code", "stage"),
)
DISCONNECTS = Metric(
    "baton_client_disconnects_total",
    "counter",
    "Completion requests whose client left before the end; their work was aborted.",
)
TIME_TO_FIRST_TOKEN = Metric(
    "baton_time_to_first_token_seconds",
    "histogram",
    "From the arrival of the request to the first token of a choice.",
    buckets=_SLOW_S,
)
INTER_TOKEN_LATENCY = Metric(
    "baton_inter_token_latency_seconds",
    "histogram",
    "Each gap between two arrivals of tokens of one choice.",
    buckets=_FAST_S,
)
E2E_LATENCY = Metric(
    "baton_e2e_request_latency_seconds",
    "histogram",
    "From the arrival of the request to the end of its answer; finished requests only.",
    buckets=_SLOW_S,
)
PROMPT_TOKENS = Metric(
    "baton_prompt_tokens_total", "counter", "Prompt tokens of the requests placed."
)
CACHED_TOKENS = Metric(
    "baton_prompt_tokens_cached_total", "counter", "Prompt tokens found in a prefix cache."
)
GENERATION_TOKENS = Metric(
    "baton_generation_tokens_total", "counter", "Tokens generated and accepted by the gateway."
)
REQUEST_PROMPT_TOKENS = Metric(
    "baton_request_prompt_tokens", "histogram", "Prompt tokens of a choice.", buckets=_TOKENS
)
REQUEST_GENERATION_TOKENS = Metric(
    "baton_request_generation_tokens",
    "histogram",
    "Tokens generated for a finished choice.",
    buckets=_TOKENS,
)

WORKER_UP = Metric(
    "baton_worker_up", "gauge", "1 while the worker's stream is open.", ("worker", "role")
)
WORKER_FROZEN = Metric(
    "baton_worker_frozen",
    "gauge",
    "1 while the worker's stream is open and it stands still: it is given no requests.",
    ("worker",),
)
WORKER_RUNNING = Metric(
    "baton_worker_num_requests_running", "gauge", "Sequences in the worker's steps.", ("worker",)
)
WORKER_WAITING = Metric(
    "baton_worker_num_requests_waiting", "gauge", "Sequences waiting for admission.", ("worker",)
)
KV_CACHE_USAGE = Metric(
    "baton_kv_cache_usage_perc",
    "gauge",
    "Share of the worker's KV blocks in use, 0 to 1; cached ones that nobody needs are not.",
    ("worker",),
)
STORE_USAGE = Metric(
    "baton_store_usage_perc", "gauge", "Share of the block store's frames in use.", ("worker",)
)
STORE_FRAMES_HELD = Metric(
    "baton_worker_num_store_frames_held",
    "gauge",
    "Frames of the block store that are being written or covered by a lease.",
    ("worker",),
)
STORE_FRAMES_RESERVED = Metric(
    "baton_worker_num_store_frames_reserved",
    "gauge",
    "Frames of the block store that are promised to running exports.",
    ("worker",),
)
LEASES = Metric(
    "baton_worker_num_leases", "gauge", "Leases that let others read the block store.", ("worker",)
)
BLOCK_TRANSFERS = Metric(
    "baton_worker_num_block_transfers",
    "gauge",
    "Copies into the block store and fetches from others' that are under way.",
    ("worker",),
)
STEP_SECONDS = Metric(
    "baton_worker_step_seconds", "gauge", "Moving average of a step's duration.", ("worker",)
)
WORKER_EVENTS = Metric(
    "baton_worker_events_total",
    "counter",
    "Running totals of a worker: tokens computed, prefix hits, preemptions, imports, fallbacks.",
    ("worker", "event"),
)
GATEWAY_EVENTS = Metric(
    "baton_gateway_events_total",
    "counter",
    "What befell requests at the gateway beyond the ordinary.",
    ("event",),
)

PREDICTIONS = Metric(
    "baton_predictions_total",
    "counter",
    "Predictions that were compared with what then happened, by worker and stage.",
    ("worker", "stage"),
)
PREDICTION_ERROR = Metric(
    "baton_prediction_error_ratio",
    "gauge",
    "Quantiles of abs(measured / predicted - 1) over the last 256 of a stage.",
    ("worker", "stage", "quantile"),
)
PREDICTION_RATIO = Metric(
    "baton_prediction_measured_ratio",
    "gauge",
    "Median of measured / predicted over the last 256 of a stage.",
    ("worker", "stage"),
)
PLAN_STALE = Metric(
    "baton_plan_stale",
    "gauge",
    "1 where what was assumed in planning this deployment no longer holds, else 0.",
    ("reason",),
)
PLAN_STRAIN = Metric(
    "baton_plan_strain_ratio",
    "gauge",
    "Measured over allowed by the plan; above 1 the assumption is broken.",
    ("reason",),
)

METRICS: tuple[Metric, ...] = (
    WORKER_UP,
    WORKER_FROZEN,
    WORKER_RUNNING,
    WORKER_WAITING,
    KV_CACHE_USAGE,
    STORE_USAGE,
    STORE_FRAMES_HELD,
    STORE_FRAMES_RESERVED,
    LEASES,
    BLOCK_TRANSFERS,
    STEP_SECONDS,
    WORKER_EVENTS,
    GATEWAY_EVENTS,
    PREDICTIONS,
    PREDICTION_ERROR,
    PREDICTION_RATIO,
    PLAN_STALE,
    PLAN_STRAIN,
    HTTP_REQUESTS,
    RUNNING,
    REQUESTS_FINISHED,
    ERRORS,
    DISCONNECTS,
    TIME_TO_FIRST_TOKEN,
    INTER_TOKEN_LATENCY,
    E2E_LATENCY,
    PROMPT_TOKENS,
    CACHED_TOKENS,
    GENERATION_TOKENS,
    REQUEST_PROMPT_TOKENS,
    REQUEST_GENERATION_TOKENS,
)


class Metrics:
    """The values of one process, in a registry of their own. May be used from any thread."""

    def __init__(self, table: tuple[Metric, ...] = METRICS) -> None:
        self.registry = CollectorRegistry()
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}
        self._totals: dict[tuple[str, tuple[str, ...]], float] = {}
        for metric in table:
            self._declare(metric)

    def _declare(self, metric: Metric) -> None:
        name, labels = metric.name, metric.labels
        if metric.kind == "counter":
            self._counters[name] = Counter(name, metric.help, labels, registry=self.registry)
        elif metric.kind == "gauge":
            self._gauges[name] = Gauge(name, metric.help, labels, registry=self.registry)
        else:
            self._histograms[name] = Histogram(
                name, metric.help, labels, registry=self.registry, buckets=metric.buckets
            )

    def add(self, metric: Metric, amount: float = 1.0, **labels: str) -> None:
        """Raise a counter by `amount` >= 0, or move a gauge by it."""
        if metric.kind == "gauge":
            gauge = self._gauges[metric.name]
            (gauge.labels(**labels) if labels else gauge).inc(amount)
            return
        counter = self._counters[metric.name]
        (counter.labels(**labels) if labels else counter).inc(amount)

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        gauge = self._gauges[metric.name]
        (gauge.labels(**labels) if labels else gauge).set(value)

    def clear(self, metric: Metric) -> None:
        """Drop every series of a gauge with labels."""
        self._gauges[metric.name].clear()

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        histogram = self._histograms[metric.name]
        (histogram.labels(**labels) if labels else histogram).observe(value)

    def set_total(self, metric: Metric, total: float, **labels: str) -> None:
        """Bring a counter up to another process's running total.

        A total below the last one means that the other process started anew from zero. Must be
        called from one thread at a time for one series.
        """
        series = (metric.name, tuple(labels[name] for name in metric.labels))
        last = self._totals.get(series, 0.0)
        self._totals[series] = total
        self.add(metric, total - last if total >= last else total, **labels)

    def value(self, metric: Metric, **labels: str) -> float:
        """The value of one series of a counter or gauge, 0 if it has never moved."""
        return self.registry.get_sample_value(metric.name, labels) or 0.0

    def exposition(self) -> bytes:
        """Everything, in the text format of Prometheus (`CONTENT_TYPE`)."""
        return generate_latest(self.registry)
