"""Small SVG charts without a library: they take the page's colours, and so follow light and dark.

Every chart is one `<svg>` with a title for screen readers; marks carry `<title>` tips. Colours are
classes (`s1`, `s2`, …, `axis`, `grid`), which the page's style sheet fills. Words within a chart
are placed last, where they cover no others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 14, 40
CHAR, LINE = 6.0, 13.0
"""Of the style sheet's font of 11 px: a wide character, a line of text."""
DOT, RING = 2.6, 6.0
Format = Callable[[float], str]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


class Scale:
    """From values to places on one axis."""

    def __init__(self, low: float, high: float, start: float, end: float, *, log: bool) -> None:
        self.log = log
        if log:
            low, high = max(low, 1e-12), max(high, low * 1.0001, 1e-12)
        elif high <= low:
            high = low + 1
        self.low, self.high = low, high
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        if self.log:
            part = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return self._start + part * (self._end - self._start)

    def ticks(self) -> list[float]:
        """Round values within the scale: powers of ten (and 2, 5 times them), or even steps."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1.0,) if self.high / self.low > 2000 else (1.0, 2.0, 5.0)
            values = [step * 10.0**power for power in decades for step in steps]
        else:
            raw = (self.high - self.low) / 4
            size = 10.0 ** math.floor(math.log10(raw))
            step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= raw * 0.999)
            first = math.ceil(self.low / step - 1e-9)
            values = [step * i for i in range(first, first + 7)]
        slack = 1e-9 * abs(self.high)
        return [value for value in values if self.low - slack <= value <= self.high + slack]


class Words:
    """Finds places for words, so that no two overlap and all stay within the frame.

    obstacles: what should not be covered either, but may be where there is no other place left.
    """

    def __init__(self, frame: Box, obstacles: Sequence[Box] = ()) -> None:
        self._frame = frame
        self._obstacles = obstacles
        self._taken: list[Box] = []

    def place(self, text: str, corners: Iterable[tuple[float, float]]) -> Box | None:
        """The first free box with its upper left in one of `corners`; None if there is none."""
        left, top, right, bottom = self._frame
        boxes = [(x, y, x + CHAR * len(text), y + LINE) for x, y in corners]
        inside = [
            box
            for box in boxes
            if box[0] >= left and box[1] >= top and box[2] <= right and box[3] <= bottom
        ]
        for others in ([*self._taken, *self._obstacles], self._taken):
            for box in inside:
                if not any(_overlap(box, other) for other in others):
                    self._taken.append(box)
                    return box
        return None


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _along(start: tuple[float, float], end: tuple[float, float]) -> Iterator[Box]:
    """Small boxes that cover a line."""
    steps = max(1, round(math.dist(start, end) / 4))
    for step in range(steps + 1):
        x, y = (a + (b - a) * step / steps for a, b in zip(start, end, strict=True))
        yield x - 1, y - 1, x + 1, y + 1


def _around(x: float, y: float, text: str) -> Iterator[tuple[float, float]]:
    """Upper left corners for a text close by a point, on all sides of it."""
    width = CHAR * len(text)
    for left in (x + 4, x - 4 - width, x - width / 2):
        yield left, y - LINE - 2
        yield left, y + 2
    yield x + 9, y - LINE / 2
    yield x - 9 - width, y - LINE / 2


class Chart:
    """One chart under construction; scales are set first, then marks are added."""

    def __init__(
        self,
        title: str,
        x: tuple[float, float],
        y: tuple[float, float],
        *,
        x_label: str,
        y_label: str,
        log_x: bool = False,
        x_format: Format = lambda value: f"{value:g}",
        y_format: Format = lambda value: f"{value:g}",
    ) -> None:
        self._title, self._axes = title, (x_label, y_label)
        self._formats = (x_format, y_format)
        self.x = Scale(*x, LEFT, WIDTH - RIGHT, log=log_x)
        self.y = Scale(*y, HEIGHT - BOTTOM, TOP, log=False)
        self._marks: list[str] = []
        self._drawn: list[Box] = []  # what words should leave free
        self._rules: list[tuple[float, str]] = []
        self._labels: list[tuple[float, float, str]] = []
        self._legend: list[tuple[int, str]] = []

    def bar(self, start: float, end: float, value: float, tip: str, series: int = 1) -> None:
        left, right, top = self.x(start), self.x(end), self.y(value)
        width = max(right - left - 1, 0.7)
        self._marks.append(
            f'<rect class="s{series}" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" '
            f'height="{max(self.y(0) - top, 0):.1f}"><title>{escape(tip)}</title></rect>'
        )

    def line(
        self,
        points: Sequence[tuple[float, float]],
        series: int = 1,
        *,
        dots: bool = False,
        dashed: bool = False,
    ) -> None:
        ends = [(self.x(a), self.y(b)) for a, b in points]
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in ends)
        for one, other in pairwise(ends):
            self._drawn += _along(one, other)
        style = f"line l{series}" + (" dashed" if dashed else "")
        self._marks.append(f'<polyline class="{style}" points="{places}"/>')
        if dots:
            self.dots(points, series)

    def dots(
        self, points: Sequence[tuple[float, float]], series: int = 1, tips: Sequence[str] = ()
    ) -> None:
        """tips: what to say of each besides its values."""
        form_x, form_y = self._formats
        for i, (a, b) in enumerate(points):
            x, y = self.x(a), self.y(b)
            tip = (f"{tips[i]}; " if tips else "") + f"{form_x(a)}: {form_y(b)}"
            self._drawn.append((x - DOT, y - DOT, x + DOT, y + DOT))
            self._marks.append(
                f'<circle class="s{series}" cx="{x:.1f}" cy="{y:.1f}" r="{DOT}">'
                f"<title>{escape(tip)}</title></circle>"
            )

    def ring(self, a: float, b: float) -> None:
        """Around a dot that matters most."""
        x, y = self.x(a), self.y(b)
        self._drawn.append((x - RING, y - RING, x + RING, y + RING))
        self._marks.append(f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="{RING}"/>')

    def rule(self, at: float, name: str) -> None:
        """A vertical line, such as a quantile's, with its name at the top."""
        place = self.x(at)
        self._rules.append((place, name))
        self._drawn += _along((place, TOP), (place, HEIGHT - BOTTOM))
        self._marks.append(
            f'<line class="rule" x1="{place:.1f}" x2="{place:.1f}" y1="{TOP}" '
            f'y2="{HEIGHT - BOTTOM}"/>'
        )

    def label(self, a: float, b: float, text: str) -> None:
        """Words beside a point, left out if there is no room; what is told first goes first."""
        self._labels.append((self.x(a), self.y(b), text))

    def legend(self, names: Sequence[tuple[int, str]]) -> None:
        """What the colour of each series means, below the chart."""
        self._legend = list(names)

    def _words(self) -> Iterator[str]:
        words = Words((LEFT, TOP - 2, WIDTH, HEIGHT - BOTTOM), self._drawn)
        for x, text in self._rules:
            width = CHAR * len(text)
            rows = [TOP - 2 + LINE * row for row in range(8)]
            corners = [(left, top) for top in rows for left in (x + 3, x - 3 - width)]
            yield _tag(words.place(text, corners), text)
        for x, y, text in self._labels:
            yield _tag(words.place(text, _around(x, y, text)), text)

    def svg(self) -> str:
        height = HEIGHT + (18 if self._legend else 0)
        parts = [
            f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(self._title)}">'
        ]
        form_x, form_y = self._formats
        for value in self.y.ticks():
            place = self.y(value)
            parts.append(
                f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" '
                f'y2="{place:.1f}"/><text class="axis end" x="{LEFT - 6}" y="{place + 4:.1f}">'
                f"{escape(form_y(value))}</text>"
            )
        for value in self.x.ticks():
            place = self.x(value)
            side = "end" if place > WIDTH - RIGHT - 14 else "mid"  # the last one would be cut
            parts.append(
                f'<text class="axis {side}" x="{place:.1f}" y="{HEIGHT - BOTTOM + 15}">'
                f"{escape(form_x(value))}</text>"
            )
        parts += [*self._marks, *self._words(), *_legend(LEFT, HEIGHT + 4, self._legend)]
        bottom, middle = HEIGHT - BOTTOM, (LEFT + WIDTH - RIGHT) / 2
        x_label, y_label = map(escape, self._axes)
        parts.append(
            f'<line class="base" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>'
            f'<text class="axis mid" x="{middle:.0f}" y="{HEIGHT - 6}">{x_label}</text>'
            '<text class="axis mid" '
            f'transform="translate(12 {(TOP + bottom) / 2:.0f}) rotate(-90)">'
            f"{y_label}</text></svg>"
        )
        return "".join(parts)


