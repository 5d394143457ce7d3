"""Published beside ours: the table, the JSON, and where both go."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

ROOT = Path(__file__).resolve().parents[2]


class Line(msgspec.Struct, frozen=True):
    """One figure. `error` is ours / published - 1; `target` what it may be at most, None: reported.

    published is None where the source gives no figure, ours where there is none to give.
    """

    case: str
    metric: str
    published: float | None
    ours: float | None
    unit: str = ""
    target: float | None = None
    note: str = ""

    @property
    def error(self) -> float | None:
        if not self.published or self.ours is None:
            return None
        return self.ours / self.published - 1

    @property
    def verdict(self) -> str:
        """`ok`, `missed`, or nothing where there is no target."""
        if self.target is None or self.error is None:
            return ""
        return "ok" if abs(self.error) <= self.target else "missed"


def table(title: str, lines: Sequence[Line]) -> str:
    """Markdown."""
    rows = [f"\n### {title}\n", "| case | figure | published | ours | error | target | note |"]
    rows.append("|---|---|---:|---:|---:|---:|---|")
    for line in lines:
        error = "" if line.error is None else f"{line.error:+.1%}"
        target = "" if line.target is None else f"{line.target:.0%} {line.verdict}"
        published, ours = _number(line.published, line.unit), _number(line.ours, line.unit)
        rows.append(
            f"| {line.case} | {line.metric} | {published} | {ours} | {error} | {target} "
            f"| {line.note} |"
        )
    return "\n".join(rows) + "\n"


def run(
    doc: str | None,
    data: Path,
    out: str,
    main: Callable[[argparse.Namespace], tuple[str, dict[str, Any]]],
    add_options: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
) -> int:
    """A script's frame: options, `main` gives text and JSON, which are printed and written."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=data, help=f"the data ({data})")
    parser.add_argument(
        "--json", type=Path, default=ROOT / "results" / out, help="where the figures are written"
    )
    add_options(parser)
    args = parser.parse_args()
    if not args.data.is_dir():
        parser.error(f"there is no folder {args.data}: give --data the path of the data")
    text, figures = main(args)
    print(text)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"written to {args.json}")
    return 0


def as_json(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Every line with its error and verdict."""
    extra = [{"error": line.error, "verdict": line.verdict} for line in lines]
    return [{**msgspec.to_builtins(line), **more} for line, more in zip(lines, extra, strict=True)]


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{text} {unit}".rstrip()
