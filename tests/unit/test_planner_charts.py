"""Charts: words that cover nothing, and nothing outside the frame."""

from __future__ import annotations

import random
import re
from itertools import combinations

import pytest

from baton.planner.analyze.charts import CHAR, HEIGHT, LINE, WIDTH, Box, Chart, Words

TAG = re.compile(r'<text class="tag" x="([\d.-]+)" y="([\d.-]+)">([^<]+)</text>')


def chart() -> Chart:
    return Chart("A & B", (0, 10), (0, 10), x_label="x", y_label="y")


def tags(svg: str) -> dict[str, Box]:
    """The boxes of what is written within the chart."""
    return {
        text: (float(x), float(y) - 10, float(x) + CHAR * len(text), float(y) - 10 + LINE)
        for x, y, text in TAG.findall(svg)
    }


def overlap(a: Box, b: Box) -> bool:
    slack = 0.2  # places are rounded
    inner = (a[0] + slack, a[1] + slack, a[2] - slack, a[3] - slack)
    return inner[0] < b[2] and b[0] < inner[2] and inner[1] < b[3] and b[1] < inner[3]


@pytest.mark.parametrize("seed", range(20))
def test_labels_cover_no_others_and_stay_within(seed: int) -> None:
    rng = random.Random(seed)
    drawn = chart()
    for number in range(4):
        drawn.rule(10 * rng.random() ** 3, f"rule {number}")
    points = [(10 * rng.random() ** 2, 10 * rng.random()) for _ in range(25)]
    drawn.dots(points)
    for number, (x, y) in enumerate(points):
        drawn.label(x, y, f"{number}P{number}D H100")
    found = tags(drawn.svg())
    assert {"rule 0", "rule 1", "rule 2", "rule 3"} <= found.keys()
    assert len(found) > 15
    assert not [pair for pair in combinations(found.values(), 2) if overlap(*pair)]
    for left, top, right, bottom in found.values():
        assert left >= 0 and top >= 0 and right <= WIDTH and bottom <= HEIGHT


def test_a_rule_at_the_right_edge_has_its_name_on_the_left() -> None:
    drawn = chart()
    drawn.rule(9.9, "p90 of all")
    [(left, _, right, _)] = tags(drawn.svg()).values()
    assert right < drawn.x(9.9) < WIDTH
    assert left > drawn.x(5)


def test_rules_side_by_side_have_their_names_in_rows() -> None:
    drawn = chart()
    drawn.rule(5.0, "p50")
    drawn.rule(5.1, "p90")
    tops = [top for _, top, _, _ in tags(drawn.svg()).values()]
    assert len(set(tops)) == 2 or not overlap(*tags(drawn.svg()).values())


def test_dots_are_left_free_while_there_is_room() -> None:
    drawn = chart()
    drawn.dots([(5, 5), (5.6, 5.6)])
    drawn.label(5, 5, "first")
    [box] = tags(drawn.svg()).values()
    for x, y in ((5, 5), (5.6, 5.6)):
        assert not overlap(box, (drawn.x(x) - 1, drawn.y(y) - 1, drawn.x(x) + 1, drawn.y(y) + 1))


def test_words_without_a_place_are_left_out() -> None:
    words = Words((0, 0, 40, 30))
    assert words.place("abc", [(0, 0)]) == (0, 0, 3 * CHAR, LINE)
    assert words.place("abc", [(0, 0), (10, 5)]) is None
    assert words.place("abcdefgh", [(0, 15)]) is None
    assert words.place("abc", [(-1, 15), (0, 15)]) == (0, 15, 3 * CHAR, 15 + LINE)


def test_a_legend_makes_the_chart_higher_and_names_are_escaped() -> None:
    drawn = chart()
    plain = drawn.svg()
    drawn.legend([(1, "one"), (3, "<three>")])
    assert f'viewBox="0 0 {WIDTH} {HEIGHT}"' in plain
    assert f'viewBox="0 0 {WIDTH} {HEIGHT}"' not in drawn.svg()
    assert "&lt;three&gt;" in drawn.svg()
    assert drawn.svg().count('<rect class="s') == 2