def _tag(box: Box | None, text: str) -> str:
    if box is None:
        return ""
    return f'<text class="tag" x="{box[0]:.1f}" y="{box[1] + 10:.1f}">{escape(text)}</text>'


def _legend(x: float, y: float, names: Sequence[tuple[int, str]]) -> Iterator[str]:
    """A square and a name for each series, in a row."""
    for series, name in names:
        yield (
            f'<rect class="s{series}" x="{x:.0f}" y="{y:.0f}" width="10" height="10"/>'
            f'<text class="axis" x="{x + 15:.0f}" y="{y + 9:.0f}">{escape(name)}</text>'
        )
        x += 15 + CHAR * len(name) + 18


def stacked(title: str, rows: Sequence[tuple[str, Sequence[float]]], names: Sequence[str]) -> str:
    """Horizontal bars of shares that add up to 1, one row a thing, one colour a name."""
    height, left, width = 26, 150, 300
    parts = [
        f'<svg viewBox="0 0 {left + width + 10} {height * len(rows) + 26}" role="img" '
        f'aria-label="{escape(title)}">'
    ]
    for i, (label, shares) in enumerate(rows):
        y, x = height * i + 4, float(left)
        parts.append(f'<text class="axis end" x="{left - 8}" y="{y + 14}">{escape(label)}</text>')
        for series, (name, part) in enumerate(zip(names, shares, strict=True), 1):
            wide = part * width
            parts.append(
                f'<rect class="s{series}" x="{x:.1f}" y="{y}" width="{max(wide - 1, 0):.1f}" '
                f'height="{height - 8}"><title>{escape(label)}, {escape(name)}: {part:.1%}</title>'
                "</rect>"
            )
            if wide > 34:
                parts.append(
                    f'<text class="on" x="{x + wide / 2:.1f}" y="{y + 13}">{part:.0%}</text>'
                )
            x += wide
    parts += _legend(left, height * len(rows) + 8, list(enumerate(names, 1)))
    return "".join(parts) + "</svg>"
