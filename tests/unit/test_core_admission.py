"""The learned quantile of output lengths."""

from __future__ import annotations

from sim_engine import make_request

from baton.core.admission import OutputLengths


def test_knows_nothing_at_first() -> None:
    assert OutputLengths().estimate() == 0


def test_upper_edge_of_the_quantile_bucket() -> None:
    lengths = OutputLengths(0.5)
    for n in (10, 12, 100, 3000):
        lengths.observe(n)
    assert lengths.estimate() == 15
    high = OutputLengths(0.9)
    for n in (10, 12, 100, 3000):
        high.observe(n)
    assert high.estimate() == 4095


def test_follows_the_traffic() -> None:
    lengths = OutputLengths(0.5, window=16)
    for _ in range(200):
        lengths.observe(1000)
    for _ in range(64):
        lengths.observe(10)
    assert lengths.estimate() == 15


def test_huge_lengths_have_a_bucket() -> None:
    lengths = OutputLengths()
    lengths.observe(1 << 60)
    assert lengths.estimate() >= (1 << 31) - 1


def test_rest_is_bounded_by_the_request() -> None:
    lengths = OutputLengths()
    lengths.observe(100)  # estimate 127
    assert lengths.predict_rest(make_request("a", [1], 1000), 0) == 127
    assert lengths.predict_rest(make_request("a", [1], 1000), 100) == 27
    assert lengths.predict_rest(make_request("a", [1], 50), 20) == 30
    assert lengths.predict_rest(make_request("a", [1], 1000), 500) == 0
    assert lengths.predict_rest(make_request("a", [1], 1000, hand_off=True), 0) == 0
