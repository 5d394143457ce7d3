"""Interpolation in measured tables, and how figures are judged."""

from __future__ import annotations

import gzip
from itertools import product
from pathlib import Path

import pytest
from reproduce.report import Line, table
from reproduce.tables import Curve, Grid, read_rows


def test_a_curve_is_straight_between_points_and_beyond_the_last() -> None:
    curve = Curve({10: 1.0, 20: 3.0, 40: 4.0})
    assert curve(15) == pytest.approx(2.0)
    assert curve(30) == pytest.approx(3.5)
    assert curve(80) == pytest.approx(6.0)
    assert curve(1) == 1.0
    with pytest.raises(ValueError, match="at least one point"):
        Curve({})


def test_a_grid_finds_a_multilinear_function_again() -> None:
    def truth(x: float, y: float, z: float) -> float:
        return 3 + 2 * x + x * y - 0.5 * z + x * y * z

    axes = [0.0, 2.0, 8.0], [1.0, 4.0], [0.0, 16.0]
    grid = Grid({point: truth(*point) for point in product(*axes)})
    for point in ((1.0, 2.0, 3.0), (7.0, 1.0, 16.0), (12.0, 6.0, 20.0)):
        assert grid(*point) == pytest.approx(truth(*point))
    assert grid(-5.0, 1.0, 0.0) == grid(0.0, 1.0, 0.0)


def test_a_hole_counts_as_the_next_smaller_corner() -> None:
    values = {(x, y): x + y for x, y in product((1.0, 2.0, 4.0), (1.0, 2.0, 4.0))}
    del values[4.0, 4.0]
    assert Grid(values)(4.0, 4.0) == 4.0
    del values[1.0, 1.0]
    with pytest.raises(ValueError, match="no value"):
        Grid(values)(1.0, 1.0)


def test_rows_come_from_plain_and_compressed_files(tmp_path: Path) -> None:
    text = "a,b\n1,2\n"
    (tmp_path / "t.csv").write_text(text)
    with gzip.open(tmp_path / "t.csv.gz", "wt") as file:
        file.write(text)
    for name in ("t.csv", "t.csv.gz"):
        assert list(read_rows(tmp_path / name)) == [{"a": "1", "b": "2"}]


def test_a_line_knows_its_error_and_whether_it_is_within_its_target() -> None:
    assert Line("c", "m", 10.0, 10.4, target=0.05).verdict == "ok"
    assert Line("c", "m", 10.0, 9.4, target=0.05).verdict == "missed"
    assert Line("c", "m", 10.0, 99.0).verdict == ""
    assert Line("c", "m", None, 99.0, target=0.1).error is None
    text = table("title", [Line("c", "m", 10.0, 9.4, "s", 0.05, "why")])
    assert "| c | m | 10 s | 9.4 s | -6.0% | 5% missed | why |" in text
