"""The choice of a codec: within the budget, never slower than raw, never on what is not known."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.codec_choice import RAW, CodecChoice, CodecFigures, Link, choose_codec, predict

RAW_BYTES = 524_288
FIGURES = [
    CodecFigures("fp8", 262_656, 130e-6, 67e-6, 4e-2),
    CodecFigures("int8", 282_624, 75e-6, 60e-6, 2e-4),
    CodecFigures("int4", 172_032, 92e-6, 64e-6, 8e-2),
]


def gbit(rate: float) -> Link:
    return Link(rate * 1e9 / 8)


seconds = st.floats(0, 1, allow_subnormal=False)
figures = st.lists(
    st.builds(
        CodecFigures,
        name=st.sampled_from(["fp8", "int8", "int4"]),
        encoded_bytes=st.integers(1, 2 * RAW_BYTES),
        encode_s=seconds,
        decode_s=seconds,
        kl=st.none() | st.floats(0, 10) | st.just(math.nan),
    ),
    max_size=4,
    unique_by=lambda figure: figure.name,
)
links = st.builds(Link, st.floats(1, 1e11), st.floats(0, 1))
budgets = st.floats(0, 10)


def times(choice: CodecChoice, known: list[CodecFigures], link: Link) -> float:
    if choice.codec == RAW:
        return predict(RAW_BYTES, 0.0, 0.0, link)
    figure = next(figure for figure in known if figure.name == choice.codec)
    return predict(figure.encoded_bytes, figure.encode_s, figure.decode_s, link)


@given(figures, links, budgets)
def test_the_best_of_what_is_allowed(known: list[CodecFigures], link: Link, max_kl: float) -> None:
    choice = choose_codec(RAW_BYTES, known, link, max_kl)
    assert choice.predicted_s == times(choice, known, link)
    assert choice.predicted_s <= predict(RAW_BYTES, 0.0, 0.0, link)
    assert choice.reason.startswith(f"{choice.codec}: ")
    for figure in known:
        if figure.kl is not None and max_kl > 0 and figure.kl <= max_kl:
            assert choice.predicted_s <= times(CodecChoice(figure.name, 0, ""), known, link)
    if choice.codec != RAW:
        chosen = next(figure for figure in known if figure.name == choice.codec)
        assert chosen.kl is not None and chosen.kl <= max_kl
        assert choice.predicted_s < predict(RAW_BYTES, 0.0, 0.0, link)


@given(figures, links, budgets, st.randoms(use_true_random=False))
def test_the_order_does_not_matter(
    known: list[CodecFigures], link: Link, max_kl: float, random: object
) -> None:
    shuffled = list(known)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    first = choose_codec(RAW_BYTES, known, link, max_kl)
    second = choose_codec(RAW_BYTES, shuffled, link, max_kl)
    assert (first.codec, first.predicted_s) == (second.codec, second.predicted_s)


@given(figures, links)
def test_more_budget_is_never_slower_and_more_bandwidth_neither(
    known: list[CodecFigures], link: Link
) -> None:
    before = math.inf
    for max_kl in (0.0, 1e-6, 0.01, 1.0, 100.0):
        choice = choose_codec(RAW_BYTES, known, link, max_kl)
        assert choice.predicted_s <= before
        before = choice.predicted_s
    faster = msgspec.structs.replace(link, bytes_per_s=2 * link.bytes_per_s)
    assert choose_codec(RAW_BYTES, known, faster, 1.0).predicted_s <= (
        choose_codec(RAW_BYTES, known, link, 1.0).predicted_s
    )


@given(figures, links, budgets)
def test_what_nobody_measured_is_never_chosen(
    known: list[CodecFigures], link: Link, max_kl: float
) -> None:
    for kl in (None, math.nan, -1.0):
        blind = [msgspec.structs.replace(figure, kl=kl) for figure in known]
        assert choose_codec(RAW_BYTES, blind, link, max_kl).codec == RAW
    for rate in (0.0, -1.0, math.nan, math.inf):
        choice = choose_codec(RAW_BYTES, known, Link(rate), max_kl)
        assert (choice.codec, choice.predicted_s) == (RAW, 0.0)
        assert "link" in choice.reason


def test_a_tie_goes_to_raw_and_between_lossy_ones_to_the_smaller_loss() -> None:
    link = Link(2.0**20)  # powers of two, so that the sums are exact
    same = CodecFigures("int8", RAW_BYTES - 1024, 2.0**-11, 2.0**-11, 0.001)
    assert choose_codec(RAW_BYTES, [same], link, 0.01).codec == RAW
    twins = [CodecFigures(name, 1024, 0, 0, kl) for name, kl in (("fp8", 0.005), ("int8", 0.001))]
    assert choose_codec(RAW_BYTES, twins, link, 0.01).codec == "int8"


@pytest.mark.parametrize(
    ("rate", "max_kl", "codec", "reason"),
    [
        (1, 0.01, "int8", "KL 0.0002 of the 0.01 nats allowed"),
        (1, 0.5, "int4", "KL 0.08 of the 0.5 nats allowed"),
        (100, 0.01, RAW, "raw: 0.0419 ms a block at 100 Gbit/s, int8 would take 0.158 ms"),
        (1, 1e-6, RAW, "the budget is 1e-06 nats, and measured are fp8 0.04, int8 0.0002"),
        (1, 0, RAW, "the budget allows no loss"),
    ],
)
def test_with_figures_as_they_are(rate: float, max_kl: float, codec: str, reason: str) -> None:
    choice = choose_codec(RAW_BYTES, FIGURES, gbit(rate), max_kl)
    assert choice.codec == codec
    assert reason in choice.reason


def test_a_budget_of_nothing_allows_no_lossy_codec_even_where_no_loss_showed() -> None:
    spotless = [msgspec.structs.replace(figure, kl=0.0) for figure in FIGURES]
    assert choose_codec(RAW_BYTES, spotless, gbit(1), 0.0).codec == RAW
    assert choose_codec(RAW_BYTES, spotless, gbit(1), 1e-9).codec == "int4"


def test_without_calibration_the_reason_says_how_to_get_one() -> None:
    assert "baton fabric calibrate" in choose_codec(RAW_BYTES, [], gbit(1), 0.01).reason
    blind = [msgspec.structs.replace(figure, kl=None) for figure in FIGURES]
    assert "baton fabric calibrate" in choose_codec(RAW_BYTES, blind, gbit(1), 0.01).reason
