"""Small SVG charts without a library: they take the page's colours, and so follow light and dark.

Every chart is one `<svg>` with a title for screen readers; marks carry `<title>` tips. Colours are
classes (`s1`, `s2`, …, `axis`, `grid`), which the page's style sheet fills.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 14, 40
Format = Callable[[float], str]


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
        """Round values within the scale: powers of ten (and 2, 5 on short scales), or even steps."""
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
        self._title, self._labels = title, (x_label, y_label)
        self._formats = (x_format, y_format)
        self.x = Scale(*x, LEFT, WIDTH - RIGHT, log=log_x)
        self.y = Scale(*y, HEIGHT - BOTTOM, TOP, log=False)
        self._marks: list[str] = []

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
        places = " ".join(f"{self.x(a):.1f},{self.y(b):.1f}" for a, b in points)
        style = f"line l{series}" + (" dashed" if dashed else "")
        self._marks.append(f'<polyline class="{style}" points="{places}"/>')
        if dots:
            self.dots(points, series)

    def dots(self, points: Sequence[tuple[float, float]], series: int = 1) -> None:
        form_x, form_y = self._formats
        for a, b in points:
            self._marks.append(
                f'<circle class="s{series}" cx="{self.x(a):.1f}" cy="{self.y(b):.1f}" r="2.6">'
                f"<title>{escape(form_x(a))}: {escape(form_y(b))}</title></circle>"
            )

    def rule(self, at: float, name: str) -> None:
        """A vertical line, such as a quantile's."""
        place = self.x(at)
        self._marks.append(
            f'<line class="rule" x1="{place:.1f}" x2="{place:.1f}" y1="{TOP}" '
            f'y2="{HEIGHT - BOTTOM}"/>'
            f'<text class="tag" x="{place + 3:.1f}" y="{TOP + 9}">{escape(name)}</text>'
        )

    def svg(self) -> str:
        parts = [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(self._title)}">'
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
            parts.append(
                f'<text class="axis mid" x="{self.x(value):.1f}" y="{HEIGHT - BOTTOM + 15}">'
                f"{escape(form_x(value))}</text>"
            )
        parts += self._marks
        bottom, middle = HEIGHT - BOTTOM, (LEFT + WIDTH - RIGHT) / 2
        x_label, y_label = map(escape, self._labels)
        parts.append(
            f'<line class="base" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>'
            f'<text class="axis mid" x="{middle:.0f}" y="{HEIGHT - 6}">{x_label}</text>'
            f'<text class="axis mid" transform="translate(12 {(TOP + bottom) / 2:.0f}) rotate(-90)">'
            f"{y_label}</text></svg>"
        )
        return "".join(parts)


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
    x = float(left)
    for series, name in enumerate(names, 1):
        y = height * len(rows) + 8
        parts.append(
            f'<rect class="s{series}" x="{x:.0f}" y="{y}" width="10" height="10"/>'
            f'<text class="axis" x="{x + 15:.0f}" y="{y + 10}">{escape(name)}</text>'
        )
        x += 90
    return "".join(parts) + "</svg>"
