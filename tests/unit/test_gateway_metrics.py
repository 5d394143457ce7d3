"""The table of metrics and the registry made from it."""

from __future__ import annotations

import re

import pytest

from baton.observe.metrics import (
    ERRORS,
    HTTP_REQUESTS,
    INTER_TOKEN_LATENCY,
    METRICS,
    RUNNING,
    Metric,
    Metrics,
)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_each_line_of_the_table_is_sound(metric: Metric) -> None:
    assert re.fullmatch(r"baton_[a-z0-9_]+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert metric.help.endswith(".")
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert list(metric.buckets) == sorted(set(metric.buckets))


def test_names_are_unique_and_all_are_exported() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    text = Metrics().exposition().decode()
    for metric in METRICS:
        assert f"# TYPE {metric.name} {metric.kind}" in text


def test_values_move() -> None:
    metrics = Metrics()
    metrics.add(HTTP_REQUESTS, endpoint="/x", status="200")
    metrics.add(HTTP_REQUESTS, 2, endpoint="/x", status="200")
    assert metrics.value(HTTP_REQUESTS, endpoint="/x", status="200") == 3
    assert metrics.value(ERRORS, code="x", stage="y") == 0
    metrics.set(RUNNING, 5)
    metrics.add(RUNNING, -1)
    assert metrics.value(RUNNING) == 4
    metrics.observe(INTER_TOKEN_LATENCY, 0.004)
    assert b'inter_token_latency_seconds_bucket{le="0.005"} 1.0' in metrics.exposition()


def test_another_processs_totals_survive_its_restart() -> None:
    steps = Metric("baton_steps_total", "counter", "Steps.", ("worker",))
    metrics = Metrics((steps,))
    for total in (3, 7, 7, 2, 4):  # it started anew between 7 and 2
        metrics.set_total(steps, total, worker="a")
    metrics.set_total(steps, 100, worker="b")
    assert metrics.value(steps, worker="a") == 7 + 4
    assert metrics.value(steps, worker="b") == 100


def test_two_registries_do_not_share() -> None:
    one, two = Metrics(), Metrics()
    one.add(RUNNING)
    assert two.value(RUNNING) == 0
